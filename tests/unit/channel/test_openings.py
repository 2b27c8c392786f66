"""Openings: from sealed bytes to an exchange, the header before the rest, and abandoning the rest."""

from dataclasses import FrozenInstanceError, asdict, replace

import pytest

from adytum.inference.channel import bhttp, ehbp, hpke, ohttp
from adytum.inference.channel.bhttp import Content, ResponseHead
from adytum.inference.channel.errors import (
    ExchangeMisuse,
    MalformedMessage,
    MessageTooLarge,
    OpenFailed,
    TruncatedMessage,
    UnknownKey,
)
from adytum.inference.channel.exchange import Exchange, InnerRequest
from adytum.inference.channel.hpke import KemId
from adytum.inference.channel.limits import DEFAULT_LIMITS, Limits
from adytum.inference.channel.openings import EhbpOpening, OhttpOpening
from adytum.inference.channel.padding import Padding, bucket
from tests.unit.channel.support import configuration, held, recipient, refused
from tests.unit.channel.test_exchange import ASK, BODY, JSON

OFFERED = configuration(KemId.X25519)
KEY = recipient(KemId.X25519)
ASKED = InnerRequest(ASK.method, ASK.path, ASK.fields, BODY)
MESSAGES = {"known length": bhttp.encode(ASK, BODY)}
MESSAGES["indeterminate length"] = (
    bhttp.encode_head(ASK) + bhttp.encode_content(BODY[:5]) + bhttp.encode_content(BODY[5:]) + bhttp.encode_end()
)


def opening(media: ohttp.Media, message: bytes, limits: Limits | None = None) -> OhttpOpening:
    sealer = ohttp.RequestSealer(media, OFFERED)
    request = sealer.start() + sealer.final(message) if media.chunked else sealer.whole(message)
    found = OhttpOpening(media, held(OFFERED), Padding.PAD, limits or Limits())
    found.feed(request)
    return found


@pytest.mark.parametrize("media", [ohttp.WHOLE, ohttp.CHUNKED], ids=lambda m: m.request)
@pytest.mark.parametrize("message", [b"", b"\x00", b"\x01\x40\xc8", b"\x09", bhttp.encode(ASK, BODY) + b"\x01"])
def test_a_bad_message_is_answered_inside_the_seal(media: ohttp.Media, message: bytes) -> None:
    exchange = opening(media, message).open()
    assert isinstance(refused(exchange.request), MalformedMessage)
    head, sealed = exchange.answer(400, JSON, b"{}")
    assert head.status == 200
    assert len(sealed) > bucket(1)


def test_limits_reach_the_message() -> None:
    exchange = opening(ohttp.CHUNKED, bhttp.encode(ASK, BODY), Limits(field_lines=1)).open()
    assert type(refused(exchange.request)) is MessageTooLarge


@pytest.mark.parametrize("media", [ohttp.WHOLE, ohttp.CHUNKED], ids=lambda m: m.request)
def test_nothing_opens_from_a_bad_request(media: ohttp.Media) -> None:
    nothing = OhttpOpening(media, held(), Padding.PAD)
    assert type(refused(nothing.open)) is TruncatedMessage
    unknown = OhttpOpening(media, held(), Padding.PAD)
    assert type(refused(unknown.feed, bytes(100))) is UnknownKey
    assert type(refused(unknown.open)) is ExchangeMisuse
    changed = opening(media, bhttp.encode(ASK, BODY))
    changed.feed(b"\x00")
    assert type(refused(changed.open)) is OpenFailed
    assert type(refused(changed.open)) is ExchangeMisuse


@pytest.mark.parametrize("media", [ohttp.WHOLE, ohttp.CHUNKED], ids=lambda m: m.request)
def test_an_opening_opens_once(media: ohttp.Media) -> None:
    once = opening(media, bhttp.encode(ASK, BODY))
    once.open()
    assert type(refused(once.open)) is ExchangeMisuse
    assert type(refused(once.feed, b"")) is ExchangeMisuse


# The header before the rest of the request.


