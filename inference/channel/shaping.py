"""Cells: an answer in chunks of one size, in one of few numbers, whatever it says (`padding = "constant"`).

Every write of an answer's body has exactly `Cells.size` bytes on the wire: framing, response nonce, ciphertext and tag
together, the first and the last one too. What is ready fills a cell, an event may be split over several, and a comment
(WHATWG HTML, 9.2.6) between events fills the rest. An answer has `least` cells, or twice as many, and so on; the event
with which a stream says that it is over is in the last of them, so that a client that stops reading there shows nothing
either. When a cell leaves is for the gateway's clock (`inference/gateway/exchange/shaping.py`).
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
"""Bytes of the smallest cell: below it most of a cell would be framing."""
LARGEST = 16_384
"""Bytes of the largest cell: what every receiver of chunked OHTTP takes (draft-ietf-ohai-chunked-ohttp-08, 3)."""
# Beyond this many bytes the number of cells grows by so many bytes and no longer doubles: binary HTTP's receivers take
# a bounded padding only.
_WIDEST_STEP = 1024 * 1024
# A closing event is kept for the last cell up to this size, so that an engine cannot make the gateway keep more.
_HELD_LIMIT = 1024 * 1024
_EVENT_END = b"\n\n"
_COMMENT_LENGTH = 3
# Room for the end of a comment that began in the cell before, and for a receipt that is a few bytes longer than tried.
_SPARE = 16
_OHTTP_FRAME = 2  # The length of a chunk, a varint: all cells' chunks are between 64 and 16,383 bytes long.
_OHTTP_FINAL = 1
_EHBP_FRAME = 4
# How streams of each API end, and how errors in them begin. Content is JSON, so a model cannot write an event's start.
_CLOSING = re.compile(
    rb'(?:\A|\n\n)(?=data: \[DONE\]|data: \{"(?:type": ?"error|error)"|event: (?:error|message_stop|response\.(?:'
    rb"completed|failed|incomplete))\n)"
)


@dataclass(frozen=True)
class Cells:
    """The shape of answers. Raises `ValueError` for one that cannot be."""

    size: int
    """Bytes of each write of an answer's body, all framing included."""
    least: int
    """Cells of the shortest answer."""
    cadence_s: float
    """Seconds between two cells."""

    def __post_init__(self) -> None:
        if not SMALLEST <= self.size <= LARGEST or self.least < 1 or not self.cadence_s > 0:
            raise ValueError("these cells cannot be")

    def total(self, needed: int) -> int:
        """The number of cells of an answer that needs `needed`: `least`, doubled until it is enough."""
        total = self.least
        while total < needed:
            total += min(total, _WIDEST_STEP // self.size)
        return total


class Box(Protocol):
    """How one protocol makes a cell of a plaintext."""

    overhead: int
    """Bytes that `content` adds to content of 64 bytes and more."""

    def room(self, *, first: bool, last: bool) -> int:
        """Plaintext bytes of a cell."""

    def content(self, data: bytes) -> bytes:
        """Content as it stands in the plaintext."""

    def fill(self, size: int) -> bytes:
        """`size` bytes that mean nothing, for behind the answer's end."""

    def seal(self, plaintext: bytes, *, first: bool, last: bool) -> bytes:
        """The cell, ready for the wire."""


class OhttpBox:
    """Chunked Oblivious HTTP: a chunk of a binary HTTP message in each cell, the response nonce in the first."""

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
    """EHBP: a frame in each cell. `is_stream`: of events; else of a text to which spaces may be added."""

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
    """All cells of an answer that is there as a whole: as many as `Cells.total` says."""
    return _fill(box, message, 0, cells.total(_needed(box, len(message))))


class CellStream:
    """The cells of a stream of events. `head`: the plaintext in front of the first event."""

    def __init__(self, cells: Cells, box: Box, head: bytes) -> None:
        self._cells = cells
        self._box = box
        self._plain = bytearray(head)  # Leaves first: what was begun and did not fit into the last cell.
        self._ready = bytearray()  # Whole events, of which the first may have begun to leave.
        self._held = b""  # The closing event and all behind it, or the start of an event.
        self._count = 0
        self._hash = hashlib.sha256()

    @property
    def waiting(self) -> int:
        """Bytes of events that no cell has taken yet."""
        return len(self._ready)

    def feed(self, data: bytes) -> None:
        """Takes what the stream brought."""
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
        """The next cell: what is ready, and padding."""
        first = self._count == 0
        room = self._box.room(first=first, last=False)
        while (missing := room - len(self._plain)) > 0:
            self._take(self._content(max(missing - self._box.overhead, _COMMENT_LENGTH)))
        plaintext = bytes(self._plain[:room])
        del self._plain[:room]
        self._count += 1
        return self._box.seal(plaintext, first=first, last=False)

    def _content(self, size: int) -> bytes:
        """`size` bytes of events and comments, or a few more where a comment has to be longer than the rest."""
        data = bytes(self._ready[:size])
        del self._ready[:size]
        if len(data) == size:
            return data
        return data + _comment(max(size - len(data), _COMMENT_LENGTH))

    def _take(self, content: bytes) -> None:
        self._hash.update(content)
        self._plain += self._box.content(content)

    def finish(self, end: Callable[[bytes], bytes]) -> bytes:
        """All cells to the last one. `end` gives the plaintext behind the content, from the content's SHA-256."""
        cells = []
        while self._ready:
            cells.append(self.cell())
        held, self._held = self._held, b""
        # How many cells of padding there are is part of the content, and depends on how long the end is: it is made
        # once for its length and once for its digest.
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
    """Cells that are enough for `size` bytes of plaintext."""
    return max(1, -(-size // box.room(first=True, last=False)))


def _fill(box: Box, plaintext: bytes, start: int, total: int) -> bytes:
    """The cells from `start` to the last one: `plaintext`, and what means nothing behind it."""
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
    """A comment and the blank line behind it, at least three bytes."""
    return b":%*b\n\n" % (size - _COMMENT_LENGTH, b"")
