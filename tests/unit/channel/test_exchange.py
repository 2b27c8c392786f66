"""One request and its one answer: the order of steps, the sealed bytes, and what their length reveals."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adytum.inference.channel import bhttp, ehbp, hpke, ohttp
from adytum.inference.channel.bhttp import Content, Fields, RequestHead, ResponseHead
from adytum.inference.channel.errors import ExchangeMisuse, TruncatedMessage
from adytum.inference.channel.exchange import Exchange, OuterHead, Shape
from adytum.inference.channel.hpke import KemId
from adytum.inference.channel.limits import Limits
from adytum.inference.channel.openings import EhbpOpening, OhttpOpening
from adytum.inference.channel.padding import EVENT_BUCKET, Padding, bucket
from adytum.inference.channel.shaping import Cells
from tests.unit.channel.support import (
    SLOW_FUZZ,
    configuration,
    cuts,
    held,
    one_by_one,
    pieces,
    recipient,
    refused,
    server_sent_events,
)

JSON: Fields = ((b"content-type", b"application/json"),)
EVENTS: Fields = ((b"content-type", b"text/event-stream; charset=utf-8"),)
ASK = RequestHead("POST", "https", "a.example", "/v1/chat/completions", ((b"authorization", b"Bearer k"), *JSON))
BODY = b'{"model": "m", "messages": []}'


@dataclass
class Client:
    """The other end: from outer head and sealed body to status, fields and plaintext, and the length it sealed."""

    read: Callable[[OuterHead, bytes], tuple[int, Fields, bytes]]
    sealed_length: Callable[[OuterHead, bytes], int]
    partial: Callable[[bytes], bytes] = bytes
    """Content of a chunked answer's first bytes."""
    opener: Callable[[Limits], ohttp.ResponseOpener] | None = None


def over_ohttp(media: ohttp.Media, padding: Shape = Padding.PAD) -> tuple[Exchange, Client]:
    offered = configuration(KemId.MLKEM768_X25519)
    sealer = ohttp.RequestSealer(media, offered)
    message = bhttp.encode(ASK, BODY)
    request = sealer.start() + sealer.final(message) if media.chunked else sealer.whole(message)
    opening = OhttpOpening(media, held(offered), padding)
    for piece in pieces(request, range(0, len(request), 100)):
        opening.feed(piece)
    exchange = opening.open()
    assert exchange.enc == sealer.enc

    def plain(head: OuterHead, body: bytes) -> bytes:
        assert head.status == 200
        assert dict(head.headers)[b"content-type"] == media.response.encode()
        opener = sealer.response()
        return opener.feed(body) + opener.finish()

    def read(head: OuterHead, body: bytes) -> tuple[int, Fields, bytes]:
        decoder = bhttp.Decoder("response")
        first, *rest = decoder.feed(plain(head, body)) + decoder.finish()
        assert isinstance(first, ResponseHead)
        return first.status, first.fields, b"".join(event.data for event in rest if isinstance(event, Content))

    def partial(body: bytes) -> bytes:
        events = bhttp.Decoder("response").feed(sealer.response().feed(body))
        return b"".join(event.data for event in events if isinstance(event, Content))

    return exchange, Client(read, lambda head, body: len(plain(head, body)), partial, sealer.response)


def over_ehbp(padding: Shape = Padding.PAD) -> tuple[Exchange, Client]:
    enc, context = hpke.setup_sender(ehbp.SUITE, recipient(KemId.X25519).public_bytes, b"ehbp request")
    opening = EhbpOpening(ASK.method, ASK.path, ASK.fields, enc.hex(), (recipient(KemId.X25519),), padding)
    sealed = context.seal(BODY)
    for piece in one_by_one(len(sealed).to_bytes(4, "big") + sealed):
        opening.feed(piece)
    exchange = opening.open()
    assert exchange.enc == enc

    def read(head: OuterHead, body: bytes) -> tuple[int, Fields, bytes]:
        nonce = bytes.fromhex(dict(head.headers)[b"ehbp-response-nonce"].decode())
        sequence = ehbp.response_sequence(context.export(b"ehbp response", 32), enc, nonce)
        plain, at = b"", 0
        while at < len(body):
            length = int.from_bytes(body[at : at + 4], "big")
            plain += sequence.open(body[at + 4 : at + 4 + length])
            at += 4 + length
        fields = tuple(line for line in head.headers if line[0] == b"content-type")
        return head.status, fields, plain

    return exchange, Client(read, lambda head, body: len(read(head, body)[2]))


