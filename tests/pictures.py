"""Small images of one colour: PNGs made here, and the other kinds as Pillow 13 saved them."""

import base64
import struct
import zlib

RED = (220, 20, 20)


def png(colour: tuple[int, int, int] = RED, width: int = 24, height: int = 16, *, rows: int | None = None) -> bytes:
    """Eight bits a channel. `rows`: how many there really are, where the header lies."""
    return _png(width, height, (b"\x00" + bytes(colour) * width) * (height if rows is None else rows), 9)


def carrying(data: bytes, side: int = 32) -> bytes:
    """A PNG whose pixels, and whose bytes since nothing is compressed, are `data` over and over, in each line anew."""
    line = (data * (3 * side // len(data) + 1))[: 3 * side]
    return _png(side, side, (b"\x00" + line) * side, 0)


def _png(width: int, height: int, lines: bytes, level: int) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    packed = zlib.compress(lines, level)
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + _chunk(b"IDAT", packed) + _chunk(b"IEND", b"")


def bomb(side: int) -> bytes:
    """A PNG of `side` x `side` black pixels, one bit each: some kilobytes that decode to gigabytes."""
    packer = zlib.compressobj(9)
    line = bytes(1 + (side + 7) // 8)
    packed = b"".join(packer.compress(line) for _ in range(side)) + packer.flush()
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + _chunk(b"IDAT", packed) + _chunk(b"IEND", b"")


def data_url(image: bytes, kind: str = "image/png") -> str:
    """As clients send it."""
    return f"data:{kind};base64,{base64.b64encode(image).decode()}"


def _chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


_SAVED = {
    "jpeg": (
        "/9j/4AAQSkZJRgABAQAAAQABAAD/2wBDABALDA4MChAODQ4SERATGCgaGBYWGDEjJR0oOjM9PDkzODdASFxOQERXRTc4UG1RV19iZ2hnPk1x"
        "eXBkeFxlZ2P/2wBDARESEhgVGC8aGi9jQjhCY2NjY2NjY2NjY2NjY2NjY2NjY2NjY2NjY2NjY2NjY2NjY2NjY2NjY2NjY2NjY2NjY2P/wAAR"
        "CAAQABgDASIAAhEBAxEB/8QAFQABAQAAAAAAAAAAAAAAAAAAAAX/xAAUEAEAAAAAAAAAAAAAAAAAAAAA/8QAFgEBAQEAAAAAAAAAAAAAAAAA"
        "AAUG/8QAFBEBAAAAAAAAAAAAAAAAAAAAAP/aAAwDAQACEQMRAD8AjgJ7XgAP/9k="
    ),
    "webp": "UklGRkIAAABXRUJQVlA4IDYAAAAQAwCdASoYABAAPtFUo0uoJKMhsAgBABoJQBYjUAAQNgAA/upl/rvFpRr/5Z/5/fF3u4SzAAA=",
    "webp lossless": "UklGRh4AAABXRUJQVlA4TBEAAAAvF8ADAAdQinKXov+BiOh/AAA=",
    "webp extended": (
        "UklGRmoAAABXRUJQVlA4WAoAAAAQAAAAFwAADwAAQUxQSA0AAAABEAsm84eOoTMiUvcBAFZQOCA2AAAAEAMAnQEqGAAQAD7RVKNLqCSjIbAI"
        "AQAaCUAWI1AAEDYAAP7qZf67xaUa/+Wf+f3xd7uEswAA"
    ),
    "gif": "R0lGODdhGAAQAIEAANwUFAAAAAAAAAAAACwAAAAAGAAQAEAIIgABCBxIsKDBgwgTKlzIsKHDhxAjSpxIsaLFixgzatxoMCAAOw==",
    "gif animated": (
        "R0lGODlhGAAQAIEAANwUFAAAAAAAAAAAACH/C05FVFNDQVBFMi4wAwEAAAAsAAAAABgAEAAACCIAAQgcSLCgwYMIEypcyLChw4cQI0qcSLGi"
        "xYsYM2rcaDAgACH5BAEAAAEALAAAAAAYABAAgRQU3AAAAAAAAAAAAAgiAAEIHEiwoMGDCBMqXMiwocOHECNKnEixosWLGDNq3GgwIAA7"
    ),
}
REDS = {"png": png()} | {name: base64.b64decode(text) for name, text in _SAVED.items()}
"""By kind: 24 x 16 pixels of `RED`. The animated one turns blue; the extended one has a transparent corner."""
