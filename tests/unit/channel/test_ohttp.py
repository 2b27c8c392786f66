"""Oblivious HTTP, whole (RFC 9458) and chunked (draft-ietf-ohai-chunked-ohttp-08)."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import pyhpke
import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF, HKDFExpand
from hypothesis import given
from hypothesis import strategies as st

from adytum.inference.channel import hpke, ohttp, varint
from adytum.inference.channel.errors import (
    ChannelError,
    ExchangeMisuse,
    MalformedMessage,
    MessageTooLarge,
    OpenFailed,
    TruncatedMessage,
    UnknownKey,
)
from adytum.inference.channel.hpke import ENC_LENGTH, TAG_LENGTH, AeadId, KdfId, KemId, Suite
from adytum.inference.channel.keyconfig import KeyConfiguration
from adytum.inference.channel.limits import Limits
from adytum.inference.channel.ohttp import (
    HEADER_LENGTH,
    Media,
    RequestOpener,
    RequestSealer,
    ResponseOpener,
    ResponseSealer,
)
from tests.unit.channel.support import (
    ALL_PAIRS,
    KEMS,
    MEDIA,
    SLOW_FUZZ,
    configuration,
    cuts,
    flips,
    held,
    mutate,
    mutations,
    one_by_one,
    pieces,
    recipient,
    refused,
    unhex,
    wire_vector,
)

VECTORS = (("rfc9458.json", ohttp.WHOLE), ("chunked-ohttp.json", ohttp.CHUNKED))
PARTS = [b"first", b"second", b"third and longest"]


@dataclass
class Session:
    """A sealed request and the objects of its two ends."""

    request: bytes
    sealer: RequestSealer
    received: bytes
    response: ResponseSealer


def seal(sealer: RequestSealer | ResponseSealer, media: Media, parts: list[bytes], last: bytes = b"") -> bytes:
    """`parts` and `last` sealed in the form of `media`."""
    if not media.chunked:
        return sealer.whole(b"".join(parts) + last)
    return sealer.start() + b"".join(map(sealer.chunk, parts)) + sealer.final(last)


def open_request(
    media: Media, data: Iterable[bytes], keys: ohttp.Keys, limits: Limits | None = None
) -> tuple[bytes, ResponseSealer]:
    opener = RequestOpener(media, keys, limits or Limits())
    for piece in data:
        opener.feed(piece)
    return opener.finish()


def open_response(opener: ResponseOpener, data: Iterable[bytes]) -> bytes:
    return b"".join([opener.feed(piece) for piece in data]) + opener.finish()


def session(media: Media, kem: KemId = KemId.X25519, parts: list[bytes] = PARTS) -> Session:
    sealer = RequestSealer(media, configuration(kem))
    request = seal(sealer, media, parts)
    received, response = open_request(media, [request], held(configuration(kem)))
    return Session(request, sealer, received, response)


def chunks(framed: bytes) -> list[bytes]:
    """The chunks of a chunked body, each with the length that precedes it, the last with its zero."""
    found: list[bytes] = []
    at = 0
    while True:
        decoded = varint.decode(framed, at)
        assert decoded is not None
        length, start = decoded
        end = start + length if length else len(framed)
        found.append(framed[at:end])
        at = end
        if not length:
            return found


# The published examples, both directions.


@pytest.mark.parametrize(("name", "media"), VECTORS)
def test_vector(name: str, media: Media) -> None:
    vector = wire_vector(name)
    decoded = KeyConfiguration.decode(unhex(vector["key_configuration"]))
    assert decoded is not None
    key = hpke.X25519Key.from_bytes(unhex(vector["gateway_secret_key"]))
    assert key.public_bytes == decoded.public_key
    ephemeral = X25519PrivateKey.from_private_bytes(unhex(vector["client_ephemeral_secret_key"]))
    request, answer = unhex(vector["binary_http_request"]), unhex(vector["binary_http_response"])
    sealed, sealed_answer = unhex(vector["encapsulated_request"]), unhex(vector["encapsulated_response"])

    sealer = RequestSealer(media, decoded, ephemeral=ephemeral)
    # The draft divides its request after 12 bytes and its response after 1, and ends both with an empty chunk.
    assert seal(sealer, media, [request[:12], request[12:]]) == sealed
    assert sealer.enc == unhex(vector["enc"])
    for data in ([sealed], one_by_one(sealed)):
        opener = RequestOpener(media, lambda _: (decoded, key))
        for piece in data:
            opener.feed(piece)
        assert opener.finish()[0] == request
        assert opener.enc == unhex(vector["enc"])
        assert opener._response is not None
    response = ResponseSealer(opener._response, unhex(vector["response_nonce"]))
    assert seal(response, media, [answer[:1], answer[1:]]) == sealed_answer
    for data in ([sealed_answer], one_by_one(sealed_answer)):
        assert open_response(sealer.response(), data) == answer


def test_the_whole_vectors_intermediate_values() -> None:
    vector = wire_vector("rfc9458.json")
    key = hpke.X25519Key.from_bytes(unhex(vector["gateway_secret_key"]))
    suite = Suite(KemId.X25519, KdfId.HKDF_SHA256, AeadId.AES_128_GCM)
    info = ohttp._info(ohttp.WHOLE, unhex(vector["encapsulated_request"])[:HEADER_LENGTH])
    assert info == unhex(vector["info"])
    context = hpke.setup_recipient(suite, key, unhex(vector["enc"]), info)
    keys = ohttp._ResponseKeys(ohttp.WHOLE, suite, unhex(vector["enc"]), context)
    assert keys.nonce_length == 16
    assert keys._secret == unhex(vector["exported_secret"])
    prk = hpke.extract(unhex(vector["enc"]) + unhex(vector["response_nonce"]), keys._secret)
    assert prk == unhex(vector["prk"])
    assert hpke.expand(prk, b"key", 16) == unhex(vector["response_key"])
    assert hpke.expand(prk, b"nonce", 12) == unhex(vector["response_base_nonce"])


# A second implementation, spelled out from RFC 9458, 4.3 and 4.4, and draft -08, 6, over pyhpke and the library's HKDF.

LABELS = {
    "message/ohttp-req": (b"message/bhttp request", b"message/bhttp response"),
    "message/ohttp-chunked-req": (b"message/bhttp chunked request", b"message/bhttp chunked response"),
}


@pytest.mark.parametrize("media", MEDIA, ids=lambda m: m.request)
def test_a_client_on_other_primitives(media: Media) -> None:
    offered = KeyConfiguration(9, KemId.X25519, recipient(KemId.X25519).public_bytes)
    request_label, response_label = LABELS[media.request]
    chunked = media.request == "message/ohttp-chunked-req"
    header = unhex("09 0020 0001 0002")
    suite = pyhpke.CipherSuite.new(
        pyhpke.KEMId.DHKEM_X25519_HKDF_SHA256, pyhpke.KDFId.HKDF_SHA256, pyhpke.AEADId.AES256_GCM
    )
    public = pyhpke.KEMKey.from_pyca_cryptography_key(X25519PublicKey.from_public_bytes(offered.public_key))
    enc, context = suite.create_sender_context(public, info=request_label + b"\x00" + header)
    request = header + enc
    if chunked:
        request += b"\x18" + context.seal(b"question", b"") + b"\x00" + context.seal(b"?", b"final")
    else:
        request += context.seal(b"question?", b"")

    received, response = open_request(media, [request], held(offered))
    assert received == b"question?"
    answer = response.start() + response.chunk(b"ans") + response.final(b"wer") if chunked else b""
    answer = answer or response.whole(b"answer")

    nonce, sealed = answer[:32], answer[32:]
    prk = HKDF.extract(hashes.SHA256(), enc + nonce, context.export(response_label, 32))
    key = AESGCM(HKDFExpand(hashes.SHA256(), 32, b"key").derive(prk))
    base = int.from_bytes(HKDFExpand(hashes.SHA256(), 12, b"nonce").derive(prk), "big")
    if not chunked:
        assert key.decrypt(base.to_bytes(12, "big"), sealed, b"") == b"answer"
        return
    assert sealed[:1] == b"\x13"
    assert key.decrypt(base.to_bytes(12, "big"), sealed[1:20], b"") == b"ans"
    assert sealed[20:21] == b"\x00"
    assert key.decrypt((base ^ 1).to_bytes(12, "big"), sealed[21:], b"final") == b"wer"


def test_media_types() -> None:
    assert [(media.request, media.response, media.chunked) for media in MEDIA] == [
        ("message/ohttp-req", "message/ohttp-res", False),
        ("message/ohttp-chunked-req", "message/ohttp-chunked-res", True),
    ]


# Round trips.


@pytest.mark.parametrize("media", MEDIA, ids=lambda m: m.request)
@pytest.mark.parametrize("kem", KEMS)
@pytest.mark.parametrize("pair", ALL_PAIRS, ids=lambda p: p[1].name)
def test_every_suite(media: Media, kem: KemId, pair: tuple[KdfId, AeadId]) -> None:
    offered = KeyConfiguration(7, kem, recipient(kem).public_bytes, (pair,))
    sealer = RequestSealer(media, offered)
    request = seal(sealer, media, PARTS, b"end")
    assert request[:HEADER_LENGTH] == b"\x07" + Suite(kem, *pair).wire
    received, response = open_request(media, one_by_one(request), held(offered))
    assert received == b"".join(PARTS) + b"end"
    # The nonce is as long as the longer of key and nonce (RFC 9458, 4.4).
    sealed = seal(response, media, PARTS, b"end")
    nonce_length = max(hpke.key_length(pair[1]), 12)
    overhead = TAG_LENGTH if not media.chunked else (TAG_LENGTH + 1) * 4
    assert len(sealed) == nonce_length + len(received) + overhead
    assert open_response(sealer.response(), one_by_one(sealed)) == received


@SLOW_FUZZ
@given(
    st.sampled_from(MEDIA),
    st.lists(st.binary(min_size=1, max_size=100), max_size=5),
    st.binary(max_size=40),
    cuts(),
)
def test_round_trip(media: Media, parts: list[bytes], last: bytes, where: list[int]) -> None:
    message = b"".join(parts) + last
    sealer = RequestSealer(media, configuration(KemId.X25519))
    request = seal(sealer, media, parts, last)
    received, response = open_request(media, pieces(request, where), held(configuration(KemId.X25519)))
    assert received == message
    assert open_response(sealer.response(), pieces(seal(response, media, parts, last), where)) == message


def test_a_final_chunk_is_empty_unless_it_is_told_otherwise() -> None:
    sealer = RequestSealer(ohttp.CHUNKED, configuration(KemId.X25519))
    received, response = open_request(
        ohttp.CHUNKED, [sealer.start() + sealer.chunk(b"a") + sealer.final()], held(configuration(KemId.X25519))
    )
    assert received == b"a"
    answer = response.start() + response.chunk(b"b") + response.final()
    assert open_response(sealer.response(), [answer]) == b"b"


@pytest.mark.parametrize("media", MEDIA, ids=lambda m: m.request)
def test_an_ephemeral_key_is_used_as_given(media: Media) -> None:
    ephemeral = X25519PrivateKey.from_private_bytes(bytes(range(32, 64)))
    sealer = RequestSealer(media, configuration(KemId.X25519), ephemeral=ephemeral)
    assert sealer.enc == ephemeral.public_key().public_bytes_raw()
    again = RequestSealer(media, configuration(KemId.X25519), ephemeral=ephemeral)
    assert seal(again, media, PARTS) == seal(sealer, media, PARTS)


@pytest.mark.parametrize("media", MEDIA, ids=lambda m: m.request)
def test_nothing_repeats(media: Media) -> None:
    first, second = session(media), session(media)
    assert first.sealer.enc != second.sealer.enc
    answers = [seal(item.response, media, PARTS) for item in (first, second)]
    assert answers[0][:32] != answers[1][:32]


def test_a_plaintext_is_given_as_soon_as_its_chunk_is_complete() -> None:
    s = session(ohttp.CHUNKED)
    opener = s.sealer.response()
    assert opener.feed(s.response.start()) == b""
    for part in PARTS:
        framed = s.response.chunk(part)
        assert opener.feed(framed[:-1]) == b""
        assert opener.feed(framed[-1:]) == part
    assert opener.feed(s.response.final(b"last")) == b""
    assert opener.finish() == b"last"


def test_longer_length_forms_are_valid() -> None:
    s = session(ohttp.CHUNKED)

    def lengthen(framed: bytes) -> bytes:
        length, start = varint.decode(framed, 0) or (0, 0)
        return (length | 0b10 << 30).to_bytes(4, "big") + framed[start:]

    sealed = seal(s.response, ohttp.CHUNKED, PARTS)
    longer = sealed[:32] + b"".join(map(lengthen, chunks(sealed[32:])))
    assert len(longer) == len(sealed) + 4 * 3
    for data in ([longer], one_by_one(longer)):
        assert open_response(s.sealer.response(), data) == b"".join(PARTS)


def test_a_chunk_of_the_size_that_every_receiver_takes() -> None:
    s = session(ohttp.CHUNKED, parts=[bytes(16_384)])
    assert s.received == bytes(16_384)
    assert open_response(s.sealer.response(), [seal(s.response, ohttp.CHUNKED, [], bytes(16_384))]) == bytes(16_384)


# Truncated at every offset: never a silent success.


@pytest.mark.parametrize("media", MEDIA, ids=lambda m: m.request)
@pytest.mark.parametrize("kem", KEMS)
def test_a_cut_request(media: Media, kem: KemId) -> None:
    request = session(media, kem).request
    step = 1 if kem is KemId.X25519 else 7
    ends = sorted({*range(0, len(request), step), *range(len(request) - 60, len(request))})
    for end in ends:
        error = refused(open_request, media, [request[:end]], held(configuration(kem)))
        # Inside the last ciphertext a truncation looks like a modification. Before it, it is reported as a truncation.
        last = len(request) - (TAG_LENGTH if media.chunked else len(b"".join(PARTS)) + TAG_LENGTH)
        if end < last + TAG_LENGTH:
            assert type(error) is TruncatedMessage
        else:
            assert type(error) is OpenFailed


@pytest.mark.parametrize("media", MEDIA, ids=lambda m: m.request)
def test_a_cut_response(media: Media) -> None:
    s = session(media)
    sealed = seal(s.response, media, PARTS, b"the last")
    message = b"".join(PARTS) + b"the last"
    prefixes = [b"".join(PARTS[:count]) for count in range(len(PARTS) + 1)] if media.chunked else [b""]
    for end in range(len(sealed)):
        for data in ([sealed[:end]], one_by_one(sealed[:end])):
            opener = s.sealer.response()
            got = b"".join([opener.feed(piece) for piece in data])
            assert got in prefixes
            # Once the final chunk, or the one ciphertext, is as long as a tag, a truncation looks like a modification.
            last = len(sealed) - len(b"the last") - TAG_LENGTH if media.chunked else 32
            assert type(refused(opener.finish)) is (TruncatedMessage if end < last + TAG_LENGTH else OpenFailed)
            misused(opener.feed, sealed[end:])
            misused(opener.finish)
    assert open_response(s.sealer.response(), [sealed]) == message


def test_a_stream_without_its_end_is_cut() -> None:
    s = session(ohttp.CHUNKED)
    opener = s.sealer.response()
    sealed = s.response.start() + s.response.chunk(b"half") + s.response.chunk(b" of it")
    assert opener.feed(sealed) == b"half of it"
    assert type(refused(opener.finish)) is TruncatedMessage


# One changed bit anywhere.


@pytest.mark.parametrize("media", MEDIA, ids=lambda m: m.request)
@pytest.mark.parametrize("lookup", ["by identifier", "whatever the identifier"])
def test_every_flipped_bit_of_a_request(media: Media, lookup: str) -> None:
    offered = configuration(KemId.X25519)
    keys: ohttp.Keys = held(offered) if lookup == "by identifier" else lambda _: (offered, recipient(offered.kem))
    request = session(media, parts=[b"abc", b"de"]).request
    for _, changed in flips(request):
        refused(open_request, media, [changed], keys)
    assert open_request(media, [request], keys)[0] == b"abcde"


@pytest.mark.slow
@pytest.mark.parametrize("media", MEDIA, ids=lambda m: m.request)
def test_every_flipped_bit_of_an_x_wing_request(media: Media) -> None:
    offered = configuration(KemId.MLKEM768_X25519)
    request = session(media, offered.kem, [b"a"]).request
    for _, changed in flips(request):
        refused(open_request, media, [changed], held(offered))
    assert open_request(media, [request], held(offered))[0] == b"a"


@pytest.mark.parametrize("media", MEDIA, ids=lambda m: m.request)
def test_every_flipped_bit_of_a_response(media: Media) -> None:
    s = session(media)
    parts = [b"abc", b"de", b"f"]
    sealed = seal(s.response, media, parts, b"gh")
    # The offset of each chunk, and all plaintext before it.
    starts = [(0, b"")]
    if media.chunked:
        at = 32
        for count, chunk in enumerate(chunks(sealed[32:])):
            starts.append((at, b"".join(parts[:count])))
            at += len(chunk)
    for offset, changed in flips(sealed):
        allowed = [plain for start, plain in starts if start <= offset][-1]
        for data in ([changed], one_by_one(changed)):
            opener = s.sealer.response()
            got = b""
            failed = False
            try:
                for piece in data:
                    got += opener.feed(piece)
                got += opener.finish()
            except ChannelError:
                failed = True
            assert failed
            # In one piece, an error also discards the chunks before it. Byte by byte, those were already returned.
            assert got == allowed or (len(data) == 1 and got == b"")
            assert type(refused(opener.feed, b"")) is ExchangeMisuse
            assert type(refused(opener.finish)) is ExchangeMisuse
    assert open_response(s.sealer.response(), [sealed]) == b"abcdefgh"


# Bytes after the end.


@pytest.mark.parametrize("media", MEDIA, ids=lambda m: m.request)
def test_trailing_bytes(media: Media) -> None:
    s = session(media)
    sealed = seal(s.response, media, PARTS)
    for extra in (b"\x00", bytes(16), bytes(100), s.request, sealed):
        assert type(refused(open_request, media, [s.request, extra], held(configuration(KemId.X25519)))) is OpenFailed
        assert type(refused(open_response, s.sealer.response(), [sealed, extra])) is OpenFailed


# Chunks out of order.


def rearranged(count: int) -> list[tuple[str, list[int]]]:
    """Wrong orders of `count` chunks, each with the last chunk at its end."""
    last = count - 1
    return [
        ("swapped", [1, 0, *range(2, count)]),
        ("swapped later", [0, 2, 1, *range(3, count)]),
        ("repeated", [0, 0, *range(1, count)]),
        ("repeated at the end", [*range(last), last - 1, last]),
        ("dropped first", [*range(1, count)]),
        ("dropped before the last", [*range(last - 1), last]),
        ("all dropped but the last", [last]),
    ]


@pytest.mark.parametrize(("name", "order"), rearranged(4))
def test_chunks_out_of_order(name: str, order: list[int]) -> None:
    s = session(ohttp.CHUNKED)
    sealed = seal(s.response, ohttp.CHUNKED, PARTS)
    for head, body, opened in (
        (
            s.request[: HEADER_LENGTH + 32],
            s.request[HEADER_LENGTH + 32 :],
            lambda data: open_request(ohttp.CHUNKED, [data], held(configuration(KemId.X25519))),
        ),
        (sealed[:32], sealed[32:], lambda data: open_response(s.sealer.response(), [data])),
    ):
        parts = chunks(body)
        assert len(parts) == 4
        assert order != [0, 1, 2, 3]
        assert type(refused(opened, head + b"".join(parts[item] for item in order))) is OpenFailed
        opened(head + body)


def test_the_final_mark_is_authenticated() -> None:
    """A chunk cannot be made the last one by its framing, nor the last one an ordinary chunk."""
    s = session(ohttp.CHUNKED)
    nonce, first, second = s.response.start(), s.response.chunk(b"first"), s.response.chunk(b"second")
    final = s.response.final(b"last")
    # An ordinary chunk in the place of the last one.
    assert type(refused(open_response, s.sealer.response(), [nonce + first + b"\x00" + second[1:]])) is OpenFailed
    assert type(refused(open_response, s.sealer.response(), [nonce + b"\x00" + first[1:]])) is OpenFailed
    # The last one in the place of an ordinary chunk, with and without an end after it.
    framed = varint.encode(len(final) - 1) + final[1:]
    for end in (b"", b"\x00", final):
        opener = s.sealer.response()
        assert opener.feed(nonce + first + second) == b"firstsecond"
        assert type(refused(opener.feed, framed + end)) is OpenFailed


@pytest.mark.parametrize("aad", [b"", b"FINAL", b"final\x00", b"fina"])
def test_only_the_right_final_aad_opens(aad: bytes) -> None:
    offered = configuration(KemId.X25519)
    sealer = RequestSealer(ohttp.CHUNKED, offered)
    start, chunk = sealer.start(), sealer.chunk(b"one")
    data = start + chunk + b"\x00" + sealer._context.seal(b"end", aad)
    assert type(refused(open_request, ohttp.CHUNKED, [data], held(offered))) is OpenFailed


def test_an_ordinary_chunk_with_the_final_aad_is_refused() -> None:
    offered = configuration(KemId.X25519)
    sealer = RequestSealer(ohttp.CHUNKED, offered)
    sealed = sealer._context.seal(b"one", b"final")
    data = sealer.start() + varint.encode(len(sealed)) + sealed + sealer.final()
    assert type(refused(open_request, ohttp.CHUNKED, [data], held(offered))) is OpenFailed


def test_an_empty_chunk_that_is_not_final_is_refused() -> None:
    offered = configuration(KemId.X25519)
    sealer = RequestSealer(ohttp.CHUNKED, offered)
    sealed = sealer._context.seal(b"")
    data = sealer.start() + varint.encode(len(sealed)) + sealed + sealer.final()
    assert type(refused(open_request, ohttp.CHUNKED, [data], held(offered))) is MalformedMessage
    for length in range(1, TAG_LENGTH):
        short = sealer.start() + varint.encode(length) + bytes(length)
        assert type(refused(open_request, ohttp.CHUNKED, [short], held(offered))) is MalformedMessage


# One form, one session, one direction.


@pytest.mark.parametrize("media", MEDIA, ids=lambda m: m.request)
def test_the_two_forms_do_not_open_each_other(media: Media) -> None:
    other = next(item for item in MEDIA if item is not media)
    s = session(media)
    refused(open_request, other, [s.request], held(configuration(KemId.X25519)))
    # Even with the same framing the labels differ.
    offered = configuration(KemId.X25519)
    relabelled = Media(media.request, media.response, other.request_label, media.response_label, media.chunked)
    assert type(refused(open_request, relabelled, [s.request], held(offered))) is OpenFailed
    sealed = seal(s.response, media, PARTS)
    keys = ohttp._ResponseKeys(
        Media(media.request, media.response, media.request_label, other.response_label, media.chunked),
        offered.suite,
        s.sealer.enc,
        s.sealer._context,
    )
    assert type(refused(open_response, ResponseOpener(media, keys), [sealed])) is OpenFailed


@pytest.mark.parametrize("media", MEDIA, ids=lambda m: m.request)
@pytest.mark.parametrize("kem", KEMS)
def test_a_response_opens_for_its_own_request_only(media: Media, kem: KemId) -> None:
    mine, other = session(media, kem), session(media, kem)
    sealed = seal(mine.response, media, PARTS)
    assert type(refused(open_response, other.sealer.response(), [sealed])) is OpenFailed
    assert open_response(mine.sealer.response(), [sealed]) == b"".join(PARTS)


@pytest.mark.parametrize("media", MEDIA, ids=lambda m: m.request)
def test_the_same_request_sealed_twice_gets_two_responses(media: Media) -> None:
    """The nonce is fresh, so even a replayed request, which the gateway refuses, would get other response keys."""
    s = session(media)
    _, again = open_request(media, [s.request], held(configuration(KemId.X25519)))
    first, second = seal(s.response, media, [b"a"]), seal(again, media, [b"a"])
    assert first[32:] != second[32:]
    mixed = first[:32] + second[32:]
    assert type(refused(open_response, s.sealer.response(), [mixed])) is OpenFailed


@pytest.mark.parametrize("media", MEDIA, ids=lambda m: m.request)
def test_a_request_is_no_response(media: Media) -> None:
    s = session(media)
    refused(open_response, s.sealer.response(), [s.request])
    refused(open_request, media, [seal(s.response, media, PARTS)], held(configuration(KemId.X25519)))


# Keys.


@pytest.mark.parametrize("media", MEDIA, ids=lambda m: m.request)
def test_unknown_keys_and_suites(media: Media) -> None:
    request = session(media).request
    offered = configuration(KemId.X25519)
    other_id = KeyConfiguration(8, offered.kem, offered.public_key, offered.symmetric)
    assert type(refused(open_request, media, [request], held(other_id))) is UnknownKey
    narrow = KeyConfiguration(7, offered.kem, offered.public_key, ((KdfId.HKDF_SHA256, AeadId.AES_128_GCM),))
    assert type(refused(open_request, media, [request], held(narrow))) is UnknownKey
    # It is refused as soon as the header is complete, before any key operation.
    assert type(refused(RequestOpener(media, held(other_id)).feed, request[:HEADER_LENGTH])) is UnknownKey
    x_wing = configuration(KemId.MLKEM768_X25519)
    assert type(refused(open_request, media, [request], held(x_wing))) is UnknownKey
    assert type(refused(open_request, media, [b"\x07" + unhex("ffff00010002"), bytes(99)], held(offered))) is UnknownKey


@pytest.mark.parametrize("media", MEDIA, ids=lambda m: m.request)
@pytest.mark.parametrize("kem", KEMS)
def test_sealed_to_another_key(media: Media, kem: KemId) -> None:
    sealer = RequestSealer(media, KeyConfiguration(7, kem, hpke.generate(kem).public_bytes, ALL_PAIRS))
    assert type(refused(open_request, media, [seal(sealer, media, PARTS)], held(configuration(kem)))) is OpenFailed


@pytest.mark.parametrize("media", MEDIA, ids=lambda m: m.request)
def test_a_small_order_encapsulated_key(media: Media) -> None:
    offered = configuration(KemId.X25519)
    request = b"\x07" + offered.suite.wire + bytes(32) + bytes(40)
    assert type(refused(open_request, media, [request], held(offered))) is MalformedMessage


# Out of order.


def misused(call: Callable[..., Any], *arguments: Any) -> None:
    assert type(refused(call, *arguments)) is ExchangeMisuse


@pytest.mark.parametrize("media", MEDIA, ids=lambda m: m.request)
def test_a_request_opener_after_its_end(media: Media) -> None:
    opener = RequestOpener(media, held(configuration(KemId.X25519)))
    opener.feed(session(media).request)
    opener.finish()
    misused(opener.feed, b"")
    misused(opener.finish)


@pytest.mark.parametrize("media", MEDIA, ids=lambda m: m.request)
def test_a_request_opener_after_an_error(media: Media) -> None:
    opener = RequestOpener(media, held(configuration(KemId.X25519)))
    refused(opener.feed, b"\x08" + bytes(50))
    misused(opener.feed, session(media).request)
    misused(opener.finish)
    cut = RequestOpener(media, held(configuration(KemId.X25519)))
    refused(cut.finish)
    misused(cut.feed, session(media).request)
    misused(cut.finish)


@pytest.mark.parametrize("media", MEDIA, ids=lambda m: m.request)
@pytest.mark.parametrize("kem", KEMS)
def test_a_request_opener_at_the_end_of_the_header(media: Media, kem: KemId) -> None:
    """With the last byte of the encapsulated key, and not before, the request can be answered."""
    offered = configuration(kem)
    sealer = RequestSealer(media, offered)
    start = sealer.start()
    opener = RequestOpener(media, held(offered))
    opener.feed(start[:-1])
    assert opener.enc == b""
    with pytest.raises(TruncatedMessage):
        _ = opener.configuration
    opener.feed(start[-1:])
    assert opener.enc == sealer.enc
    assert opener.configuration == offered
    assert opener.opened == b""
    answer = seal(opener.abandon(), media, PARTS)
    assert open_response(sealer.response(), [answer]) == b"".join(PARTS)
    misused(opener.feed, b"")
    misused(opener.finish)


@pytest.mark.parametrize("media", MEDIA, ids=lambda m: m.request)
def test_a_response_opener_after_its_end(media: Media) -> None:
    s = session(media)
    opener = s.sealer.response()
    open_response(opener, [seal(s.response, media, PARTS)])
    misused(opener.feed, b"")
    misused(opener.finish)


def test_a_response_sealer_out_of_order() -> None:
    fresh = session(ohttp.CHUNKED).response
    misused(fresh.chunk, b"before the start")
    misused(fresh.final)
    fresh.start()
    misused(fresh.start)
    misused(fresh.whole, b"after the start")
    misused(fresh.chunk, b"")
    fresh.chunk(b"fine")
    fresh.final()
    for call in (fresh.start, lambda: fresh.chunk(b"x"), fresh.final, lambda: fresh.whole(b"x")):
        misused(call)


def test_a_whole_response_is_sealed_once() -> None:
    sealer = session(ohttp.WHOLE).response
    sealer.whole(b"answer")
    for call in (sealer.start, lambda: sealer.chunk(b"x"), sealer.final, lambda: sealer.whole(b"x")):
        misused(call)


@pytest.mark.parametrize("media", MEDIA, ids=lambda m: m.request)
def test_a_request_is_sealed_once(media: Media) -> None:
    sealer = session(media).sealer
    for call in (lambda: sealer.whole(b"x"), lambda: sealer.chunk(b"x"), sealer.final):
        misused(call)
    misused(RequestSealer(ohttp.CHUNKED, configuration(KemId.X25519)).chunk, b"")


# Limits.


def at_once(limits: Limits, media: Media, parts: list[bytes], last: bytes = b"") -> None:
    """Both directions, in one piece and byte by byte."""
    s = session(media)
    sealer = RequestSealer(media, configuration(KemId.X25519))
    request = seal(sealer, media, parts, last)
    sealed = seal(s.response, media, parts, last)
    for data in ([request], one_by_one(request)):
        assert open_request(media, data, held(configuration(KemId.X25519)), limits)[0] == b"".join(parts) + last
    for data in ([sealed], one_by_one(sealed)):
        assert open_response(s.sealer.response(limits), data) == b"".join(parts) + last


def over(limits: Limits, media: Media, parts: list[bytes], last: bytes = b"") -> None:
    """Too large in both directions, in one piece and byte by byte, and within the default limits."""
    at_once(Limits(), media, parts, last)
    s = session(media)
    sealer = RequestSealer(media, configuration(KemId.X25519))
    request = seal(sealer, media, parts, last)
    sealed = seal(s.response, media, parts, last)
    for data in ([request], one_by_one(request)):
        error = refused(open_request, media, data, held(configuration(KemId.X25519)), limits)
        assert type(error) is MessageTooLarge
    for data in ([sealed], one_by_one(sealed)):
        assert type(refused(open_response, s.sealer.response(limits), data)) is MessageTooLarge


def test_message_limit() -> None:
    for media in MEDIA:
        at_once(Limits(message=20), media, [bytes(20)])
        over(Limits(message=20), media, [bytes(21)])
    at_once(Limits(message=20), ohttp.CHUNKED, [bytes(7), bytes(7)], bytes(6))
    over(Limits(message=20), ohttp.CHUNKED, [bytes(7), bytes(7)], bytes(7))
    over(Limits(message=20), ohttp.CHUNKED, [bytes(7), bytes(7), bytes(7)])


def test_chunk_limit() -> None:
    at_once(Limits(chunk=9), ohttp.CHUNKED, [bytes(9)], bytes(9))
    over(Limits(chunk=9), ohttp.CHUNKED, [bytes(10)])
    over(Limits(chunk=9), ohttp.CHUNKED, [bytes(9)], bytes(10))


def test_chunk_count_limit() -> None:
    at_once(Limits(chunks=4), ohttp.CHUNKED, [b"x"] * 3)
    over(Limits(chunks=4), ohttp.CHUNKED, [b"x"] * 4)


@pytest.mark.parametrize("length", ["80100011", "bfffffff", "ffffffffffffffff", "c000000000100011"])
def test_a_huge_chunk_is_refused_at_its_length(length: str) -> None:
    s = session(ohttp.CHUNKED)
    head = s.request[: HEADER_LENGTH + ENC_LENGTH[KemId.X25519]]
    opener = RequestOpener(ohttp.CHUNKED, held(configuration(KemId.X25519)))
    assert type(refused(opener.feed, head + unhex(length))) is MessageTooLarge
    assert type(refused(s.sealer.response().feed, s.response.start() + unhex(length))) is MessageTooLarge


# Arbitrary and changed bytes: only our errors escape, whatever the split.


@SLOW_FUZZ
@given(st.sampled_from(MEDIA), st.booleans(), st.binary(max_size=200), cuts(200))
def test_only_our_errors_escape_from_any_request(media: Media, headed: bool, data: bytes, where: list[int]) -> None:
    if headed:
        data = b"\x07" + configuration(KemId.X25519).suite.wire + data
    refused(open_request, media, pieces(data, where), held(configuration(KemId.X25519)))


ANY_RESPONSE = {media: session(media) for media in MEDIA}


@SLOW_FUZZ
@given(st.sampled_from(MEDIA), st.binary(max_size=200), cuts(200))
def test_only_our_errors_escape_from_any_response(media: Media, data: bytes, where: list[int]) -> None:
    refused(open_response, ANY_RESPONSE[media].sealer.response(), pieces(data, where))


SEALED_RESPONSE = {media: seal(ANY_RESPONSE[media].response, media, PARTS, b"end") for media in MEDIA}


@SLOW_FUZZ
@given(st.sampled_from(MEDIA), mutations(), cuts())
def test_a_changed_request_never_opens(media: Media, edits: list[tuple[str, float, int]], where: list[int]) -> None:
    request = ANY_RESPONSE[media].request
    changed = mutate(request, edits)
    try:
        got, _ = open_request(media, pieces(changed, where), held(configuration(KemId.X25519)))
    except ChannelError:
        assert changed != request
    else:
        assert (changed, got) == (request, b"".join(PARTS))


@SLOW_FUZZ
@given(st.sampled_from(MEDIA), mutations(), cuts())
def test_a_changed_response_never_opens(media: Media, edits: list[tuple[str, float, int]], where: list[int]) -> None:
    sealed = SEALED_RESPONSE[media]
    changed = mutate(sealed, edits)
    try:
        got = open_response(ANY_RESPONSE[media].sealer.response(), pieces(changed, where))
    except ChannelError:
        assert changed != sealed
    else:
        assert (changed, got) == (sealed, b"".join(PARTS) + b"end")
