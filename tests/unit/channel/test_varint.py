"""Variable-length integers (RFC 9000, 16)."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adytum.inference.channel import varint
from adytum.inference.channel.errors import ExchangeMisuse
from tests.unit.channel.support import FUZZ, unhex

# RFC 9000, A.1.
RFC_9000 = [("c2197c5eff14e88c", 151288809941952652), ("9d7f3e7d", 494878333), ("7bbd", 15293), ("25", 37)]
EDGES = [
    ("00", 0),
    ("3f", 63),
    ("4040", 64),
    ("7fff", 16383),
    ("80004000", 16384),
    ("bfffffff", (1 << 30) - 1),
    ("c000000040000000", 1 << 30),
    ("ffffffffffffffff", (1 << 62) - 1),
]


@pytest.mark.parametrize(("encoded", "value"), RFC_9000 + EDGES)
def test_known(encoded: str, value: int) -> None:
    data = unhex(encoded)
    assert varint.encode(value) == data
    assert varint.decode(data, 0) == (value, len(data))
    assert varint.decode(b"\xff" + data + b"\xff", 1) == (value, 1 + len(data))
    for end in range(len(data)):
        assert varint.decode(data[:end], 0) is None


@pytest.mark.parametrize("encoded", ["4025", "80000025", "c000000000000025"])
def test_longer_forms_are_valid(encoded: str) -> None:
    assert varint.decode(unhex(encoded), 0) == (37, len(unhex(encoded)))


def test_63_bits_do_not_fit() -> None:
    with pytest.raises(ExchangeMisuse):
        varint.encode(1 << 62)


@FUZZ
@given(st.integers(0, (1 << 62) - 1))
def test_round_trip(value: int) -> None:
    assert varint.decode(varint.encode(value), 0) == (value, len(varint.encode(value)))
