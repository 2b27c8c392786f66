"""The Encrypted HTTP Body Protocol, server side, against its own vectors and an independent client's primitives."""

from collections.abc import Iterable

import pytest
from ehbp import FrameDecryptor, derive_response_keys
from hypothesis import given
from hypothesis import strategies as st

from adytum.inference.channel import ehbp, hpke
from adytum.inference.channel.ehbp import SUITE, RequestOpener, ResponseSealer
from adytum.inference.channel.errors import (
    ChannelError,
    ExchangeMisuse,
    MalformedMessage,
    MessageTooLarge,
    OpenFailed,
    TruncatedMessage,
    UnknownKey,
)
from adytum.inference.channel.hpke import Context, KemId, PrivateKey
from adytum.inference.channel.limits import Limits
from tests.unit.channel.support import (
    FUZZ,
    SLOW_FUZZ,
    cuts,
    flips,
    mutate,
    mutations,
    one_by_one,
    pieces,
    recipient,
    refused,
    unhex,
    wire_vector,
)

KEY = recipient(KemId.X25519)
OTHER = hpke.X25519Key.from_bytes(bytes(range(1, 33)))


def sender(key: PrivateKey = KEY) -> tuple[str, Context]:
    """(the header, the client's context)."""
    enc, context = hpke.setup_sender(SUITE, key.public_bytes, b"ehbp request")
    return enc.hex(), context


def framed(sealed: bytes) -> bytes:
    return len(sealed).to_bytes(4, "big") + sealed


def opened(
    header: str, data: Iterable[bytes], keys: tuple[PrivateKey, ...] = (KEY,), limits: Limits | None = None
) -> bytes:
    opener = RequestOpener(header, keys, limits or Limits())
    for piece in data:
        opener.feed(piece)
    return opener.finish()[0]


HEADER, CONTEXT = sender()
FRAMES = [framed(CONTEXT.seal(part)) for part in (b"first", b"second", b"third")]
BODY = b"".join(FRAMES)
SECRET = CONTEXT.export(b"ehbp response", 32)


def test_names_on_the_wire() -> None:
    assert (ehbp.REQUEST_HEADER, ehbp.RESPONSE_HEADER) == ("ehbp-encapsulated-key", "ehbp-response-nonce")
    assert ehbp.KEY_CONFIG_PROBLEM == "urn:ietf:params:ehbp:error:key-config"


def test_derive_vector() -> None:
    vector = wire_vector("ehbp-derive.json")
    sequence = ehbp.response_sequence(
        unhex(vector["exportedSecret"]), unhex(vector["requestEnc"]), unhex(vector["responseNonce"])
    )
    assert sequence._base.to_bytes(12, "big") == unhex(vector["derivedNonceBase"])
    key = hpke.new_aead(SUITE.aead, unhex(vector["derivedKey"]))
    assert sequence.seal(b"x") == key.encrypt(unhex(vector["derivedNonceBase"]), b"x", b"")


def test_response_vector() -> None:
    vector = wire_vector("ehbp-response-decryption.json")
    secret, enc, nonce = (unhex(vector[name]) for name in ("exportedSecret", "requestEnc", "responseNonce"))
    sealed = unhex(vector["encryptedResponse"])
    assert ehbp.response_sequence(secret, enc, nonce).open(sealed[4:]) == unhex(vector["plaintext"])
    assert framed(ehbp.response_sequence(secret, enc, nonce).seal(unhex(vector["plaintext"]))) == sealed


def test_the_published_client_reads_our_response() -> None:
    opener = RequestOpener(HEADER, (KEY,))
    opener.feed(BODY)
    _, sealer = opener.finish()
    material = derive_response_keys(SECRET, unhex(HEADER), sealer.nonce)
    decryptor = FrameDecryptor(material)
    parts = [b"one", b"2", bytes(5000)]
    plain: list[bytes] = []
    for part in parts:
        plain += decryptor.push(sealer.frame(part))
    decryptor.finish()
    assert plain == parts


# Requests.


@pytest.mark.parametrize("data", [[BODY], one_by_one(BODY), FRAMES], ids=["at once", "byte by byte", "by frames"])
def test_a_request(data: list[bytes]) -> None:
    assert opened(HEADER, data) == b"firstsecondthird"


def test_the_recipient_is_known_after_the_first_frame() -> None:
    opener = RequestOpener(HEADER, (OTHER, KEY))
    for piece in (FRAMES[0][:-1], FRAMES[0][-1:]):
        assert opener.recipient == b""
        opener.feed(piece)
    assert opener.recipient == KEY.public_bytes


