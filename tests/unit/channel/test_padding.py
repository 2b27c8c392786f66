"""Padding: lengths are buckets, and no reader sees the padding."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adytum.inference.channel.padding import EVENT_BUCKET, MESSAGE_BUCKET, EventPadder, Padding, bucket, pad_json
from tests.unit.channel.support import FUZZ, cuts, one_by_one, pieces, server_sent_events


def test_the_names_and_numbers_of_the_readme() -> None:
    assert [*Padding] == ["off", "pad", "constant"]
    assert (EVENT_BUCKET, MESSAGE_BUCKET) == (512, 1024)


# Whole messages.


def test_bucket_for_every_small_length() -> None:
    before = 0
    for length in range(1, 100_000):
        padded = bucket(length)
        assert padded >= max(length, before)
        assert padded % MESSAGE_BUCKET == 0
        assert bucket(padded) == padded
        # Less than 1 KiB is added up to 8 KiB, and at most an eighth above that.
        assert padded - length < max(MESSAGE_BUCKET, length / 8)
        before = padded


@FUZZ
@given(st.integers(1, 1 << 40), st.integers(0, 1 << 30))
def test_bucket_for_large_lengths(length: int, more: int) -> None:
    assert length <= bucket(length) <= bucket(length + more)
    assert bucket(length) - length < max(MESSAGE_BUCKET, length / 8)
    assert bucket(bucket(length)) == bucket(length)


def test_the_number_of_lengths_grows_with_the_logarithm() -> None:
    sizes = {bucket(length) for length in range(8193, 1 << 20, 7)} | {bucket(1 << 20)}
    assert len(sizes) == 8 * 7


@FUZZ
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
        lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(), inner, max_size=5),
    )
)
def test_padded_json_is_the_same_json(value: Any) -> None:
    body = json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass")
    padded = pad_json(body)
    assert len(padded) == bucket(len(body))
    assert padded.startswith(body)
    assert json.loads(padded) == json.loads(body)


# Streams. However the stream is divided, a reader sees the same events with and without padding.

LINE = st.text(st.characters(codec="utf-8", exclude_characters="\r\n\0"), max_size=40)
BLOCK = st.lists(
    st.one_of(
        LINE.map("data: ".__add__),
        LINE.map("data:".__add__),
        LINE.map("event: ".__add__),
        LINE.map("id: ".__add__),
        LINE.map(":".__add__),
        LINE.map("retry: ".__add__),
        st.just("data"),
    ),
    min_size=1,
    max_size=4,
)
STREAM = st.lists(BLOCK, max_size=6).map(lambda blocks: "".join("\n".join(block) + "\n\n" for block in blocks))


def padded(parts: list[bytes]) -> tuple[list[bytes], bytes]:
    """(the output for each part, the rest)."""
    padder = EventPadder(Padding.PAD)
    return [padder.feed(part) for part in parts], padder.finish()


def check(stream: bytes, parts: list[bytes]) -> None:
    out, rest = padded(parts)
    bare = b""
    for piece in out:
        assert len(piece) % EVENT_BUCKET == 0
        if piece:
            # The padding is one comment after whole events. Without it the bytes are the stream's own.
            at = piece.rindex(b":")
            assert piece[at:] == b":" + b" " * (len(piece) - at - 3) + b"\n\n"
            assert piece[:at].endswith(b"\n\n")
            bare += piece[:at]
    assert bare + rest == stream
    assert server_sent_events(b"".join(out) + rest) == server_sent_events(stream)


@FUZZ
@given(STREAM, cuts(), st.sampled_from(("", "data: half an event", "data: a line\n", "\n")))
def test_events_are_the_same(stream: str, where: list[int], tail: str) -> None:
    data = (stream + tail).encode()
    check(data, list(pieces(data, where)))
    check(data, one_by_one(data))


@FUZZ
@given(st.text("data: x\n\r\n:id", max_size=80), cuts(80))
def test_events_are_the_same_whatever_the_line_ends(stream: str, where: list[int]) -> None:
    data = stream.encode()
    check(data, list(pieces(data, where)))
    check(data, one_by_one(data))


def test_the_reference_reader() -> None:
    """It notices a comment inside an event, and an event that padding removed."""
    assert server_sent_events(b"data: a\ndata: b\n\n") == [("message", "a\nb", "")]
    assert server_sent_events(b"data: a\n:  \n\ndata: b\n\n") == [("message", "a", ""), ("message", "b", "")]
    assert server_sent_events(b"event: e\nid: 1\ndata:  a\n\n:\n\ndata\n\n") == [("e", " a", "1"), ("message", "", "1")]
    assert server_sent_events(b"data: a\r\n\r\ndata: b\r\rdata: c\n") == [("message", "a", ""), ("message", "b", "")]


@pytest.mark.parametrize("length", [1, 100, 400, 500, 508, 509, 510, 511, 512, 513, 1000, 1020, 1024, 5000])
def test_an_event_takes_whole_buckets(length: int) -> None:
    event = b"data:" + b"x" * (length - 7) + b"\n\n" if length > 7 else b"\n\n"
    (out,), rest = padded([event])
    assert rest == b""
    assert len(out) % EVENT_BUCKET == 0
    # The comment needs three bytes; no more than that is added beyond the next bucket.
    assert len(out) == -(-(len(event) + 3) // EVENT_BUCKET) * EVENT_BUCKET


def test_tokens_of_any_length_look_alike() -> None:
    sizes = {len(padded([b'data: {"token": "' + b"x" * size + b'"}\n\n'])[0][0]) for size in range(400)}
    assert sizes == {EVENT_BUCKET}


def test_events_that_are_ready_together_share_one_comment() -> None:
    (out,), _ = padded([b"data: 1\n\ndata: 2\n\ndata: [DONE]\n\n"])
    assert len(out) == EVENT_BUCKET
    assert out.count(b":") == 4


def test_half_an_event_waits_for_its_end() -> None:
    padder = EventPadder(Padding.PAD)
    assert padder.feed(b"data: one\n\ndata: tw").startswith(b"data: one\n\n:")
    assert padder.feed(b"o\n") == b""
    assert padder.feed(b"\n").startswith(b"data: two\n\n:")
    assert padder.feed(b"data: three") == b""
    assert padder.finish() == b"data: three"
    assert padder.finish() == b""


def test_all_whole_events_leave_and_only_the_rest_is_held() -> None:
    padder = EventPadder(Padding.PAD)
    assert padder.feed(b"data: 1\n\ndata: 2\n\ndata: 3\n\ndata").startswith(b"data: 1\n\ndata: 2\n\ndata: 3\n\n:")
    assert padder.finish() == b"data"
    # A blank line is whole, although it ends no event.
    assert padder.feed(b"\n\ndata").startswith(b"\n\n:")
    assert padder.finish() == b"data"


@FUZZ
@given(st.binary(max_size=100), cuts(100))
def test_off_changes_nothing(data: bytes, where: list[int]) -> None:
    padder = EventPadder(Padding.OFF)
    for piece in pieces(data, where):
        assert padder.feed(piece) == piece
    assert padder.finish() == b""