PROTOCOLS: dict[str, Callable[..., tuple[Exchange, Client]]] = {
    "whole": lambda padding=Padding.PAD: over_ohttp(ohttp.WHOLE, padding),
    "chunked": lambda padding=Padding.PAD: over_ohttp(ohttp.CHUNKED, padding),
    "ehbp": over_ehbp,
}
STREAMING = ["chunked", "ehbp"]


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_the_request(protocol: str) -> None:
    exchange, _ = PROTOCOLS[protocol]()
    request = exchange.request()
    assert (request.method, request.path, request.fields, request.body) == (ASK.method, ASK.path, ASK.fields, BODY)
    sealed_to = configuration(KemId.X25519 if protocol == "ehbp" else KemId.MLKEM768_X25519)
    assert exchange.recipient == sealed_to.public_key
    assert exchange.message == (BODY if protocol == "ehbp" else bhttp.encode(ASK, BODY))
    assert exchange.key_configuration == (b"" if protocol == "ehbp" else sealed_to.encode())


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("padding", [Padding.OFF, Padding.PAD])
@pytest.mark.parametrize("size", [0, 1, 1000, 16_384, 16_385, 100_000])
def test_an_answer(protocol: str, padding: Padding, size: int) -> None:
    exchange, client = PROTOCOLS[protocol](padding)
    body = json.dumps({"a": "x" * size}).encode()
    head, sealed = exchange.answer(429, JSON, body)
    status, fields, plain = client.read(head, sealed)
    assert (status, fields) == (429, JSON)
    # Over OHTTP the padding is binary HTTP's own; over EHBP it is spaces after the JSON.
    assert json.loads(plain) == json.loads(body)
    assert plain.rstrip(b" ") == body
    if protocol != "ehbp" or padding is Padding.OFF:
        assert plain == body
    if padding is Padding.PAD:
        length = client.sealed_length(head, sealed)
        assert length == bucket(length)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_answers_within_a_bucket_have_one_length(protocol: str) -> None:
    lengths = set()
    for size in range(100, 800, 37):
        exchange, _ = PROTOCOLS[protocol]()
        lengths.add(len(exchange.answer(200, JSON, b'"' + b"x" * size + b'"')[1]))
    assert len(lengths) == 1


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_an_answer_without_content(protocol: str) -> None:
    exchange, client = PROTOCOLS[protocol]()
    assert client.read(*exchange.answer(204, (), b"")) == (204, (), b"")


# Trailers: about the content as it was sealed, padding included.


SHAPES: list[Shape] = [Padding.OFF, Padding.PAD, Cells(1024, 4, 0.02)]


def trailers_of(client: Client, sealed: bytes) -> tuple[bytes, Fields]:
    """(content, trailers) of an answer over OHTTP."""
    assert client.opener is not None
    opener, decoder = client.opener(Limits()), bhttp.Decoder("response")
    _, *rest = decoder.feed(opener.feed(sealed) + opener.finish()) + decoder.finish()
    content = b"".join(event.data for event in rest if isinstance(event, Content))
    return content, next((event.fields for event in rest if isinstance(event, bhttp.Trailers)), ())


def digest_line(digest: bytes) -> Fields:
    return ((b"digest", digest.hex().encode()),)


def about(content: bytes) -> Fields:
    return digest_line(hashlib.sha256(content).digest())


@pytest.mark.parametrize(
    "shape", [Padding.OFF, Padding.PAD, Cells(1024, 4, 0.02)], ids=lambda s: type(s).__name__ + str(s)[:3]
)
@pytest.mark.parametrize("body", [b"", b"{}", b'"' + b"x" * 20_000 + b'"'], ids=len)
def test_trailers_of_a_whole_answer(shape: Shape, body: bytes) -> None:
    for protocol in ("whole", "chunked"):
        exchange, client = PROTOCOLS[protocol](shape)
        assert exchange.has_trailers
        _, sealed = exchange.answer(200, JSON, body, digest_line)
        assert trailers_of(client, sealed) == (body, about(body))
        exchange, client = PROTOCOLS[protocol](shape)
        assert trailers_of(client, exchange.answer(200, JSON, body)[1]) == (body, ())


