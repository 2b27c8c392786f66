"""Binary HTTP messages (RFC 9292): both framings, requests and responses, encoded and decoded incrementally.

`Decoder` takes bytes as they arrive and returns head, content and trailers as soon as each is complete. A message that
ends early is an error, unless it ends where RFC 9292, 3.8 allows trailing empty sections to be omitted.
"""

import re
from collections.abc import Generator
from dataclasses import dataclass
from typing import Literal

from adytum.inference.channel import varint
from adytum.inference.channel.errors import ExchangeMisuse, MalformedMessage, MessageTooLarge, TruncatedMessage
from adytum.inference.channel.limits import DEFAULT_LIMITS, Limits

Fields = tuple[tuple[bytes, bytes], ...]
"""Header or trailer lines: lower-case name and value."""

_KNOWN_REQUEST, _KNOWN_RESPONSE, _INDETERMINATE_REQUEST, _INDETERMINATE_RESPONSE = range(4)
# RFC 9110: a token in lower case, as RFC 9292, 3.6 requires; a value without NUL, CR and LF.
_NAME = re.compile(rb"[a-z0-9!#$%&'*+.^_`|~-]+")
_METHOD = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+")
_BAD_VALUE = re.compile(rb"[\x00\r\n]")
_PATH = re.compile(r"/[\x21-\x7e]*")


# No `repr`: these hold prompts, answers and API keys, and a repr ends up in logs.
@dataclass(frozen=True, repr=False)
class RequestHead:
    """Control data and header of a request. `path` includes the query."""

    method: str
    scheme: str
    authority: str
    path: str
    fields: Fields = ()


@dataclass(frozen=True, repr=False)
class ResponseHead:
    """Final status (200 to 599) and header of a response."""

    status: int
    fields: Fields = ()


@dataclass(frozen=True, repr=False)
class Content:
    """A piece of content, never empty."""

    data: bytes


@dataclass(frozen=True, repr=False)
class Trailers:
    """The trailer lines. A message without trailer lines has no such event."""

    fields: Fields


Head = RequestHead | ResponseHead
Event = Head | Content | Trailers


def field(fields: Fields, name: bytes) -> bytes | None:
    """The first value of the field `name`, which is lower-case, or `None`."""
    for key, value in fields:
        if key == name:
            return value
    return None


def _with_length(data: bytes) -> bytes:
    return varint.encode(len(data)) + data


def _control(head: Head) -> bytes:
    if isinstance(head, ResponseHead):
        return varint.encode(head.status)
    try:
        parts = [part.encode("ascii") for part in (head.method, head.scheme, head.authority, head.path)]
    except UnicodeEncodeError as error:
        raise ExchangeMisuse("control data must be ASCII") from error
    return b"".join(map(_with_length, parts))


def _lines(fields: Fields) -> bytes:
    for name, value in fields:
        if not _NAME.fullmatch(name) or _BAD_VALUE.search(value):
            raise ExchangeMisuse("a field line is not valid HTTP")
    return b"".join(_with_length(name) + _with_length(value) for name, value in fields)


def encode(head: Head, content: bytes = b"", trailers: Fields = (), *, pad_to: int = 1) -> bytes:
    """A whole message in the known-length form, padded with zero bytes to a multiple of `pad_to`."""
    framing = _KNOWN_RESPONSE if isinstance(head, ResponseHead) else _KNOWN_REQUEST
    sections = (_lines(head.fields), content, _lines(trailers))
    message = bytes((framing,)) + _control(head) + b"".join(map(_with_length, sections))
    return message + bytes(-len(message) % pad_to)


def encode_head(head: Head) -> bytes:
    """The start of a message in the indeterminate-length form: framing, control data and header."""
    framing = _INDETERMINATE_RESPONSE if isinstance(head, ResponseHead) else _INDETERMINATE_REQUEST
    return bytes((framing,)) + _control(head) + _lines(head.fields) + b"\x00"


def encode_content(data: bytes) -> bytes:
    """One content chunk of the indeterminate-length form; empty for no data, because a zero length ends the content."""
    return varint.encode(len(data)) + data if data else b""


def encode_end(trailers: Fields = ()) -> bytes:
    """The end of the content and the trailers, in the indeterminate-length form."""
    return b"\x00" + _lines(trailers) + b"\x00"


_Parser = Generator[None, None, None]