def chunked(parts: list[bytes], limits: Limits | None = None) -> tuple[list[bytes], OhttpOpening, ohttp.RequestSealer]:
    """The bytes to feed for each of `parts`, the last of them the final chunk, and the two ends."""
    sealer = ohttp.RequestSealer(ohttp.CHUNKED, OFFERED)
    sealed = [sealer.chunk(part) for part in parts[:-1]] + [sealer.final(parts[-1])]
    sealed[0] = sealer.start() + sealed[0]
    return sealed, OhttpOpening(ohttp.CHUNKED, held(OFFERED), Padding.PAD, limits or Limits()), sealer


@pytest.mark.parametrize("form", MESSAGES)
def test_the_header_is_readable_after_the_first_chunk(form: str) -> None:
    """Wherever the message is divided: the header once, if the first chunk has all of it; and always the request."""
    message = MESSAGES[form]
    # The header is complete before the content's length, which the known-length form sends next.
    end = len(bhttp.encode(ASK)) - 2 if form == "known length" else len(bhttp.encode_head(ASK))
    for cut in range(1, len(message)):
        (first, rest), found, _ = chunked([message[:cut], message[cut:]])
        found.feed(first[:-1])
        assert found.fields() is None
        assert found.looked is False
        found.feed(first[-1:])
        assert found.fields() == (ASK.fields if cut >= end else None)
        assert found.looked is True
        assert found.fields() is None
        found.feed(rest)
        assert found.fields() is None
        exchange = found.open()
        assert exchange.request() == ASKED
        assert exchange.message == message


def test_the_header_of_the_whole_form_is_not_readable_before_its_end() -> None:
    found = opening(ohttp.WHOLE, bhttp.encode(ASK, BODY))
    assert found.fields() is None
    assert not found.looked
    assert found.open().request() == ASKED


@pytest.mark.parametrize(
    ("first", "limits", "error"),
    [
        (b"\x09", Limits(), MalformedMessage),
        (b"\x01\x40\xc8\x00", Limits(), MalformedMessage),
        (bhttp.encode(ASK), Limits(field_lines=1), MessageTooLarge),
    ],
    ids=["unknown framing", "a response", "too many lines"],
)
def test_a_bad_header_is_answered_inside_the_seal(first: bytes, limits: Limits, error: type[Exception]) -> None:
    sealed, found, sealer = chunked([first, b""], limits)
    found.feed(sealed[0])
    assert found.fields() is None
    assert found.looked is True
    found.feed(sealed[1])
    exchange = found.open()
    assert type(refused(exchange.request)) is error
    head, body = exchange.answer(400, JSON, b"{}")
    assert head.status == 200
    assert read(sealer, body) == (ResponseHead(400, JSON), b"{}")


def test_a_bad_header_does_not_spoil_a_request_that_is_too_large() -> None:
    """After a failed look the message is decoded from its start, under the same limits."""
    message = bhttp.encode(replace(ASK, fields=ASK.fields * 2), BODY)
    for limits, error in ((Limits(field_lines=3), MessageTooLarge), (Limits(control=10), MessageTooLarge)):
        sealed, found, _ = chunked([message[:-1], message[-1:]], limits)
        found.feed(sealed[0])
        assert found.fields() is None
        found.feed(sealed[1])
        assert type(refused(found.open().request)) is error


def ehbp_opening() -> tuple[EhbpOpening, hpke.Context, bytes]:
    enc, context = hpke.setup_sender(ehbp.SUITE, KEY.public_bytes, b"ehbp request")
    return EhbpOpening(ASK.method, ASK.path, ASK.fields, enc.hex(), (KEY,), Padding.PAD), context, enc


def framed(sealed: bytes) -> bytes:
    return len(sealed).to_bytes(4, "big") + sealed


def test_ehbps_header_counts_after_the_first_frame() -> None:
    found, context, _ = ehbp_opening()
    frame = framed(context.seal(BODY))
    assert found.fields() is None
    found.feed(frame[:-1])
    assert found.fields() is None
    assert found.looked is False
    found.feed(frame[-1:])
    assert found.fields() == ASK.fields
    assert found.looked is True
    assert found.fields() is None
    assert found.open().request() == ASKED