@pytest.mark.parametrize("padding", [Padding.OFF, Padding.PAD])
@pytest.mark.parametrize("end", [b"", b"data: cut"])
@pytest.mark.parametrize("fields", [EVENTS, JSON], ids=["events", "bytes"])
def test_trailers_of_a_stream(padding: Padding, end: bytes, fields: Fields) -> None:
    exchange, client = PROTOCOLS["chunked"](padding)
    _, sealed = exchange.begin(200, fields)
    for piece in (b"data: 1\n\n", b"data: 2", b"\n\n", end):
        sealed += exchange.data(piece)
    content, trailers = trailers_of(client, sealed + exchange.end(digest_line))
    assert content.startswith(b"data: 1\n\n")
    assert content.endswith(end)
    assert trailers == about(content)


@pytest.mark.parametrize(
    "shape", [Padding.OFF, Padding.PAD, Cells(1024, 4, 0.02)], ids=lambda s: type(s).__name__ + str(s)[:3]
)
def test_ehbp_has_no_trailers(shape: Shape) -> None:
    """So their maker, which may be expensive, is not called."""

    def never(digest: bytes) -> Fields:
        raise AssertionError

    exchange, _ = over_ehbp(shape)
    assert not exchange.has_trailers
    exchange.answer(200, JSON, b"{}", never)
    exchange, _ = over_ehbp(shape)
    exchange.begin(200, EVENTS)
    exchange.end(never)


# Streams.


@pytest.mark.parametrize("protocol", STREAMING)
@pytest.mark.parametrize("padding", [Padding.OFF, Padding.PAD])
def test_a_stream(protocol: str, padding: Padding) -> None:
    exchange, client = PROTOCOLS[protocol](padding)
    events = [b'data: {"token": "' + b"x" * size + b'"}\n\n' for size in (1, 30, 400)] + [b"data: [DONE]\n\n"]
    head, sealed = exchange.begin(200, EVENTS)
    assert {(b"incremental", b"?1"), (b"x-accel-buffering", b"no"), (b"cache-control", b"no-store")} <= set(
        head.headers
    )
    lengths = []
    for event in events:
        piece = exchange.data(event)
        lengths.append(len(piece))
        sealed += piece
    sealed += exchange.end()
    status, fields, plain = client.read(head, sealed)
    assert (status, fields) == (200, EVENTS)
    assert server_sent_events(plain) == server_sent_events(b"".join(events))
    if padding is Padding.PAD:
        assert len(set(lengths)) == 1
        assert len(plain) == len(events) * EVENT_BUCKET
    else:
        assert len(set(lengths)) == 4
        assert plain == b"".join(events)


@SLOW_FUZZ
@given(st.sampled_from(STREAMING), st.lists(st.text("ab\n", max_size=300), max_size=8), cuts(2000))
def test_a_stream_however_the_engine_cuts_it(protocol: str, texts: list[str], where: list[int]) -> None:
    stream = "".join("data: " + text.replace("\n", "\ndata: ") + "\n\n" for text in texts).encode()
    exchange, client = PROTOCOLS[protocol]()
    head, sealed = exchange.begin(200, EVENTS)
    sealed += b"".join([exchange.data(piece) for piece in pieces(stream, where)])
    _, _, plain = client.read(head, sealed + exchange.end())
    assert server_sent_events(plain) == server_sent_events(stream)
    assert len(plain) % EVENT_BUCKET == 0


@pytest.mark.parametrize("protocol", STREAMING)
@pytest.mark.parametrize("size", [16_375, 16_376, 16_377, 50_000])
def test_a_large_piece_of_a_stream(protocol: str, size: int) -> None:
    """It is split into chunks that every receiver of chunked OHTTP accepts. It is not of events, so not padded."""
    exchange, client = PROTOCOLS[protocol]()
    head, sealed = exchange.begin(200, JSON)
    sealed += exchange.data(bytes(size)) + exchange.data(b"")
    assert client.read(head, sealed + exchange.end())[2] == bytes(size)


