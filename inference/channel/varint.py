"""Variable-length integers (RFC 9000, 16), as binary HTTP and chunked OHTTP use them."""

from functools import lru_cache

from adytum.inference.channel.errors import ExchangeMisuse


@lru_cache(4096)
def encode(value: int) -> bytes:
    """`value` in the shortest form, 1 to 8 bytes. Raises `ExchangeMisuse` for 2^62 and above."""
    if value < 1 << 6:
        return value.to_bytes(1, "big")
    if value < 1 << 14:
        return (value | 0x4000).to_bytes(2, "big")
    if value < 1 << 30:
        return (value | 0x8000_0000).to_bytes(4, "big")
    if value < 1 << 62:
        return (value | 0xC000_0000_0000_0000).to_bytes(8, "big")
    raise ExchangeMisuse("a varint holds 62 bits")


def decode(data: bytes | bytearray, at: int) -> tuple[int, int] | None:
    """(value, next offset), or `None` if the integer is incomplete. Longer forms than needed are valid."""
    if at >= len(data):
        return None
    first = data[at]
    length = 1 << (first >> 6)
    if at + length > len(data):
        return None
    value = first & 0x3F
    for byte in data[at + 1 : at + length]:
        value = value << 8 | byte
    return value, at + length