def test_frames_of_any_length_however_they_are_divided() -> None:
    """A length's first bytes look like a shorter length; it counts only when all four are there."""
    header, context = sender()
    parts = [b"first", bytes(0x0F00), bytes(300)]
    body = b"".join(framed(context.seal(part)) for part in parts)
    lengths = [len(part) + 20 for part in parts]
    for start in (0, lengths[0], lengths[0] + lengths[1]):
        for end in range(start, start + 6):
            assert opened(header, [body[:end], body[end:]]) == b"".join(parts)
            assert opened(header, [body[:start], body[start:end], body[end:]]) == b"".join(parts)


def test_empty_frames_are_skipped_and_do_not_count() -> None:
    empty = bytes(4)
    for body in (empty + BODY, empty.join(FRAMES), BODY + empty * 3):
        assert opened(HEADER, [body]) == b"firstsecondthird" == opened(HEADER, one_by_one(body))


def test_a_frame_may_hold_no_plaintext() -> None:
    header, context = sender()
    body = framed(context.seal(b"")) + framed(context.seal(b"x"))
    assert opened(header, [body]) == b"x"


@pytest.mark.parametrize("body", [b"", bytes(4), bytes(8)])
def test_a_body_without_a_frame_is_cut(body: bytes) -> None:
    assert type(refused(opened, HEADER, [body])) is TruncatedMessage


def test_cut_at_every_offset() -> None:
    """Inside a frame a cut is an error. At a frame's end EHBP cannot tell, which is why OHTTP leads."""
    ends = {0: None, len(FRAMES[0]): b"first", len(FRAMES[0] + FRAMES[1]): b"firstsecond"}
    for end in range(len(BODY)):
        for data in ([BODY[:end]], one_by_one(BODY[:end])):
            whole = ends.get(end)
            if whole is None:
                assert type(refused(opened, HEADER, data)) is TruncatedMessage
            else:
                assert opened(HEADER, data) == whole


def test_every_flipped_bit() -> None:
    for _, changed in flips(BODY):
        assert isinstance(refused(opened, HEADER, [changed]), ChannelError)
    for _, changed in flips(unhex(HEADER)):
        assert type(refused(opened, changed.hex(), [BODY])) is UnknownKey


@pytest.mark.parametrize("order", [[1, 0, 2], [0, 2, 1], [0, 0, 1, 2], [1, 2], [0, 2], [0, 1, 2, 2]])
def test_frames_out_of_order(order: list[int]) -> None:
    error = refused(opened, HEADER, [FRAMES[item] for item in order])
    # Before any frame has opened, a frame that does not open is a matter of the key.
    assert type(error) is (OpenFailed if order[0] == 0 else UnknownKey)


@pytest.mark.parametrize(
    "header",
    [
        "",
        HEADER[:-1],
        HEADER[:-2],
        HEADER + "0",
        HEADER + "00",
        HEADER + "\n",
        "A" + HEADER[1:],
        "0x" + HEADER[2:],
        "g" + HEADER[1:],
        " " + HEADER[1:],
        "é" + HEADER[1:],
        "٣" + HEADER[1:],
    ],
    # Named by hand: HEADER is a fresh key, and parallel runs need the same names in every process.
    ids=[
        "empty",
        "a digit short",
        "a byte short",
        "a digit long",
        "a byte long",
        "newline",
        "uppercase",
        "prefix 0x",
        "no hex digit",
        "space",
        "Latin letter",
        "Arabic digit",
    ],
)
def test_a_bad_header(header: str) -> None:
    assert type(refused(RequestOpener, header, (KEY,))) is MalformedMessage


def test_a_small_order_key_in_the_header() -> None:
    assert type(refused(RequestOpener, "00" * 32, (KEY,))) is MalformedMessage


@pytest.mark.parametrize("length", range(1, 16))
def test_a_frame_shorter_than_its_tag(length: int) -> None:
    assert type(refused(opened, HEADER, [framed(bytes(length))])) is MalformedMessage
    assert type(refused(RequestOpener(HEADER, (KEY,)).feed, length.to_bytes(4, "big"))) is MalformedMessage


# Keys.


def test_a_stale_key() -> None:
    header, context = sender(OTHER)
    body = framed(context.seal(b"sealed to a key that is gone"))
    assert type(refused(opened, header, [body])) is UnknownKey
    assert type(refused(RequestOpener, header, ())) is UnknownKey


@pytest.mark.parametrize("keys", [(KEY, OTHER), (OTHER, KEY)], ids=["newest", "previous"])
def test_of_two_keys_the_one_that_fits(keys: tuple[PrivateKey, ...]) -> None:
    for data in ([BODY], one_by_one(BODY)):
        opener = RequestOpener(HEADER, keys)
        for piece in data:
            opener.feed(piece)
        plain, sealer = opener.finish()
        assert plain == b"firstsecondthird"
        response = ehbp.response_sequence(SECRET, unhex(HEADER), sealer.nonce)
        assert response.open(sealer.frame(b"answer")[4:]) == b"answer"
    assert type(refused(opened, HEADER, [FRAMES[1]], keys)) is UnknownKey


