"""One request and its one answer. The gateway uses the same interface for both protocols.

`OhttpOpening` and `EhbpOpening` take the sealed request as it arrives. `open()` returns the `Exchange`, the only object
that can answer this request: in one piece (`answer`) or as a stream (`begin`, `data`, `end`).

If the answer's shape is constant, these methods return whole cells only: `data` keeps what it is given, `cell` returns
the next cell, and `end` and `answer` return all cells to the last one.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, auto
from http import HTTPStatus

from adytum.inference.channel import bhttp, ehbp, ohttp
from adytum.inference.channel.bhttp import Fields, RequestHead, ResponseHead
from adytum.inference.channel.errors import ChannelError, ExchangeMisuse, MalformedMessage
from adytum.inference.channel.hpke import TAG_LENGTH, PrivateKey
from adytum.inference.channel.keyconfig import KeyConfiguration
from adytum.inference.channel.limits import DEFAULT_LIMITS, Limits
from adytum.inference.channel.padding import EventPadder, Padding, bucket, pad_json
from adytum.inference.channel.shaping import Cells, CellStream, EhbpBox, OhttpBox, whole

Headers = tuple[tuple[bytes, bytes], ...]
"""Headers of the outer HTTP response."""

Closing = Callable[[bytes], Fields]
"""Returns an answer's trailers, from the SHA-256 of its content."""

Shape = Padding | Cells
"""How an answer's length is hidden."""

_PIECE = 16_384
"""Plaintext bytes per chunk of a whole answer. Every receiver of chunked OHTTP accepts that many."""
_EVENT_STREAM = b"text/event-stream"
# Both ask intermediaries not to buffer: RFC 10036's field and nginx's.
_UNBUFFERED: Headers = ((b"incremental", b"?1"), (b"x-accel-buffering", b"no"), (b"cache-control", b"no-store"))

# EHBP's head is outside the seal, and TLS reveals its length. For constant answers a field fills it to this many bytes.
_HEAD_LENGTH = 512
_HEAD_FILL = b"x-fill"


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


class OhttpOpening:
    """Takes an encapsulated request as it arrives."""

    def __init__(self, media: ohttp.Media, keys: ohttp.Keys, padding: Shape, limits: Limits = DEFAULT_LIMITS) -> None:
        self._media = media
        self._padding = padding
        self._limits = limits
        self._opener = ohttp.RequestOpener(media, keys, limits)
        self._begun = _Begun(bhttp.Decoder("request", limits), [], 0)
        self.looked = False
        """Whether `fields` has already looked for the header. It looks only once."""

    def feed(self, data: bytes) -> None:
        """Raises `ChannelError`."""
        self._opener.feed(data)

    def fields(self) -> Fields | None:
        """The header, once, as soon as it is authentic; `None` if the first chunk does not contain all of it."""
        if self.looked or not (opened := self._opener.opened):
            return None
        self.looked = True
        decoder = self._begun.decoder
        try:
            events = decoder.feed(opened)
        except ChannelError:
            self._begun = _Begun(bhttp.Decoder("request", self._limits), [], 0)
            return None  # `request()` raises the error again, to be answered inside the seal.
        self._begun = _Begun(decoder, events, len(opened))
        return events[0].fields if events and isinstance(events[0], RequestHead) else None

    def open(self) -> Exchange:
        """Raises `ChannelError`."""
        return self._exchange(*self._opener.finish())

    def abandon(self) -> Exchange:
        """The exchange for an answer that does not need the rest of the request. Raises `ChannelError`."""
        return self._exchange(b"", self._opener.abandon())

    def _exchange(self, message: bytes, sealer: ohttp.ResponseSealer) -> Exchange:
        configuration = self._opener.configuration
        return _OhttpExchange(self._media, message, sealer, self._opener.enc, configuration, self._padding, self._begun)


@dataclass(frozen=True, repr=False)
class _Begun:
    """A message whose first `length` bytes the decoder has already read, and the events in them."""

    decoder: bhttp.Decoder
    events: list[bhttp.Event]
    length: int


