"""Cells: an answer in chunks of one size, in one of a few numbers, whatever its content (`padding = "constant"`).

Every write of an answer's body, including the first and the last, has exactly `Cells.size` bytes on the wire: framing,
response nonce, ciphertext and tag together. Events that are ready fill a cell, and one event may be split over several
cells. A comment (WHATWG HTML, 9.2.6) between events fills the rest. An answer has `least` cells, or twice as many, and
so on. The event that closes a stream is in the last cell, so that a client that stops reading at that event reveals
nothing. The gateway's clock decides when a cell is sent (`inference/gateway/exchange/shaping.py`).
"""

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from adytum.inference.channel import bhttp, ehbp, ohttp
from adytum.inference.channel.errors import ExchangeMisuse
from adytum.inference.channel.hpke import TAG_LENGTH

SMALLEST = 256
"""Bytes of the smallest cell. Most of a smaller one would be framing."""
LARGEST = 16_384
"""Bytes of the largest cell. Every receiver of chunked OHTTP accepts it (draft-ietf-ohai-chunked-ohttp-08, 3)."""
# Above this many bytes an answer grows in steps of this many bytes and no longer doubles, because receivers of binary
# HTTP accept only bounded padding.
_WIDEST_STEP = 1024 * 1024
# Up to this size a closing event is held for the last cell. The limit bounds what an engine can make the gateway hold.
_HELD_LIMIT = 1024 * 1024
_EVENT_END = b"\n\n"
_COMMENT_LENGTH = 3
# Room for the end of a comment that began in the previous cell, and for a receipt that is a few bytes longer than the
# trial one.
_SPARE = 16
_OHTTP_FRAME = 2  # The varint of a chunk's length: every cell's chunk has between 64 and 16,383 bytes.
_OHTTP_FINAL = 1
_EHBP_FRAME = 4
# How streams of each API end, and how errors in them begin. Content is JSON, so a model cannot begin an event.
_CLOSING = re.compile(
    rb'(?:\A|\n\n)(?=data: \[DONE\]|data: \{"(?:type": ?"error|error)"|event: (?:error|message_stop|response\.(?:'
    rb"completed|failed|incomplete))\n)"
)