class Decoder:
    """Decodes one message. `feed()` bytes, then `finish()`. Each returns the events that became complete."""

    def __init__(self, kind: Literal["request", "response"], limits: Limits = DEFAULT_LIMITS) -> None:
        self._response = kind == "response"
        self._limits = limits
        self._buffer = bytearray()
        self._at = 0
        self._dropped = 0
        self._ended = False
        self._events: list[Event] = []
        self._failed = False
        self._parser = self._message()
        next(self._parser)

    def feed(self, data: bytes) -> list[Event]:
        """The events that `data` completes. Raises `MalformedMessage` or `MessageTooLarge`."""
        if self._ended:
            raise ExchangeMisuse("the message has already ended")
        self._buffer += data
        return self._advance()

    def finish(self) -> list[Event]:
        """The last events. Raises `TruncatedMessage` if the message is incomplete."""
        if self._ended:
            raise ExchangeMisuse("the message has already ended")
        self._ended = True
        return self._advance()

    def _advance(self) -> list[Event]:
        if self._failed:
            raise ExchangeMisuse("the message already failed")
        try:
            next(self._parser)
        except StopIteration:
            pass
        except Exception:
            self._failed = True
            raise
        del self._buffer[: self._at]
        self._dropped += self._at
        self._at = 0
        events, self._events = self._events, []
        return events

    # The parser: a generator that yields when it needs more bytes.

    def _message(self) -> _Parser:
        yield
        framing = yield from self._integer()
        if framing not in (
            (_KNOWN_RESPONSE, _INDETERMINATE_RESPONSE) if self._response else (_KNOWN_REQUEST, _INDETERMINATE_REQUEST)
        ):
            raise MalformedMessage("the framing indicator is not the expected one")
        known = framing in (_KNOWN_REQUEST, _KNOWN_RESPONSE)
        if self._response:
            yield from self._response_head(known)
        else:
            yield from self._request_head(known)
        if known:
            yield from self._known_content()
        else:
            yield from self._chunked_content()
        trailers = yield from self._section(known)
        if trailers:
            self._events.append(Trailers(trailers))
        yield from self._padding()

    def _request_head(self, known: bool) -> Generator[None, None, None]:
        parts: list[str] = []
        room = self._limits.control
        for _ in range(4):
            part = yield from self._prefixed(room)
            room -= len(part)
            try:
                parts.append(part.decode("ascii"))
            except UnicodeDecodeError as error:
                raise MalformedMessage("control data is not ASCII") from error
        method, scheme, authority, path = parts
        if not _METHOD.fullmatch(method) or not _PATH.fullmatch(path):
            raise MalformedMessage("method or path is not valid HTTP")
        fields = yield from self._section(known)
        self._events.append(RequestHead(method, scheme, authority, path, fields))

    def _response_head(self, known: bool) -> Generator[None, None, None]:
        for _ in range(self._limits.informational + 1):
            status = yield from self._integer()
            if not 100 <= status <= 599:
                raise MalformedMessage("the status is out of range")
            fields = yield from self._section(known)
            if status >= 200:
                self._events.append(ResponseHead(status, fields))
                return
        raise MessageTooLarge("too many informational responses")

    def _known_content(self) -> Generator[None, None, None]:
        if (yield from self._at_end()):
            return
        left = yield from self._integer()
        if left > self._limits.message:
            raise MessageTooLarge("the content is too long")
        while left:
            while self._at == len(self._buffer):
                yield from self._more()
            data = bytes(self._buffer[self._at : self._at + left])
            self._at += len(data)
            left -= len(data)
            self._events.append(Content(data))

    def _chunked_content(self) -> Generator[None, None, None]:
        # Only empty content may be omitted. After a chunk the zero that ends the content is required.
        if (yield from self._at_end()):
            return
        left = self._limits.message
        for _ in range(self._limits.chunks + 1):
            # `_prefixed` and `_integer` inlined: every event of a stream passes here, and resuming nested generators
            # is slow.
            while (found := varint.decode(self._buffer, self._at)) is None or len(self._buffer) < sum(found):
                if found is not None and found[0] > left:
                    break
                if self._ended:
                    raise TruncatedMessage("the binary HTTP message is truncated")
                yield
            length, start = found
            if length > left:
                raise MessageTooLarge("a part of the binary HTTP message is too long")
            self._at = start + length
            if not length:
                return
            left -= length
            self._events.append(Content(bytes(self._buffer[start : self._at])))
        raise MessageTooLarge("too many content chunks")

    def _section(self, known: bool) -> Generator[None, None, Fields]:
        """A section's field lines. `known`: their length precedes them; otherwise a zero ends them. May be omitted."""
        if (yield from self._at_end()):
            return ()
        lines: list[tuple[bytes, bytes]] = []
        room = self._limits.field_section
        if known:
            length = yield from self._integer()
            if length > room:
                raise MessageTooLarge("a field section is too long")
            room = length
        while not known or room > 0:
            before = self._dropped + self._at
            name = yield from self._prefixed(room)
            if not name:
                if known:
                    raise MalformedMessage("a field name is empty")
                return tuple(lines)
            value = yield from self._prefixed(room)
            room -= self._dropped + self._at - before
            if room < 0:
                if known:
                    raise MalformedMessage("a field line runs past its section")
                raise MessageTooLarge("a field section is too long")
            if not _NAME.fullmatch(name) or _BAD_VALUE.search(value):
                raise MalformedMessage("a field line is not valid HTTP")
            lines.append((name, value))
            if len(lines) > self._limits.field_lines:
                raise MessageTooLarge("too many field lines")
        return tuple(lines)

    def _padding(self) -> Generator[None, None, None]:
        padded = 0
        while True:
            rest = self._buffer[self._at :]
            padded += len(rest)
            if any(rest):
                raise MalformedMessage("padding is not zero")
            if padded > self._limits.padding:
                raise MessageTooLarge("too much padding")
            self._at = len(self._buffer)
            if self._ended:
                return
            yield

    def _at_end(self) -> Generator[None, None, bool]:
        while self._at == len(self._buffer):
            if self._ended:
                return True
            yield
        return False

    def _more(self) -> Generator[None, None, None]:
        if self._ended:
            raise TruncatedMessage("the binary HTTP message is truncated")
        yield

    def _integer(self) -> Generator[None, None, int]:
        while (found := varint.decode(self._buffer, self._at)) is None:
            yield from self._more()
        value, self._at = found
        return value

    def _prefixed(self, most: int) -> Generator[None, None, bytes]:
        length = yield from self._integer()
        if length > most:
            raise MessageTooLarge("a part of the binary HTTP message is too long")
        while len(self._buffer) < self._at + length:
            yield from self._more()
        self._at += length
        return bytes(self._buffer[self._at - length : self._at])