class _OhttpExchange(Exchange):
    has_trailers = True

    def __init__(
        self,
        media: ohttp.Media,
        message: bytes,
        sealer: ohttp.ResponseSealer,
        enc: bytes,
        key_configuration: KeyConfiguration,
        padding: Shape,
        begun: _Begun,
    ) -> None:
        super().__init__(padding)
        self.enc = enc
        self.message = message
        self.key_configuration = key_configuration.encode()
        self.recipient = key_configuration.public_key
        self.can_stream = media.chunked
        self._media = media
        self._sealer = sealer
        self._begun = begun
        self._request: InnerRequest | None = None

    def request(self) -> InnerRequest:
        if self._request is None:
            self._request = self._decode()
        return self._request

    def _decode(self) -> InnerRequest:
        begun = self._begun
        events = begun.events + begun.decoder.feed(self.message[begun.length :]) + begun.decoder.finish()
        head = events[0] if events else None
        if not isinstance(head, RequestHead):
            raise MalformedMessage("the message has no head")
        content = b"".join(event.data for event in events if isinstance(event, bhttp.Content))
        return InnerRequest(head.method, head.path, head.fields, content)

    def _head(self) -> OuterHead:
        return OuterHead(200, ((b"content-type", self._media.response.encode()), *_UNBUFFERED))

    def _answer(self, status: int, fields: Fields, body: bytes, trailers: Fields) -> tuple[OuterHead, bytes]:
        message = bhttp.encode(ResponseHead(status, fields), body, trailers)
        if self.cells is not None:
            return self._head(), self._in_cells(message, self.cells)
        if self._padding is Padding.PAD:
            message += bytes(bucket(len(message)) - len(message))
        if not self._media.chunked:
            return self._head(), self._sealer.whole(message)
        start = self._sealer.start()
        pieces = [self._sealer.chunk(message[at : at + _PIECE]) for at in range(0, len(message), _PIECE)]
        return self._head(), start + b"".join(pieces) + self._sealer.final()

    def _in_cells(self, message: bytes, cells: Cells) -> bytes:
        if self._media.chunked:
            return whole(cells, OhttpBox(self._sealer, cells.size), message)
        # One ciphertext, as long as the cells together.
        around = len(self._sealer.nonce) + TAG_LENGTH
        total = cells.total(-(-(len(message) + around) // cells.size)) * cells.size
        return self._sealer.whole(message + bytes(total - around - len(message)))

    def _begin_cells(self, status: int, fields: Fields, cells: Cells) -> tuple[OuterHead, CellStream]:
        head = bhttp.encode_head(ResponseHead(status, fields))
        return self._head(), CellStream(cells, OhttpBox(self._sealer, cells.size), head)

    def _end_of_message(self, trailers: Fields) -> bytes:
        return bhttp.encode_end(trailers)

    def _begin(self, status: int, fields: Fields) -> tuple[OuterHead, bytes]:
        head = bhttp.encode_head(ResponseHead(status, fields))
        return self._head(), self._sealer.start() + self._sealer.chunk(head)

    def _seal(self, data: bytes) -> bytes:
        if len(data) <= _PIECE - 8:
            return self._sealer.chunk(bhttp.encode_content(data))
        message = bhttp.encode_content(data)
        return b"".join(self._sealer.chunk(message[at : at + _PIECE]) for at in range(0, len(message), _PIECE))

    def _end(self, trailers: Fields) -> bytes:
        return self._sealer.chunk(bhttp.encode_end(trailers)) + self._sealer.final()


class EhbpOpening:
    """Takes an EHBP request's body as it arrives. `method`, `path` and `fields` came outside the seal."""

    def __init__(
        self,
        method: str,
        path: str,
        fields: Fields,
        header: str,
        keys: tuple[PrivateKey, ...],
        padding: Shape,
        limits: Limits = DEFAULT_LIMITS,
    ) -> None:
        self._clear = (method, path, fields)
        self._padding = padding
        self._opener = ehbp.RequestOpener(header, keys, limits)
        self.looked = False
        """Whether `fields` has already looked for the header. It looks only once."""

    def feed(self, data: bytes) -> None:
        """Raises `ChannelError`."""
        self._opener.feed(data)

    def open(self) -> Exchange:
        """Raises `ChannelError`."""
        return self._exchange(*self._opener.finish())

    def fields(self) -> Fields | None:
        """The header, once, after a frame has opened: a client that cannot seal a frame gets no answer."""
        if self.looked or not self._opener.recipient:
            return None
        self.looked = True
        return self._clear[2]

    def abandon(self) -> Exchange:
        """The exchange for an answer that does not need the rest of the request. Raises `ChannelError`."""
        return self._exchange(b"", self._opener.abandon())

    def _exchange(self, body: bytes, sealer: ehbp.ResponseSealer) -> Exchange:
        request = InnerRequest(*self._clear, body)
        return _EhbpExchange(request, sealer, self._opener.enc, self._opener.recipient, self._padding)


class _EhbpExchange(Exchange):
    can_stream = True
    has_trailers = False
    key_configuration = b""

    def __init__(
        self, request: InnerRequest, sealer: ehbp.ResponseSealer, enc: bytes, recipient: bytes, padding: Shape
    ) -> None:
        super().__init__(padding)
        self.enc = enc
        self.recipient = recipient
        self.message = request.body
        self._request = request
        self._sealer = sealer

    def request(self) -> InnerRequest:
        return self._request

    def _head(self, status: int, fields: Fields) -> OuterHead:
        nonce = (ehbp.RESPONSE_HEADER.encode(), self._sealer.nonce.hex().encode())
        headers = (nonce, *fields, *_UNBUFFERED)
        if self.cells is not None:
            length = sum(len(name) + len(value) + 4 for name, value in headers)
            length += len(HTTPStatus(status).phrase)
            headers += ((_HEAD_FILL, b"0" * (_HEAD_LENGTH - length)),)
        return OuterHead(status, headers)

    def _answer(self, status: int, fields: Fields, body: bytes, trailers: Fields) -> tuple[OuterHead, bytes]:
        if self.cells is not None:
            box = EhbpBox(self._sealer, self.cells.size, is_stream=False)
            return self._head(status, fields), whole(self.cells, box, body)
        is_json = (bhttp.field(fields, b"content-type") or b"").startswith(b"application/json")
        if self._padding is Padding.PAD and is_json:
            body = pad_json(body)
        return self._head(status, fields), self._sealer.frame(body) if body else b""

    def _begin(self, status: int, fields: Fields) -> tuple[OuterHead, bytes]:
        return self._head(status, fields), b""

    def _seal(self, data: bytes) -> bytes:
        return self._sealer.frame(data)

    def _end(self, trailers: Fields) -> bytes:
        return b""

    def _begin_cells(self, status: int, fields: Fields, cells: Cells) -> tuple[OuterHead, CellStream]:
        box = EhbpBox(self._sealer, cells.size, is_stream=True)
        return self._head(status, fields), CellStream(cells, box, b"")

    def _end_of_message(self, trailers: Fields) -> bytes:
        return b""
