"""Key configurations and their list (RFC 9458, 3)."""

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adytum.inference.channel import keyconfig
from adytum.inference.channel.errors import ChannelError, MalformedMessage
from adytum.inference.channel.hpke import PUBLIC_KEY_LENGTH, AeadId, KdfId, KemId, Suite
from adytum.inference.channel.keyconfig import KeyConfiguration, decode_list, encode_list
from tests.unit.channel.support import ALL_PAIRS, FUZZ, KEMS, configuration, mutate, mutations, unhex, wire_vector

# Key 9, KEM 0x4242 with a key of 5 bytes, one pair of algorithms.
UNKNOWN_KEM = unhex("09 4242 0102030405 0004 0001 0002")


def configurations() -> st.SearchStrategy[KeyConfiguration]:
    def of(kem: KemId) -> st.SearchStrategy[KeyConfiguration]:
        length = PUBLIC_KEY_LENGTH[kem]
        pairs = st.lists(st.sampled_from(ALL_PAIRS), min_size=1, max_size=4).map(tuple)
        return st.builds(
            KeyConfiguration, st.integers(0, 255), st.just(kem), st.binary(min_size=length, max_size=length), pairs
        )

    return st.sampled_from(KEMS).flatmap(of)


@pytest.mark.parametrize("name", ["rfc9458.json", "chunked-ohttp.json"])
def test_vector(name: str) -> None:
    encoded = unhex(wire_vector(name)["key_configuration"])
    decoded = KeyConfiguration.decode(encoded)
    assert decoded is not None
    assert (decoded.key_id, decoded.kem) == (1, KemId.X25519)
    assert decoded.symmetric == (
        (KdfId.HKDF_SHA256, AeadId.AES_128_GCM),
        (KdfId.HKDF_SHA256, AeadId.CHACHA20_POLY1305),
    )
    assert decoded.encode() == encoded


def test_the_ehbp_configuration_has_the_41_bytes_of_its_protocol() -> None:
    public = bytes(range(32))
    encoded = KeyConfiguration(0, KemId.X25519, public).encode()
    assert encoded == unhex("00 0020") + public + unhex("0004 0001 0002")
    assert len(encoded) == 41


def test_pairs_follow_each_other() -> None:
    """A client skips pairs that it does not know, so a round trip would not notice bytes between them."""
    encoded = KeyConfiguration(5, KemId.X25519, bytes(32), ALL_PAIRS).encode()
    assert encoded == unhex("05 0020") + bytes(32) + unhex("000c 0001 0002 0001 0001 0001 0003")


@pytest.mark.parametrize("kem", KEMS)
def test_each_truncation_and_a_trailing_byte_is_an_error(kem: KemId) -> None:
    encoded = configuration(kem).encode()
    assert KeyConfiguration.decode(encoded) == configuration(kem)
    for end in range(len(encoded)):
        with pytest.raises(MalformedMessage):
            KeyConfiguration.decode(encoded[:end])
    for extra in (b"\x00", b"\x00\x01\x00\x02"):
        with pytest.raises(MalformedMessage):
            KeyConfiguration.decode(encoded + extra)


def test_each_truncation_of_a_list_is_an_error_or_ends_between_two() -> None:
    items = tuple(configuration(kem, key_id) for key_id, kem in enumerate(KEMS))
    encoded = encode_list(items)
    ends = {len(encode_list(items[:count])): items[:count] for count in range(1, len(items) + 1)}
    for end in range(len(encoded) + 1):
        if end in ends:
            assert decode_list(encoded[:end]) == ends[end]
        else:
            with pytest.raises(MalformedMessage):
                decode_list(encoded[:end])
    for extra in (b"\x00", b"\x00\x00", b"\x00\x01\x00"):
        with pytest.raises(MalformedMessage):
            decode_list(encoded + extra)


def test_order_is_kept_and_the_best_is_first() -> None:
    items = (configuration(KemId.MLKEM768_X25519, 2), configuration(KemId.X25519, 1))
    assert decode_list(encode_list(items)) == items
    assert decode_list(encode_list(items[::-1])) == items[::-1]