def test_the_first_frame_decides() -> None:
    """A second frame from another context is not tried with the other key."""
    _, other = sender(OTHER)
    body = FRAMES[0] + framed(other.seal(b"x"))
    assert type(refused(opened, HEADER, [body], (KEY, OTHER))) is OpenFailed


# Responses.


def test_a_response_opens_for_its_own_request_only() -> None:
    headers = []
    sealers = []
    for _ in range(2):
        header, context = sender()
        opener = RequestOpener(header, (KEY,))
        opener.feed(framed(context.seal(b"ask")))
        sealers.append(opener.finish()[1])
        headers.append((context.export(b"ehbp response", 32), unhex(header)))
    sealed = sealers[0].frame(b"answer")[4:]
    assert ehbp.response_sequence(*headers[0], sealers[0].nonce).open(sealed) == b"answer"
    assert type(refused(ehbp.response_sequence(*headers[1], sealers[0].nonce).open, sealed)) is OpenFailed
    assert type(refused(ehbp.response_sequence(*headers[0], sealers[1].nonce).open, sealed)) is OpenFailed


def test_a_response_frame_has_a_byte() -> None:
    sealer = ResponseSealer(bytes(32), bytes(32))
    assert len(sealer.nonce) == 32
    assert sealer.nonce != ResponseSealer(bytes(32), bytes(32)).nonce
    assert type(refused(sealer.frame, b"")) is ExchangeMisuse


# Limits, and use after an end.


@pytest.mark.parametrize("length", [0x02000011, 0x04000001, 0xFFFFFFFF])
def test_a_huge_frame_is_refused_at_its_length(length: int) -> None:
    opener = RequestOpener(HEADER, (KEY,))
    opener.feed(length.to_bytes(4, "big")[:3])
    assert type(refused(opener.feed, length.to_bytes(4, "big")[3:])) is MessageTooLarge


def test_limits() -> None:
    plain = b"firstsecondthird"
    within = [
        Limits(message=len(plain)),
        Limits(frame=len(FRAMES[1]) - 4),
        Limits(chunks=3),
    ]
    beyond = [
        Limits(message=len(plain) - 1),
        Limits(message=4),
        Limits(frame=len(FRAMES[1]) - 5),
        Limits(chunks=2),
    ]
    for data in ([BODY], one_by_one(BODY)):
        for limits in within:
            assert opened(HEADER, data, (KEY,), limits) == plain
        for limits in beyond:
            assert type(refused(opened, HEADER, data, (KEY,), limits)) is MessageTooLarge
    assert type(refused(opened, HEADER, [BODY + bytes(4)], (KEY,), Limits(chunks=3))) is MessageTooLarge


def test_use_after_the_end_or_an_error() -> None:
    ended = RequestOpener(HEADER, (KEY,))
    ended.feed(BODY)
    ended.finish()
    failed = RequestOpener(HEADER, (KEY,))
    refused(failed.feed, framed(bytes(20)))
    cut = RequestOpener(HEADER, (KEY,))
    cut.feed(BODY[:-1])
    refused(cut.finish)
    for opener in (ended, failed, cut):
        assert type(refused(opener.feed, BODY)) is ExchangeMisuse
        assert type(refused(opener.finish)) is ExchangeMisuse


# Arbitrary bytes.


@SLOW_FUZZ
@given(st.lists(st.binary(max_size=100), max_size=6), cuts())
def test_round_trip(parts: list[bytes], where: list[int]) -> None:
    header, context = sender()
    body = b"".join(framed(context.seal(part)) for part in parts)
    if parts:
        assert opened(header, pieces(body, where), (OTHER, KEY)) == b"".join(parts)
    else:
        refused(opened, header, [body])


@FUZZ
@given(st.binary(max_size=100), cuts(100))
def test_only_our_errors_escape_from_any_bytes(data: bytes, where: list[int]) -> None:
    refused(opened, HEADER, pieces(data, where))


@FUZZ
@given(st.text(max_size=70))
def test_only_our_errors_escape_from_any_header(header: str) -> None:
    refused(RequestOpener, header, (KEY,))


@FUZZ
@given(mutations(), cuts(120))
def test_a_changed_body_never_opens_as_another(edits: list[tuple[str, float, int]], where: list[int]) -> None:
    """What opens is a prefix of the frames that were sent, whatever was done to the body."""
    changed = mutate(BODY, edits)
    try:
        got = opened(HEADER, pieces(changed, where))
    except ChannelError:
        assert changed != BODY
    else:
        assert got in (b"first", b"firstsecond", b"firstsecondthird")
