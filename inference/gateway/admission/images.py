"""The kind and size of an image, read from its first bytes: PNG, JPEG, WebP, GIF.

A few kilobytes can unpack to gigabytes in the engine, so the size is read here before anything is unpacked. Nothing is
decompressed. Files in which a lenient decoder could find another size are refused: two sizes, junk between segments.
"""

from dataclasses import dataclass

_PNG = b"\x89PNG\r\n\x1a\n"
_JPEG = b"\xff\xd8"
_SIZES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
"""JPEG's markers of a frame (SOFn)."""
_ALONE = frozenset({0x00, 0x01, *range(0xD0, 0xDA)})
"""JPEG's markers without a length, which are invalid before the first scan."""
_SCAN = 0xDA


class BadImage(ValueError):
    """Not an image of the four kinds, or one without a definite size."""


@dataclass(frozen=True)
class Image:
    """`kind`: the subtype of its media type."""

    kind: str
    width: int
    height: int

    @property
    def pixels(self) -> int:
        """Of one frame: vLLM looks only at the first of an animation."""
        return self.width * self.height


def read(data: bytes) -> Image:
    """Raises `BadImage`."""
    try:
        if data.startswith(_PNG):
            kind, (width, height) = "png", _png(data)
        elif data.startswith(_JPEG):
            kind, (width, height) = "jpeg", _jpeg(data)
        elif data.startswith((b"GIF87a", b"GIF89a")):
            kind, (width, height) = "gif", _gif(data)
        elif data.startswith(b"RIFF") and data[8:12] == b"WEBP":
            kind, (width, height) = "webp", _webp(data)
        else:
            raise BadImage("another kind of file")
    except IndexError:
        raise BadImage("cut off") from None
    if not width or not height:
        raise BadImage("without a size")
    return Image(kind, width, height)


def _png(data: bytes) -> tuple[int, int]:
    """Chunks of length, type, content and checksum. A later header would change the size."""
    at = len(_PNG)
    size = None
    while True:
        length, kind = int.from_bytes(_exactly(data, at, 4), "big"), _exactly(data, at + 4, 4)
        if (kind == b"IHDR") != (size is None):
            raise BadImage("not one header, first")
        if kind == b"IHDR":
            content = _exactly(data, at + 8, 13)
            size = int.from_bytes(content[:4], "big"), int.from_bytes(content[4:8], "big")
        elif kind == b"IDAT" and size is not None:
            return size
        at += 12 + length


def _jpeg(data: bytes) -> tuple[int, int]:
    """Segments of 0xFF, marker, length and content up to the first scan."""
    at = len(_JPEG)
    size = None
    while True:
        if data[at] != 0xFF:
            raise BadImage("junk between segments")
        marker = data[at + 1]
        if marker == 0xFF:
            # Fill bytes.
            at += 1
            continue
        if marker in _ALONE:
            raise BadImage("a marker out of place")
        if marker in _SIZES:
            if size is not None:
                raise BadImage("two sizes")
            content = _exactly(data, at + 4, 5)
            size = int.from_bytes(content[3:5], "big"), int.from_bytes(content[1:3], "big")
        elif marker == _SCAN:
            if size is None:
                raise BadImage("no size")
            return size
        length = int.from_bytes(_exactly(data, at + 2, 2), "big")
        if length < 2:
            raise BadImage("a segment without its length")
        at += 2 + length


def _gif(data: bytes) -> tuple[int, int]:
    """The screen's size. A decoder enlarges the screen if the first frame goes beyond it."""
    width, height = _little(data, 6, 2), _little(data, 8, 2)
    at = 13 + _palette(data[10])
    _exactly(data, 11, 2)
    while True:
        block = data[at]
        if block == 0x2C:
            left, top, across, down = (_little(data, at + place, 2) for place in (1, 3, 5, 7))
            return max(width, left + across), max(height, top + down)
        if block == 0x21:
            at += 2
            while data[at]:
                at += 1 + data[at]
        elif block:
            raise BadImage("a block out of place")
        at += 1


def _palette(flags: int) -> int:
    return 3 << (flags & 7) + 1 if flags & 0x80 else 0


def _webp(data: bytes) -> tuple[int, int]:
    """The first chunk: lossy, lossless, or the extended form's canvas."""
    kind = data[12:16]
    if kind == b"VP8 " and _exactly(data, 23, 3) == b"\x9d\x01\x2a":
        return _little(data, 26, 2) & 0x3FFF, _little(data, 28, 2) & 0x3FFF
    if kind == b"VP8L" and data[20] == 0x2F:
        bits = _little(data, 21, 4)
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    if kind == b"VP8X":
        return _little(data, 24, 3) + 1, _little(data, 27, 3) + 1
    raise BadImage("no picture in it")


def _little(data: bytes, at: int, length: int) -> int:
    return int.from_bytes(_exactly(data, at, length), "little")


def _exactly(data: bytes, at: int, length: int) -> bytes:
    found = data[at : at + length]
    if len(found) != length:
        raise BadImage("cut off")
    return found