def test_an_unknown_kem_is_skipped() -> None:
    known = configuration(KemId.X25519)
    prefixed = len(UNKNOWN_KEM).to_bytes(2, "big") + UNKNOWN_KEM
    assert KeyConfiguration.decode(UNKNOWN_KEM) is None
    # What follows an unknown KEM has an unknown format, and may be nothing.
    assert KeyConfiguration.decode(UNKNOWN_KEM[:3]) is None
    assert decode_list(prefixed + encode_list((known,)) + prefixed) == (known,)
    with pytest.raises(MalformedMessage):
        decode_list(prefixed)
    # It is skipped, but not if its own length is wrong.
    for end in range(1, len(prefixed)):
        with pytest.raises(MalformedMessage):
            decode_list(encode_list((known,)) + prefixed[:end])


def test_one_bad_configuration_discards_the_list() -> None:
    good = encode_list((configuration(KemId.X25519),))
    bad = configuration(KemId.X25519).encode()[:-1]
    with pytest.raises(MalformedMessage):
        decode_list(good + len(bad).to_bytes(2, "big") + bad)


def test_unknown_algorithms_are_skipped() -> None:
    public = configuration(KemId.X25519).public_key
    encoded = unhex("05 0020") + public + unhex("0010 0002 0002 0001 ffff 0001 0003 9999 0001")
    decoded = KeyConfiguration.decode(encoded)
    assert decoded == KeyConfiguration(5, KemId.X25519, public, ((KdfId.HKDF_SHA256, AeadId.CHACHA20_POLY1305),))
    # Both bytes of both identifiers count.
    for pair in ("0001 ffff", "0001 0102", "0001 0202", "0101 0002", "0000 0002", "0001 0000"):
        assert KeyConfiguration.decode(unhex("05 0020") + public + unhex("0004" + pair)) is None


@pytest.mark.parametrize("pairs", ["0000", "0003 000100", "0006 0001 0002 0001", "0004", "0008 0001 0002"])
def test_pairs_are_whole_and_at_least_one(pairs: str) -> None:
    with pytest.raises(MalformedMessage):
        KeyConfiguration.decode(unhex("05 0020") + bytes(32) + unhex(pairs))


@pytest.mark.parametrize("data", ["", "00", "0000"])
def test_an_empty_list_is_an_error(data: str) -> None:
    with pytest.raises(MalformedMessage):
        decode_list(unhex(data))


def test_only_what_is_offered_is_allowed() -> None:
    offered = KeyConfiguration(1, KemId.X25519, bytes(32))
    assert offered.suite == Suite(KemId.X25519, KdfId.HKDF_SHA256, AeadId.AES_256_GCM)
    assert offered.allows(offered.suite)
    assert not offered.allows(Suite(KemId.X25519, KdfId.HKDF_SHA256, AeadId.AES_128_GCM))
    assert not offered.allows(Suite(KemId.MLKEM768_X25519, KdfId.HKDF_SHA256, AeadId.AES_256_GCM))


def test_the_media_type() -> None:
    assert keyconfig.MEDIA_TYPE == "application/ohttp-keys"


@FUZZ
@given(st.lists(configurations(), min_size=1, max_size=3).map(tuple))
def test_round_trip(items: tuple[KeyConfiguration, ...]) -> None:
    assert decode_list(encode_list(items)) == items


@FUZZ
@given(st.binary(max_size=200))
def test_only_our_errors_escape_from_any_bytes(data: bytes) -> None:
    with contextlib.suppress(ChannelError):
        assert decode_list(data)


@FUZZ
@given(st.lists(configurations(), min_size=1, max_size=2).map(tuple), mutations())
def test_only_our_errors_escape_from_changed_lists(items: tuple[KeyConfiguration, ...], edits: list) -> None:
    with contextlib.suppress(ChannelError):
        assert decode_list(mutate(encode_list(items), edits))
