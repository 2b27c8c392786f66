"""The byte reader: every length is checked against the bytes that are there, and the caller's error is raised."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adytum.attestation.core.errors import CollectionError, EvidenceError
from adytum.attestation.core.reader import Reader

WHOLE = bytes.fromhex("0102 03000000 0500 68656c6c6f 07")


def parse(data: bytes) -> tuple[object, ...]:
    reader = Reader(data, "the thing")
    found = (reader.integer(2), *reader.unpack("<I"), reader.sized(2), reader.take(1))
    reader.end()
    return found


def test_fields_in_order() -> None:
    assert parse(WHOLE) == (0x0201, 3, b"hello", b"\x07")


def test_truncated_at_every_place() -> None:
    for size in range(len(WHOLE)):
        with pytest.raises(EvidenceError, match="the thing ends before it is complete"):
            parse(WHOLE[:size])


def test_trailing_bytes() -> None:
    with pytest.raises(EvidenceError, match="something follows the thing"):
        parse(WHOLE + b"\x00")
    with pytest.raises(EvidenceError, match="something follows its end"):
        Reader(b"\x00", "the thing").end("its end")


def test_byte_order_and_error_are_the_callers() -> None:
    reader = Reader(b"\x00\x01x\x01", "the answer", order="big", error=CollectionError)
    assert (reader.sized(2), reader.at, reader.left) == (b"x", 3, 1)
    with pytest.raises(CollectionError, match="the answer ends"):
        reader.integer(2)
    assert reader.at == 3


@given(st.binary(max_size=20), st.lists(st.integers(0, 9), max_size=6))
def test_what_is_taken_is_what_was_there(data: bytes, sizes: list[int]) -> None:
    reader = Reader(data, "the thing")
    taken = b""
    for size in sizes:
        if size > reader.left:
            with pytest.raises(EvidenceError):
                reader.take(size)
        else:
            taken += reader.take(size)
    assert taken == data[: reader.at]