@pytest.mark.parametrize("size", [15_000, *range(16_370, 16_390), 32_768, 40_000])
def test_no_chunk_is_longer_than_every_receiver_takes(size: int) -> None:
    sealer = ohttp.RequestSealer(ohttp.CHUNKED, configuration(KemId.X25519))
    opening = OhttpOpening(ohttp.CHUNKED, held(configuration(KemId.X25519)), Padding.PAD)
    opening.feed(sealer.start() + sealer.final(bhttp.encode(ASK, BODY)))
    exchange = opening.open()
    _, sealed = exchange.begin(200, JSON)
    sealed += exchange.data(b"#" * size)
    opener = sealer.response(Limits(chunk=16_384))
    assert opener.feed(sealed + exchange.end()).count(b"#") == size
    opener.finish()


@pytest.mark.parametrize("protocol", STREAMING)
def test_half_an_event_leaves_nothing_and_is_not_lost(protocol: str) -> None:
    exchange, client = PROTOCOLS[protocol]()
    head, sealed = exchange.begin(200, EVENTS)
    assert exchange.data(b"data: cut") == b""
    assert client.read(head, sealed + exchange.end())[2] == b"data: cut"


def test_a_stream_without_its_end_reads_as_cut() -> None:
    exchange, client = PROTOCOLS["chunked"]()
    head, sealed = exchange.begin(200, EVENTS)
    sealed += exchange.data(b"data: 1\n\n")
    assert type(refused(client.read, head, sealed)) is TruncatedMessage


# Order of steps.

STEPS = ("answer", "begin", "data", "end")
# The steps that may follow each step. Every other step, and every step after that one, is a misuse.
ORDER = {"start": {"answer", "begin"}, "answer": set(), "begin": {"data", "end"}, "data": {"data", "end"}, "end": set()}


def take(exchange: Exchange, step: str) -> object:
    if step == "answer":
        return exchange.answer(200, JSON, b"{}")
    if step == "begin":
        return exchange.begin(200, EVENTS)
    return exchange.data(b"data: 1\n\n") if step == "data" else exchange.end()


@pytest.mark.parametrize("protocol", STREAMING)
def test_every_order_of_steps(protocol: str) -> None:
    for steps in product(STEPS, repeat=4):
        exchange, _ = PROTOCOLS[protocol]()
        at = "start"
        for step in steps:
            if at is not None and step in ORDER[at]:
                take(exchange, step)
                at = step
            else:
                at = None  # type: ignore[assignment]
                assert type(refused(take, exchange, step)) is ExchangeMisuse
                assert repr(exchange).endswith("Exchange(ENDED)")
            assert exchange.untouched is False


def test_every_order_of_steps_of_the_whole_form() -> None:
    """It cannot stream. `begin` is refused and leaves the exchange unchanged, so an error can still be answered."""
    for steps in product(STEPS, repeat=3):
        exchange, _ = PROTOCOLS["whole"]()
        assert not exchange.can_stream
        done = False
        for step in steps:
            if step == "answer" and not done:
                take(exchange, step)
            else:
                assert type(refused(take, exchange, step)) is ExchangeMisuse
            done = done or step != "begin"


@pytest.mark.parametrize("protocol", ["whole", "chunked"])
def test_a_bad_header_line_ends_the_exchange_and_seals_nothing(protocol: str) -> None:
    bad: Fields = ((b"a", b"x\r\nb: c"),)
    exchange, _ = PROTOCOLS[protocol]()
    assert type(refused(exchange.answer, 200, bad, b"{}")) is ExchangeMisuse
    assert type(refused(exchange.answer, 200, (), b"{}")) is ExchangeMisuse
    if exchange.can_stream:
        exchange, _ = PROTOCOLS[protocol]()
        assert type(refused(exchange.begin, 200, bad)) is ExchangeMisuse
        assert type(refused(exchange.data, b"x")) is ExchangeMisuse
        assert type(refused(exchange.end)) is ExchangeMisuse
