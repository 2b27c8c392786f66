"""One request and its one answer. The gateway uses the same interface for both protocols.

An `Exchange` is the only object that can answer its request: in one piece (`answer`) or as a stream (`begin`, `data`,
`end`). Only the openings in `openings.py` make one.

If the answer's shape is constant, these methods return whole cells only: `data` keeps what it is given, `cell` returns
the next cell, and `end` and `answer` return all cells to the last one.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, auto

from adytum.inference.channel import bhttp
from adytum.inference.channel.bhttp import Fields
from adytum.inference.channel.errors import ExchangeMisuse
from adytum.inference.channel.padding import EventPadder, Padding
from adytum.inference.channel.shaping import Cells, CellStream

Headers = tuple[tuple[bytes, bytes], ...]
"""Headers of the outer HTTP response."""

Closing = Callable[[bytes], Fields]
"""Returns an answer's trailers, from the SHA-256 of its content."""

Shape = Padding | Cells
"""How an answer's length is hidden."""

_EVENT_STREAM = b"text/event-stream"


class _State(Enum):
    OPENED = auto()
    STREAMING = auto()
    ENDED = auto()


class _Step(Enum):
    ANSWER = auto()
    BEGIN = auto()
    DATA = auto()
    END = auto()


_NEXT: dict[_State, dict[_Step, _State]] = {
    _State.OPENED: {_Step.ANSWER: _State.ENDED, _Step.BEGIN: _State.STREAMING},
    _State.STREAMING: {_Step.DATA: _State.STREAMING, _Step.END: _State.ENDED},
    _State.ENDED: {},
}


@dataclass(frozen=True)
class InnerRequest:
    """The client's request, opened."""

    method: str
    path: str
    fields: Fields
    body: bytes

    def __repr__(self) -> str:
        return "InnerRequest(...)"


@dataclass(frozen=True)
class OuterHead:
    """Status and headers of the outer response."""

    status: int
    headers: Headers


class Exchange(ABC):
    """Answers one opened request. `enc` identifies it in the replay check."""

    can_stream: bool
    has_trailers: bool
    """Whether the protocol carries trailers. If it does not, `closing` is not called."""
    enc: bytes
    message: bytes
    """The opened request, byte for byte as it was sealed."""
    key_configuration: bytes
    """The key configuration that the request was sealed to (RFC 9458, 3). Empty for EHBP."""
    recipient: bytes
    """The public key that the request was sealed to."""
    cells: Cells | None
    """The shape of a constant answer, otherwise `None`."""

    def __init__(self, padding: Shape) -> None:
        if padding is Padding.CONSTANT:
            raise ValueError("a constant answer needs its cells: pass Cells instead of Padding.CONSTANT")
        self._padding = padding
        self.cells = padding if isinstance(padding, Cells) else None
        self._state = _State.OPENED
        self._events: EventPadder | None = None
        self._stream: CellStream | None = None
        self._content = hashlib.sha256()

    @property
    def untouched(self) -> bool:
        """Whether nothing of the answer has been sealed yet."""
        return self._state is _State.OPENED

    @abstractmethod
    def request(self) -> InnerRequest:
        """The opened request. Raises `ChannelError`, which the gateway answers inside the seal."""

    def answer(
        self, status: int, fields: Fields, body: bytes, closing: Closing | None = None
    ) -> tuple[OuterHead, bytes]:
        """A whole answer, padded to a bucket. Ends the exchange."""
        self._step(_Step.ANSWER)
        self._content.update(body)
        return self._answer(status, fields, body, self._trailers(closing))

    def begin(self, status: int, fields: Fields) -> tuple[OuterHead, bytes]:
        """The start of a streamed answer: outer head and first bytes."""
        if not self.can_stream:
            raise ExchangeMisuse("this form of the protocol cannot stream")
        self._step(_Step.BEGIN)
        is_events = (bhttp.field(fields, b"content-type") or b"").startswith(_EVENT_STREAM)
        if isinstance(self._padding, Cells):
            if not is_events:
                raise ExchangeMisuse("only event streams are streamed in cells")
            head, self._stream = self._begin_cells(status, fields, self._padding)
            return head, b""
        if is_events:
            self._events = EventPadder(self._padding)
        return self._begin(status, fields)

    def data(self, data: bytes) -> bytes:
        """The sealed bytes for `data`, which became ready together. Empty for cells and if no event is complete yet."""
        # This runs for every streamed event, and `_step` takes ten times as long as this comparison.
        if self._state is not _State.STREAMING:
            self._step(_Step.DATA)
        if self._events is not None:
            data = self._events.feed(data)
        elif self._stream is not None:
            self._stream.feed(data)
            return b""
        if not data:
            return b""
        self._content.update(data)
        return self._seal(data)

    @property
    def waiting(self) -> int:
        """Bytes of a constant stream that are not in a cell yet."""
        return self._stream.waiting if self._stream is not None else 0

    def cell(self) -> bytes:
        """The next cell of a constant stream: the events that are ready, and padding."""
        self._step(_Step.DATA)
        if self._stream is None:
            raise ExchangeMisuse("this answer does not consist of cells")
        return self._stream.cell()

    def end(self, closing: Closing | None = None) -> bytes:
        """The authenticated end. A client treats a stream without it as truncated. Ends the exchange."""
        self._step(_Step.END)
        if self._stream is not None:
            return self._stream.finish(lambda content: self._end_of_message(self._trailers(closing, content)))
        rest = self._events.finish() if self._events is not None else b""
        self._content.update(rest)
        return (self._seal(rest) if rest else b"") + self._end(self._trailers(closing))

    def _trailers(self, closing: Closing | None, content: bytes | None = None) -> Fields:
        if closing is None or not self.has_trailers:
            return ()
        return closing(content if content is not None else self._content.digest())

    def _step(self, step: _Step) -> None:
        try:
            self._state = _NEXT[self._state][step]
        except KeyError:
            self._state = _State.ENDED
            raise ExchangeMisuse(f"{step.name} is out of order") from None

    @abstractmethod
    def _answer(self, status: int, fields: Fields, body: bytes, trailers: Fields) -> tuple[OuterHead, bytes]: ...
    @abstractmethod
    def _begin(self, status: int, fields: Fields) -> tuple[OuterHead, bytes]: ...
    @abstractmethod
    def _seal(self, data: bytes) -> bytes: ...
    @abstractmethod
    def _end(self, trailers: Fields) -> bytes: ...
    @abstractmethod
    def _begin_cells(self, status: int, fields: Fields, cells: Cells) -> tuple[OuterHead, CellStream]: ...
    @abstractmethod
    def _end_of_message(self, trailers: Fields) -> bytes: ...

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._state.name})"
