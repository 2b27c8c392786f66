"""From a sealed request to its `Exchange`: the openings of both protocols, and how each protocol seals an answer.

`OhttpOpening` and `EhbpOpening` take the sealed request as it arrives. `open()` returns the `Exchange`.
"""

from dataclasses import dataclass
from http import HTTPStatus

from adytum.inference.channel import bhttp, ehbp, ohttp
from adytum.inference.channel.bhttp import Fields, RequestHead, ResponseHead
from adytum.inference.channel.errors import ChannelError, MalformedMessage
from adytum.inference.channel.exchange import Exchange, Headers, InnerRequest, OuterHead, Shape
from adytum.inference.channel.hpke import TAG_LENGTH, PrivateKey
from adytum.inference.channel.keyconfig import KeyConfiguration
from adytum.inference.channel.limits import DEFAULT_LIMITS, Limits
from adytum.inference.channel.padding import Padding, bucket, pad_json
from adytum.inference.channel.shaping import Cells, CellStream, EhbpBox, OhttpBox, whole

_PIECE = 16_384
"""Plaintext bytes per chunk of a whole answer. Every receiver of chunked OHTTP accepts that many."""
# The first two ask intermediaries not to buffer: RFC 10036's field and nginx's.
_UNBUFFERED: Headers = ((b"incremental", b"?1"), (b"x-accel-buffering", b"no"), (b"cache-control", b"no-store"))

# EHBP's head is outside the seal, and TLS reveals its length. For constant answers the value of a field fills the
# head to this many bytes, not counting the field's own name.
_HEAD_LENGTH = 512
_HEAD_FILL = b"x-fill"


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
