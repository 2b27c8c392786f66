"""Constant answers: writes of one size, in one of a few numbers, and nothing of the answer is lost."""

import hashlib
import json
import re
from collections.abc import Callable
from http import HTTPStatus

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adytum.inference.channel import bhttp, ehbp, ohttp
from adytum.inference.channel.bhttp import Content, Fields, ResponseHead, Trailers
from adytum.inference.channel.errors import ExchangeMisuse, TruncatedMessage
from adytum.inference.channel.exchange import Exchange, OuterHead
from adytum.inference.channel.limits import Limits
from adytum.inference.channel.padding import EventPadder, Padding
from adytum.inference.channel.shaping import Cells, EhbpBox, OhttpBox
from tests.unit.channel.support import SLOW_FUZZ, cuts, pieces, refused, server_sent_events
from tests.unit.channel.test_exchange import BODY, EVENTS, JSON, Client, over_ehbp, over_ohttp

SIZES = (256, 300, 1024, 16_384)
DONE = b"data: [DONE]\n\n"
CLOSING = (
    DONE,
    b'data: {"type": "error", "error": {"message": "m"}}\n\n',
    b'data: {"error":{"message":"m"}}\n\ndata: [DONE]\n\n',
    b'event: message_stop\ndata: {"type":"message_stop"}\n\n',
    b'event: response.completed\ndata: {"type":"response.completed","text":"' + b"x" * 700 + b'"}\n\n',
)
PROTOCOLS: dict[str, Callable[[Cells], tuple[Exchange, Client]]] = {
    "whole": lambda cells: over_ohttp(ohttp.WHOLE, cells),
    "chunked": lambda cells: over_ohttp(ohttp.CHUNKED, cells),
    "ehbp": over_ehbp,
}
STREAMING = ("chunked", "ehbp")


def shape(size: int = 256, least: int = 4) -> Cells:
    return Cells(size, least, 0.02)


def event(text: str) -> bytes:
    return b'data: {"choices":[{"delta":{"content":"' + text.encode() + b'"}}]}\n\n'


def frames(protocol: str, sealed: bytes) -> list[int]:
    """The lengths of an answer's frames on the wire. The nonce of chunked OHTTP counts as a frame."""
    at, lengths = (32, [32]) if protocol == "chunked" else (0, [])
    while at < len(sealed):
        if protocol == "ehbp":
            length = 4 + int.from_bytes(sealed[at : at + 4], "big")
        elif sealed[at] == 0:
            length = len(sealed) - at
        else:
            assert sealed[at] >> 6 == 1, "a varint of two bytes"
            length = 2 + (int.from_bytes(sealed[at : at + 2], "big") & 0x3FFF)
        lengths.append(length)
        at += length
    assert at == len(sealed)
    return lengths


def count_cells(protocol: str, cells: Cells, sealed: bytes) -> int:
    """The number of cells. Each is a frame of exactly the cells' size, the first including the nonce."""
    lengths = frames(protocol, sealed)
    if protocol == "chunked":
        nonce, first, *lengths = lengths
        lengths.insert(0, nonce + first)
    assert set(lengths) == {cells.size}
    return len(lengths)


def wire_length(head: OuterHead) -> int:
    """The bytes of status line and header whose number can differ, as HTTP/1.1 writes them."""
    phrase = HTTPStatus(head.status).phrase
    return len(phrase) + sum(len(name) + len(value) + 4 for name, value in head.headers)


# The numbers of cells.


def test_few_numbers_of_cells() -> None:
    cells = Cells(1024, 32, 0.02)
    assert {cells.total(needed) for needed in range(1, 1000)} == {32, 64, 128, 256, 512, 1024}
    assert [cells.total(needed) for needed in (1, 32, 33, 64, 65)] == [32, 32, 64, 64, 128]
    assert [cells.total(needed) for needed in (1025, 2048, 2049, 3073)] == [2048, 2048, 3072, 4096]