@pytest.mark.parametrize("media", [ohttp.WHOLE, ohttp.CHUNKED], ids=lambda m: m.request)
def test_limits_reach_the_sealed_message(media: ohttp.Media) -> None:
    message = bhttp.encode(ASK, BODY)
    assert opening(media, message, Limits(message=len(message))).open().request() == ASKED
    with pytest.raises(MessageTooLarge):
        opening(media, message, Limits(message=len(message) - 1)).open()


def test_limits_reach_ehbps_frames() -> None:
    _, context, enc = ehbp_opening()
    frame = framed(context.seal(BODY))
    for limits, fits in ((Limits(message=len(BODY)), True), (Limits(message=len(BODY) - 1), False)):
        found = EhbpOpening(ASK.method, ASK.path, ASK.fields, enc.hex(), (KEY,), Padding.PAD, limits)
        if fits:
            found.feed(frame)
        else:
            assert type(refused(found.feed, frame)) is MessageTooLarge


# Abandoning the rest: the answer still reaches the client.


def read(sealer: ohttp.RequestSealer, body: bytes) -> tuple[bhttp.Head, bytes]:
    opener, decoder = sealer.response(), bhttp.Decoder("response")
    first, *rest = decoder.feed(opener.feed(body) + opener.finish()) + decoder.finish()
    assert isinstance(first, ResponseHead)
    return first, b"".join(event.data for event in rest if isinstance(event, Content))


def ended(found: OhttpOpening | EhbpOpening) -> None:
    assert type(refused(found.feed, b"")) is ExchangeMisuse
    assert type(refused(found.open)) is ExchangeMisuse


def test_an_abandoned_request_is_answered() -> None:
    message = bhttp.encode(ASK, BODY)
    sealed, found, sealer = chunked([message[:-4], message[-4:]])
    found.feed(sealed[0])
    assert found.fields() == ASK.fields
    exchange = found.abandon()
    ended(found)
    assert (exchange.enc, exchange.message) == (sealer.enc, b"")
    assert (exchange.key_configuration, exchange.recipient) == (OFFERED.encode(), OFFERED.public_key)
    assert type(refused(exchange.request)) is TruncatedMessage
    _, body = exchange.answer(401, JSON, b'{"error": {}}')
    assert read(sealer, body) == (ResponseHead(401, JSON), b'{"error": {}}')


def test_an_abandoned_ehbp_request_is_answered() -> None:
    found, context, enc = ehbp_opening()
    found.feed(framed(context.seal(BODY)) + b"\x00\x00\x01")
    exchange: Exchange = found.abandon()
    ended(found)
    assert (exchange.enc, exchange.recipient, exchange.message) == (enc, KEY.public_bytes, b"")
    assert exchange.request() == replace(ASKED, body=b"")
    head, body = exchange.answer(401, JSON, b"{}")
    nonce = bytes.fromhex(dict(head.headers)[b"ehbp-response-nonce"].decode())
    sequence = ehbp.response_sequence(context.export(b"ehbp response", 32), enc, nonce)
    assert (head.status, sequence.open(body[4:]).rstrip()) == (401, b"{}")


def test_nothing_is_answered_before_a_key_is_known() -> None:
    """Without a header or a frame there is no key to which an answer could be sealed."""
    sealer = ohttp.RequestSealer(ohttp.CHUNKED, OFFERED)
    over_ehbp, context, _ = ehbp_opening()
    over_ehbp.feed(framed(context.seal(BODY))[:-1])
    over_ohttp = OhttpOpening(ohttp.CHUNKED, held(OFFERED), Padding.PAD)
    over_ohttp.feed(sealer.start()[:-1])
    for found in (over_ehbp, over_ohttp):
        assert type(refused(found.abandon)) is TruncatedMessage
        ended(found)


# The default limits: a change of one is a change of what peers may send.


def test_the_defaults() -> None:
    assert asdict(DEFAULT_LIMITS) == {
        "message": 33_554_432,
        "chunk": 1_048_576,
        "frame": 67_108_864,
        "chunks": 65_536,
        "control": 16_384,
        "field_lines": 128,
        "field_section": 65_536,
        "informational": 8,
        "padding": 4_194_304,
    }
    assert Limits() == DEFAULT_LIMITS


def test_limits_do_not_change() -> None:
    with pytest.raises(FrozenInstanceError):
        DEFAULT_LIMITS.message = 1  # type: ignore[misc]