@dataclass(frozen=True)
class Cells:
    """The shape of answers. Raises `ValueError` for values out of range."""

    size: int
    """Bytes of each write of an answer's body, all framing included."""
    least: int
    """Cells of the shortest answer."""
    cadence_s: float
    """Seconds between two cells."""

    def __post_init__(self) -> None:
        if not SMALLEST <= self.size <= LARGEST or self.least < 1 or not self.cadence_s > 0:
            raise ValueError("these cells cannot be made: size, least or cadence_s is out of range")

    def total(self, needed: int) -> int:
        """The number of cells of an answer that needs `needed` of them: `least`, doubled until it is enough."""
        total = self.least
        while total < needed:
            total += min(total, _WIDEST_STEP // self.size)
        return total


class Box(Protocol):
    """How a protocol turns plaintext into a cell."""

    overhead: int
    """Bytes that `content` adds to 64 bytes of content or more."""

    def room(self, *, first: bool, last: bool) -> int:
        """The number of plaintext bytes in a cell."""

    def content(self, data: bytes) -> bytes:
        """`data` as it appears in the plaintext."""

    def fill(self, size: int) -> bytes:
        """`size` bytes of padding, to follow the answer's end."""

    def seal(self, plaintext: bytes, *, first: bool, last: bool) -> bytes:
        """The sealed cell, ready for the wire."""


class OhttpBox:
    """Chunked Oblivious HTTP: a chunk of a binary HTTP message in each cell, and the response nonce in the first."""

    overhead = 2

    def __init__(self, sealer: ohttp.ResponseSealer, size: int) -> None:
        self._sealer = sealer
        self._size = size
        self._nonce = sealer.start()

    def room(self, *, first: bool, last: bool) -> int:
        frame = _OHTTP_FINAL if last else _OHTTP_FRAME
        return self._size - frame - TAG_LENGTH - (len(self._nonce) if first else 0)

    def content(self, data: bytes) -> bytes:
        return bhttp.encode_content(data)

    def fill(self, size: int) -> bytes:
        # RFC 9292, 3.8.
        return bytes(size)

    def seal(self, plaintext: bytes, *, first: bool, last: bool) -> bytes:
        sealed = self._sealer.final(plaintext) if last else self._sealer.chunk(plaintext)
        return self._nonce + sealed if first else sealed


class EhbpBox:
    """EHBP: each cell is one frame. `is_stream`: of events, otherwise of a text that may be followed by spaces."""

    overhead = 0

    def __init__(self, sealer: ehbp.ResponseSealer, size: int, *, is_stream: bool) -> None:
        self._sealer = sealer
        self._size = size
        self._is_stream = is_stream

    def room(self, *, first: bool, last: bool) -> int:
        return self._size - _EHBP_FRAME - TAG_LENGTH

    def content(self, data: bytes) -> bytes:
        return data

    def fill(self, size: int) -> bytes:
        if not self._is_stream:
            return b" " * size
        return _comment(size) if size >= _COMMENT_LENGTH else b"\n" * size

    def seal(self, plaintext: bytes, *, first: bool, last: bool) -> bytes:
        return self._sealer.frame(plaintext)


def whole(cells: Cells, box: Box, message: bytes) -> bytes:
    """All cells of an answer that is not streamed. `Cells.total` determines their number."""
    return _fill(box, message, 0, cells.total(_needed(box, len(message))))


class CellStream:
    """The cells of a stream of events. `head`: the plaintext that precedes the first event."""

    def __init__(self, cells: Cells, box: Box, head: bytes) -> None:
        self._cells = cells
        self._box = box
        self._plain = bytearray(head)  # Is sent first: what did not fit into the previous cell.
        self._ready = bytearray()  # Whole events; part of the first may already be sent.
        self._held = b""  # The closing event and all after it, or the start of an event.
        self._count = 0
        self._hash = hashlib.sha256()

    @property
    def waiting(self) -> int:
        """Bytes of events that are not in a cell yet."""
        return len(self._ready)

    def feed(self, data: bytes) -> None:
        """Takes the next bytes of the event stream."""
        data = self._held + data
        closing = _CLOSING.search(data)
        end = closing.end() if closing is not None else data.rfind(_EVENT_END) + 2
        if closing is not None and len(data) - end > _HELD_LIMIT:
            end = data.rfind(_EVENT_END) + 2
        if end < 2:
            end = 0
        self._ready += data[:end]
        self._held = data[end:]

    def cell(self) -> bytes:
        """The next cell: the events that are ready, and padding."""
        first = self._count == 0
        room = self._box.room(first=first, last=False)
        while (missing := room - len(self._plain)) > 0:
            self._take(self._content(max(missing - self._box.overhead, _COMMENT_LENGTH)))
        plaintext = bytes(self._plain[:room])
        del self._plain[:room]
        self._count += 1
        return self._box.seal(plaintext, first=first, last=False)

    def _content(self, size: int) -> bytes:
        """`size` bytes of events and comments, or up to two more, because a comment has at least three bytes."""
        data = bytes(self._ready[:size])
        del self._ready[:size]
        if len(data) == size:
            return data
        return data + _comment(max(size - len(data), _COMMENT_LENGTH))

    def _take(self, content: bytes) -> None:
        self._hash.update(content)
        self._plain += self._box.content(content)

    def finish(self, end: Callable[[bytes], bytes]) -> bytes:
        """The remaining cells. `end` returns the plaintext that follows the content, from the content's SHA-256."""
        cells = []
        while self._ready:
            cells.append(self.cell())
        held, self._held = self._held, b""
        # The padding is part of the content, and its amount depends on the length of the end. So `end` is called once
        # for that length and once with the digest.
        tail = len(self._box.content(held) if held else b"") + len(end(bytes(self._hash.digest_size)))
        last = _needed(self._box, len(self._plain) + tail + _SPARE)
        total = self._cells.total(self._count + last)
        while self._count < total - last:
            cells.append(self.cell())
        if held:
            self._take(held)
        plaintext = bytes(self._plain) + end(self._hash.digest())
        cells.append(_fill(self._box, plaintext, self._count, total))
        return b"".join(cells)


def _needed(box: Box, size: int) -> int:
    """A number of cells that is enough for `size` bytes of plaintext."""
    return max(1, -(-size // box.room(first=True, last=False)))


def _fill(box: Box, plaintext: bytes, start: int, total: int) -> bytes:
    """The cells from `start` to the last one: `plaintext`, followed by padding."""
    rooms = [box.room(first=at == 0, last=at == total - 1) for at in range(start, total)]
    spare = sum(rooms) - len(plaintext)
    if spare < 0:
        raise ExchangeMisuse("the plaintext does not fit into its cells")
    plaintext += box.fill(spare)
    cells, taken = [], 0
    for at, room in enumerate(rooms, start):
        cells.append(box.seal(plaintext[taken : taken + room], first=at == 0, last=at == total - 1))
        taken += room
    return b"".join(cells)


def _comment(size: int) -> bytes:
    """A comment and the blank line that ends it: `size` bytes, at least three."""
    return b":%*b\n\n" % (size - _COMMENT_LENGTH, b"")