@given(st.integers(256, 16_384), st.integers(1, 500), st.integers(1, 150_000))
def test_what_is_added_is_bounded(size: int, least: int, needed: int) -> None:
    total = Cells(size, least, 0.02).total(needed)
    assert total == least or needed <= total <= min(2 * needed, needed + 1024 * 1024 // size + 1)


@pytest.mark.parametrize("wrong", [(255, 4, 0.1), (16_385, 4, 0.1), (256, 0, 0.1), (256, 4, 0.0), (256, 4, -1.0)])
def test_cells_that_cannot_be(wrong: tuple[int, int, float]) -> None:
    with pytest.raises(ValueError, match=r"^these cells cannot be made: size, least or cadence_s is out of range$"):
        Cells(*wrong)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_the_name_alone_is_no_shape(protocol: str) -> None:
    """An exchange with the mode "constant" but no numbers must not fall back to another mode."""
    with pytest.raises(ValueError, match=r"^a constant answer needs its cells: pass Cells instead"):
        PROTOCOLS[protocol](Padding.CONSTANT)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^a padder does not make cells: use CellStream$"):
        EventPadder(Padding.CONSTANT)


# Whole answers, errors among them.


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("length", [0, 1, 150, 800, 5000, 70_000])
def test_a_whole_answer(protocol: str, size: int, length: int) -> None:
    cells = shape(size)
    exchange, client = PROTOCOLS[protocol](cells)
    body = json.dumps({"a": "x" * length}).encode()
    head, sealed = exchange.answer(429, JSON, body)
    status, fields, plain = client.read(head, sealed)
    assert (status, fields) == (429, JSON)
    assert json.loads(plain) == json.loads(body)
    count, rest = divmod(len(sealed), size)
    assert rest == 0
    assert count == cells.total(count)
    if protocol != "whole":
        assert count_cells(protocol, cells, sealed) == count


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("size", [256, 1024])
def test_whole_answers_of_every_length_are_whole(protocol: str, size: int) -> None:
    counts = set()
    for length in range(0, 4 * size, 7):
        exchange, client = PROTOCOLS[protocol](shape(size))
        body = b'"' + b"x" * length + b'"'
        head, sealed = exchange.answer(200, JSON, body)
        assert client.read(head, sealed)[2].rstrip(b" ") == body
        counts.add(len(sealed) / size)
    assert counts == {4, 8}


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_an_answer_without_content(protocol: str) -> None:
    exchange, client = PROTOCOLS[protocol](shape())
    head, sealed = exchange.answer(200, (), b"")
    assert len(sealed) == 4 * 256
    assert client.read(head, sealed)[2].strip(b" ") == b""


def test_a_large_answers_padding_is_within_what_receivers_take() -> None:
    exchange, client = PROTOCOLS["chunked"](shape(16_384))
    body = b'"' + b"x" * 5_000_000 + b'"'
    head, sealed = exchange.answer(200, JSON, body)
    assert len(sealed) - len(body) < 1.3 * 1024 * 1024
    assert client.read(head, sealed)[2] == body


# Streams.


def send(exchange: Exchange, fed: list[bytes], *, every: int = 1, idle: int = 0) -> tuple[OuterHead, bytes]:
    """A stream with a cell after every `every` pieces, and `idle` more cells after each."""
    head, sealed = exchange.begin(200, EVENTS)
    assert sealed == b""
    for at, piece in enumerate(fed):
        assert exchange.data(piece) == b""
        if at % every == 0:
            sealed += b"".join(exchange.cell() for _ in range(1 + idle))
    return head, sealed + exchange.end()


@pytest.mark.parametrize("protocol", STREAMING)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("closing", CLOSING, ids=range(len(CLOSING)))
@pytest.mark.parametrize(("every", "idle"), [(1, 0), (5, 0), (1, 3)])
def test_a_stream(protocol: str, size: int, closing: bytes, every: int, idle: int) -> None:
    cells = shape(size)
    exchange, client = PROTOCOLS[protocol](cells)
    events = [event("x" * length) for length in (1, 2, 3, 150, 151, 152, 400, 3000, *range(40))] + [closing]
    head, sealed = send(exchange, events, every=every, idle=idle)
    count = count_cells(protocol, cells, sealed)
    assert count == cells.total(count)
    status, fields, plain = client.read(head, sealed)
    assert (status, fields) == (200, EVENTS)
    assert server_sent_events(plain) == server_sent_events(b"".join(events))


@SLOW_FUZZ
@given(
    st.sampled_from(STREAMING),
    st.integers(256, 700),
    st.lists(st.text("ab\n", max_size=300), max_size=12),
    cuts(2000),
    st.integers(1, 4),
    st.booleans(),
)
def test_a_stream_however_the_engine_cuts_it(
    protocol: str, size: int, texts: list[str], where: list[int], every: int, closed: bool
) -> None:
    stream = "".join("data: " + text.replace("\n", "\ndata: ") + "\n\n" for text in texts).encode()
    stream += DONE if closed else b""
    cells = shape(size)
    exchange, client = PROTOCOLS[protocol](cells)
    head, sealed = send(exchange, pieces(stream, where), every=every)
    count = count_cells(protocol, cells, sealed)
    assert count == cells.total(count)
    assert server_sent_events(client.read(head, sealed)[2]) == server_sent_events(stream)


@pytest.mark.parametrize("protocol", STREAMING)
def test_streams_errors_and_whole_answers_that_fit_look_the_same(protocol: str) -> None:
    """The lengths of head and body: chats, one that its engine broke off, refusals, a list."""
    cells = shape(512, 16)
    seen = set()
    for fed in ([DONE], [event("word")] * 20 + [DONE], [event("x" * 90)] * 7 + [CLOSING[1]], [b"data: {}\n\n"]):
        exchange, _ = PROTOCOLS[protocol](cells)
        head, sealed = send(exchange, fed, every=3)
        seen.add((wire_length(head), tuple(frames(protocol, sealed))))
    for status, body in ((200, BODY), (400, b'{"error": {"message": "' + b"m" * 300 + b'"}}'), (404, b"{}")):
        exchange, _ = PROTOCOLS[protocol](cells)
        head, sealed = exchange.answer(status, JSON, body)
        seen.add((wire_length(head), tuple(frames(protocol, sealed))))
    assert len(seen) == 1
    if protocol == "ehbp":
        assert {length for length, _ in seen} == {512 + len("x-fill: \r\n")}
        assert [set(value) for name, value in head.headers if name == b"x-fill"] == [set(b"0")]


def before(client: Client, head: OuterHead, sealed: bytes, count: int) -> bytes:
    """The content of the first `count` cells of 1,024 bytes, as a client reads it while it arrives."""
    part = sealed[: count * 1024]
    return client.partial(part) if client.opener is not None else client.read(head, part)[2]


@pytest.mark.parametrize("protocol", STREAMING)
@pytest.mark.parametrize("closing", CLOSING, ids=range(len(CLOSING)))
def test_the_closing_event_is_in_the_last_cells(protocol: str, closing: bytes) -> None:
    """Otherwise a client that stops reading there would reveal where the answer ended."""
    exchange, client = PROTOCOLS[protocol](shape(1024, 32))
    head, _ = exchange.begin(200, EVENTS)
    exchange.data(event("word"))
    exchange.data(closing)
    sealed = exchange.cell() + exchange.cell() + exchange.end()
    assert len(sealed) == 32 * 1024
    seen = before(client, head, sealed, 30)
    assert seen.count(b"word") == 1
    assert closing[:12] not in seen.replace(event("word"), b"")
    assert closing in client.read(head, sealed)[2]


@pytest.mark.parametrize("protocol", STREAMING)
def test_content_leaves_in_the_next_cell(protocol: str) -> None:
    exchange, client = PROTOCOLS[protocol](shape(1024, 8))
    head, sealed = exchange.begin(200, EVENTS)
    sealed += exchange.cell()
    exchange.data(event("first"))
    assert exchange.waiting == len(event("first"))
    sealed += exchange.cell()
    assert exchange.waiting == 0
    assert event("first") in before(client, head, sealed, 2)


@pytest.mark.parametrize("protocol", STREAMING)
def test_what_looks_like_an_end_and_is_none_is_not_lost(protocol: str) -> None:
    exchange, client = PROTOCOLS[protocol](shape())
    fed = [event("data: [DONE]"), DONE, event("after"), event("x" * 2000)]
    head, sealed = send(exchange, fed)
    assert server_sent_events(client.read(head, sealed)[2]) == server_sent_events(b"".join(fed))


@pytest.mark.parametrize("protocol", STREAMING)
def test_what_an_engine_can_make_the_gateway_keep_is_bounded(protocol: str) -> None:
    exchange, client = PROTOCOLS[protocol](shape(16_384))
    head, sealed = exchange.begin(200, EVENTS)
    exchange.data(DONE)
    fed = [event("x" * 60_000) for _ in range(20)]
    for item in fed:
        exchange.data(item)
    assert exchange.waiting > 1024 * 1024
    while exchange.waiting:
        sealed += exchange.cell()
    plain = client.read(head, sealed + exchange.end())[2]
    assert server_sent_events(plain) == server_sent_events(DONE + b"".join(fed))


def test_a_stream_without_its_end_reads_as_cut() -> None:
    exchange, client = PROTOCOLS["chunked"](shape())
    head, sealed = exchange.begin(200, EVENTS)
    exchange.data(event("a"))
    sealed += exchange.cell() + exchange.cell()
    assert type(refused(client.read, head, sealed)) is TruncatedMessage


def test_half_an_event_is_not_lost() -> None:
    exchange, client = PROTOCOLS["chunked"](shape())
    head, sealed = send(exchange, [event("a"), b"data: cut"])
    assert client.read(head, sealed)[2].endswith(b"data: cut")


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("length", [0, 1, 700])
def test_trailers_are_about_the_content_as_it_arrives(size: int, length: int) -> None:
    """Comments are content: the digest in a receipt must match the bytes that the client hashes."""
    exchange, client = over_ohttp(ohttp.CHUNKED, shape(size, 8))
    exchange.begin(200, EVENTS)
    exchange.data(event("word"))
    sealed = exchange.cell()
    exchange.data(event("x" * 999) + DONE)
    sealed += exchange.end(lambda digest: ((b"digest", digest.hex().encode() + b"." * length),))
    count = count_cells("chunked", shape(size), sealed)
    assert count == shape(size, 8).total(count)
    assert client.opener is not None
    opener, decoder = client.opener(Limits()), bhttp.Decoder("response")
    found = decoder.feed(opener.feed(sealed) + opener.finish()) + decoder.finish()
    content = b"".join(item.data for item in found if isinstance(item, Content))
    trailers = [item for item in found if isinstance(item, Trailers)]
    assert trailers[0].fields[0][1].rstrip(b".") == hashlib.sha256(content).hexdigest().encode()


@pytest.mark.parametrize("size", [256, 16_384])
def test_no_chunk_is_longer_than_every_receiver_takes(size: int) -> None:
    exchange, client = over_ohttp(ohttp.CHUNKED, shape(size))
    _, sealed = send(exchange, [event("x" * 40_000), DONE])
    assert client.opener is not None
    opener, decoder = client.opener(Limits(chunk=16_384)), bhttp.Decoder("response")
    first, *rest = decoder.feed(opener.feed(sealed) + opener.finish()) + decoder.finish()
    assert isinstance(first, ResponseHead)
    assert b"".join(e.data for e in rest if isinstance(e, Content)).count(b"x") == 40_000


# Exact sizes: each test tries every length around a limit.

TAIL = re.compile(rb"(?:: *\n\n|\n{0,2})")
"""What may follow a stream's last event: one comment, or line ends, which no client reads as content."""


@pytest.mark.parametrize("protocol", STREAMING)
def test_every_length_of_the_last_event_leaves_a_whole_comment(protocol: str) -> None:
    cells = shape(256, 2)
    for length in range(300):
        exchange, client = PROTOCOLS[protocol](cells)
        closing = b'data: {"error":"' + b"x" * length + b'"}\n\n'
        head, sealed = send(exchange, [closing])
        count = count_cells(protocol, cells, sealed)
        assert count in (2, 4)
        status, fields, plain = client.read(head, sealed)
        assert (status, fields) == (200, EVENTS)
        before, found, after = plain.partition(closing)
        assert found
        assert re.fullmatch(rb"(?:: *\n\n)*", before)
        # In chunked OHTTP the padding after the end is binary HTTP's own.
        assert after == b"" if protocol == "chunked" else TAIL.fullmatch(after)


@pytest.mark.parametrize("size", [64, 100, 16_383])
def test_the_overhead_of_content(size: int) -> None:
    sealer = ehbp.ResponseSealer(bytes(32), bytes(32))
    assert len(EhbpBox(sealer, 256, is_stream=True).content(bytes(size))) == size + EhbpBox.overhead
    assert len(bhttp.encode_content(bytes(size))) == size + OhttpBox.overhead


@pytest.mark.parametrize("size", range(10))
def test_what_fills_an_ehbp_cell(size: int) -> None:
    sealer = ehbp.ResponseSealer(bytes(32), bytes(32))
    assert EhbpBox(sealer, 256, is_stream=False).fill(size) == b" " * size
    events = EhbpBox(sealer, 256, is_stream=True).fill(size)
    assert events == (b":" + b" " * (size - 3) + b"\n\n" if size >= 3 else b"\n" * size)


@pytest.mark.parametrize("protocol", STREAMING)
def test_every_length_of_an_event_around_the_cells_room(protocol: str) -> None:
    cells = shape(256, 8)
    for length in range(1, 256):
        exchange, client = PROTOCOLS[protocol](cells)
        one = b"data:" + b"x" * length + b"\n\n"
        head, sealed = exchange.begin(200, EVENTS)
        exchange.data(one)
        sealed += b"".join(exchange.cell() for _ in range(4)) + exchange.end()
        assert count_cells(protocol, cells, sealed) == 8
        plain = client.read(head, sealed)[2]
        assert plain.startswith(one)
        assert re.fullmatch(rb"(?:: *\n\n|\n)*", plain.removeprefix(one))


@pytest.mark.parametrize("protocol", STREAMING)
def test_every_length_of_the_head_leaves_full_cells(protocol: str) -> None:
    cells = shape(256, 4)
    for length in range(300):
        exchange, client = PROTOCOLS[protocol](cells)
        fields = (*EVENTS, (b"x", b"v" * length))
        head, _ = exchange.begin(200, fields)
        exchange.data(event("word"))
        sealed = exchange.cell() + exchange.cell()
        assert len(sealed) == 512
        sealed += exchange.end()
        assert count_cells(protocol, cells, sealed) == 4
        if protocol == "chunked":
            assert client.read(head, sealed)[:2] == (200, fields)
        assert server_sent_events(client.read(head, sealed)[2]) == server_sent_events(event("word"))


def test_a_full_cell_has_no_comment() -> None:
    """Events that fill cells exactly follow each other without a byte between them."""
    exchange, client = PROTOCOLS["ehbp"](shape(256, 4))
    one = b"data:" + b"x" * (256 - 4 - 16 - 7) + b"\n\n"
    head, sealed = exchange.begin(200, EVENTS)
    for _ in range(3):
        exchange.data(one)
        sealed += exchange.cell()
        assert exchange.waiting == 0
    assert client.read(head, sealed)[2] == one * 3


@pytest.mark.parametrize("protocol", STREAMING)
def test_whole_events_wait_and_the_start_of_one_is_held(protocol: str) -> None:
    exchange, _ = PROTOCOLS[protocol](shape())
    exchange.begin(200, EVENTS)
    exchange.data(event("a") + event("b") + event("c")[:-1])
    assert exchange.waiting == len(event("a") + event("b"))
    exchange.data(b"\n")
    assert exchange.waiting == len(event("a") + event("b") + event("c"))
    # A blank line alone is complete, and so is not held.
    exchange.data(b"\n\n")
    assert exchange.waiting == len(event("a") + event("b") + event("c")) + 2
    # A closing event is held, with what follows.
    exchange.data(event("d") + DONE + event("e"))
    assert exchange.waiting == len(event("a") + event("b") + event("c") + event("d")) + 2


@pytest.mark.parametrize("protocol", STREAMING)
def test_a_closing_event_is_held_up_to_exactly_one_mebibyte(protocol: str) -> None:
    limit = 1024 * 1024
    rest = b"data: cut"
    for size, freed in ((limit, False), (limit + 1, True)):
        exchange, _ = PROTOCOLS[protocol](shape())
        exchange.begin(200, EVENTS)
        after = event("x" * (size - len(DONE + event("") + rest + event("y")))) + event("y")
        exchange.data(event("a") + DONE + after + rest)
        assert len(DONE + after + rest) == size
        assert exchange.waiting == len(event("a") + DONE + after if freed else event("a"))


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_an_answer_of_one_cell(protocol: str) -> None:
    exchange, client = PROTOCOLS[protocol](shape(1024, 1))
    head, sealed = exchange.answer(200, JSON, b"{}")
    assert len(sealed) == 1024
    assert json.loads(client.read(head, sealed)[2]) == {}


def test_an_answer_that_fills_its_cells() -> None:
    for least, length in ((1, 236), (4, 4 * 236)):
        exchange, client = over_ehbp(shape(256, least))
        body = b'"' + b"x" * (length - 2) + b'"'
        head, sealed = exchange.answer(200, JSON, body)
        assert len(sealed) == least * 256
        assert client.read(head, sealed)[2] == body


def test_trailers_that_outgrow_their_trial_are_an_error() -> None:
    """They would otherwise be cut off inside the seal."""
    exchange, _ = over_ohttp(ohttp.CHUNKED, shape(256, 2))
    exchange.begin(200, EVENTS)
    sizes = iter((0, 5000))
    assert type(refused(exchange.end, lambda _: ((b"t", b"." * next(sizes)),))) is ExchangeMisuse


@pytest.mark.parametrize("grows", [0, 9, 16])
def test_every_length_of_the_trailers(grows: int) -> None:
    """The final trailers may be a few bytes longer than the trial ones, as receipts may."""
    cells = shape(256, 2)
    for length in range(240):
        exchange, client = over_ohttp(ohttp.CHUNKED, cells)
        head, sealed = exchange.begin(200, EVENTS)
        exchange.data(event("word"))
        sealed += exchange.cell()
        asked: list[bytes] = []

        def closing(digest: bytes, length: int = length, asked: list[bytes] = asked) -> Fields:
            asked.append(digest)
            return ((b"t", b"." * (length + (grows if len(asked) > 1 else 0))),)

        sealed += exchange.end(closing)
        assert count_cells("chunked", cells, sealed) in (2, 4)
        assert len(asked) == 2
        _, _, plain = client.read(head, sealed)
        assert hashlib.sha256(plain).digest() == asked[1]


# Order of steps.


def test_cells_belong_to_streams_of_events() -> None:
    plain: Fields = ((b"content-type", b"text/plain"),)
    exchange, _ = PROTOCOLS["chunked"](shape())
    assert type(refused(exchange.begin, 200, plain)) is ExchangeMisuse
    exchange, _ = PROTOCOLS["chunked"](shape())
    assert type(refused(exchange.cell)) is ExchangeMisuse
    exchange, _ = PROTOCOLS["chunked"](shape())
    exchange.begin(200, EVENTS)
    exchange.end()
    assert type(refused(exchange.cell)) is ExchangeMisuse
    padded, _ = over_ohttp(ohttp.CHUNKED, Padding.PAD)
    padded.begin(200, EVENTS)
    assert type(refused(padded.cell)) is ExchangeMisuse
    padded, _ = over_ohttp(ohttp.CHUNKED, Padding.PAD)
    padded.begin(200, EVENTS)
    padded.data(event("word") + b"data")
    assert padded.waiting == 0
