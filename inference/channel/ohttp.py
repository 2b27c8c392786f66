"""Oblivious HTTP, whole (RFC 9458, 4) and chunked (draft-ietf-ohai-chunked-ohttp-08), both ends, without IO.

    request  = key_id u8 | kem u16 | kdf u16 | aead u16 | enc | sealed
    sealed   = ciphertext (whole), or (varint length | ciphertext)* | 00 | final ciphertext (chunked)
    response = nonce | sealed

The object that seals a response can only be obtained by opening the request.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from adytum.inference.channel import hpke, varint
from adytum.inference.channel.errors import (
    ExchangeMisuse,
    MalformedMessage,
    MessageTooLarge,
    TruncatedMessage,
    UnknownKey,
)
from adytum.inference.channel.hpke import ENC_LENGTH, NONCE_LENGTH, TAG_LENGTH, Context, PrivateKey, Sequence, Suite
from adytum.inference.channel.keyconfig import KeyConfiguration
from adytum.inference.channel.limits import DEFAULT_LIMITS, Limits

HEADER_LENGTH = 7
_FINAL = b"final"


@dataclass(frozen=True)
class Media:
    """The media types and labels of one of the two forms."""

    request: str
    response: str
    request_label: bytes
    response_label: bytes
    chunked: bool


WHOLE = Media("message/ohttp-req", "message/ohttp-res", b"message/bhttp request", b"message/bhttp response", False)
CHUNKED = Media(
    "message/ohttp-chunked-req",
    "message/ohttp-chunked-res",
    b"message/bhttp chunked request",
    b"message/bhttp chunked response",
    True,
)

Keys = Callable[[int], tuple[KeyConfiguration, PrivateKey]]
"""Returns the configuration and private key for a key identifier. Raises `UnknownKey`."""


def _info(media: Media, header: bytes) -> bytes:
    return media.request_label + b"\x00" + header


class _ResponseKeys:
    """The input of the response's key derivation. `sequence()` is the derivation of RFC 9458, 4.4."""

    def __init__(self, media: Media, suite: Suite, enc: bytes, context: Context) -> None:
        self.suite = suite
        self._enc = enc
        self.nonce_length = max(hpke.key_length(suite.aead), NONCE_LENGTH)
        self._secret = context.export(media.response_label, self.nonce_length)

    def sequence(self, nonce: bytes) -> Sequence:
        prk = hpke.extract(self._enc + nonce, self._secret)
        key = hpke.expand(prk, b"key", hpke.key_length(self.suite.aead))
        return Sequence(hpke.new_aead(self.suite.aead, key), hpke.expand(prk, b"nonce", NONCE_LENGTH))


class _ChunkReader:
    """Splits the chunked framing and opens each chunk."""

    def __init__(self, sequence: Sequence, limits: Limits) -> None:
        self._sequence = sequence
        self._limits = limits
        self._buffer = bytearray()
        self._in_final = False
        self._chunks = 0
        self._opened = 0

    def feed(self, data: bytes) -> list[bytes]:
        """The plaintexts of the non-final chunks that `data` completes."""
        self._buffer += data
        plaintexts: list[bytes] = []
        at = 0
        while not self._in_final and (found := varint.decode(self._buffer, at)) is not None:
            length, start = found
            if length == 0:
                self._in_final = True
                at = start
                break
            if length <= TAG_LENGTH:
                raise MalformedMessage("a non-final chunk is empty")
            if length > self._limits.chunk + TAG_LENGTH:
                raise MessageTooLarge("a chunk is too long")
            if len(self._buffer) < start + length:
                break
            plaintexts.append(self._open(bytes(self._buffer[start : start + length]), None))
            at = start + length
        del self._buffer[:at]
        if self._in_final and len(self._buffer) > self._limits.chunk + TAG_LENGTH:
            raise MessageTooLarge("the final chunk is too long")
        return plaintexts

    def finish(self) -> bytes:
        """The plaintext of the final chunk, which may be empty. Raises `TruncatedMessage` if that chunk is missing."""
        if not self._in_final or len(self._buffer) < TAG_LENGTH:
            raise TruncatedMessage("the message ends before its final chunk")
        return self._open(bytes(self._buffer), _FINAL)

    def _open(self, ciphertext: bytes, aad: bytes | None) -> bytes:
        self._chunks += 1
        if self._chunks > self._limits.chunks:
            raise MessageTooLarge("too many chunks")
        plaintext = self._sequence.open(ciphertext, aad)
        self._opened += len(plaintext)
        if self._opened > self._limits.message:
            raise MessageTooLarge("the message is too long")
        return plaintext


def _frame(sealed: bytes) -> bytes:
    return varint.encode(len(sealed)) + sealed


# The gateway's end.


class RequestOpener:
    """Opens one encapsulated request: `feed()` its bytes as they arrive, then `finish()`."""

    def __init__(self, media: Media, keys: Keys, limits: Limits = DEFAULT_LIMITS) -> None:
        self._media = media
        self._keys = keys
        self._limits = limits
        self._head = bytearray()
        self._body: _ChunkReader | bytearray | None = None
        self._plain = bytearray()
        self._context: Context | None = None
        self._response: _ResponseKeys | None = None
        self._failed = False
        self._configuration: KeyConfiguration | None = None
        self.enc = b""

    def feed(self, data: bytes) -> None:
        """Raises `ChannelError`. After an error the opener cannot be used again."""
        if self._failed:
            raise ExchangeMisuse("opening this request already failed")
        try:
            self._feed(data)
        except Exception:
            self._failed = True
            raise

    def _feed(self, data: bytes) -> None:
        if self._body is None:
            self._head += data
            data = self._read_head()
        if isinstance(self._body, _ChunkReader):
            for plaintext in self._body.feed(data):
                self._plain += plaintext
        elif self._body is not None:
            self._body += data
            if len(self._body) > self._limits.message + TAG_LENGTH:
                raise MessageTooLarge("the request is too long")

    def _read_head(self) -> bytes:
        """Sets up the context once header and enc are complete. Returns the bytes after them."""
        head = self._head
        if len(head) < HEADER_LENGTH:
            return b""
        header = bytes(head[:HEADER_LENGTH])
        suite = Suite.from_wire(header[1:])
        configuration, key = self._keys(header[0])
        if not configuration.allows(suite):
            raise UnknownKey("the key is not offered with this suite")
        end = HEADER_LENGTH + ENC_LENGTH[suite.kem]
        if len(head) < end:
            return b""
        self.enc = bytes(head[HEADER_LENGTH:end])
        context = hpke.setup_recipient(suite, key, self.enc, _info(self._media, header))
        self._context = context
        self._configuration = configuration
        self._response = _ResponseKeys(self._media, suite, self.enc, context)
        self._body = _ChunkReader(context, self._limits) if self._media.chunked else bytearray()
        rest = bytes(head[end:])
        self._head = bytearray()
        return rest

    @property
    def configuration(self) -> KeyConfiguration:
        """The key configuration that the request was sealed to. Raises `TruncatedMessage` before that is known."""
        if self._configuration is None:
            raise TruncatedMessage("the request ends inside its header")
        return self._configuration

    @property
    def opened(self) -> bytes:
        """The authenticated plaintext so far. Always empty in the whole form, which opens only at its end."""
        return bytes(self._plain)

    def abandon(self) -> "ResponseSealer":
        """The sealer for an answer that does not need the rest of the request. Nothing may be fed after this call.

        Raises `TruncatedMessage` inside the header.
        """
        self._failed = True
        if self._response is None:
            raise TruncatedMessage("the request ends inside its header")
        return ResponseSealer(self._response)

    def finish(self) -> "tuple[bytes, ResponseSealer]":
        """(binary HTTP request, sealer of its response). Raises `ChannelError`."""
        if self._failed:
            raise ExchangeMisuse("opening this request already failed")
        self._failed = True  # Nothing may be fed or finished again, even if this call fails.
        if self._context is None or self._response is None or self._body is None:
            raise TruncatedMessage("the request ends inside its header")
        if isinstance(self._body, _ChunkReader):
            last = self._body.finish()
            return bytes(self._plain) + last, ResponseSealer(self._response)
        if len(self._body) < TAG_LENGTH:
            raise TruncatedMessage("the request is shorter than its authentication tag")
        return self._context.open(bytes(self._body)), ResponseSealer(self._response)


class ResponseSealer:
    """Seals the one response of an opened request: `whole()`, or `start()`, `chunk()`s and `final()`."""

    def __init__(self, keys: _ResponseKeys, nonce: bytes | None = None) -> None:
        self.nonce = nonce or os.urandom(keys.nonce_length)
        self._sequence: Sequence | None = keys.sequence(self.nonce)
        self._started = False

    def whole(self, message: bytes) -> bytes:
        """The encapsulated response of the whole form. Ends the sealer."""
        if self._started:
            raise ExchangeMisuse("the response has already started")
        return self.start() + self._take().seal(message)

    def start(self) -> bytes:
        """The nonce with which a chunked response begins."""
        if self._started:
            raise ExchangeMisuse("the response has already started")
        self._started = True
        return self.nonce

    def chunk(self, plaintext: bytes) -> bytes:
        """A non-final chunk of at least one byte, framed."""
        if self._sequence is None or not self._started or not plaintext:
            raise ExchangeMisuse("a chunk needs a started response and at least one byte")
        return _frame(self._sequence.seal(plaintext))

    def final(self, plaintext: bytes = b"") -> bytes:
        """The final chunk. A receiver treats a response without it as truncated. Ends the sealer."""
        if not self._started:
            raise ExchangeMisuse("the response has not started")
        return b"\x00" + self._take().seal(plaintext, _FINAL)

    def _take(self) -> Sequence:
        if self._sequence is None:
            raise ExchangeMisuse("the response has already ended")
        sequence, self._sequence = self._sequence, None
        return sequence

    def __repr__(self) -> str:
        return "ResponseSealer(...)"


# The client's end.


class RequestSealer:
    """Seals one request to a key configuration: `whole()`, or `start()`, `chunk()`s and `final()`."""

    def __init__(
        self, media: Media, configuration: KeyConfiguration, *, ephemeral: X25519PrivateKey | None = None
    ) -> None:
        self._media = media
        self._suite = configuration.suite
        self._header = bytes((configuration.key_id,)) + self._suite.wire
        self.enc, self._context = hpke.setup_sender(
            self._suite, configuration.public_key, _info(media, self._header), ephemeral
        )
        self._ended = False

    def whole(self, message: bytes) -> bytes:
        """The encapsulated request of the whole form."""
        self._end()
        return self.start() + self._context.seal(message)

    def start(self) -> bytes:
        """Header and encapsulated key."""
        return self._header + self.enc

    def chunk(self, plaintext: bytes) -> bytes:
        """A non-final chunk of at least one byte, framed."""
        if self._ended or not plaintext:
            raise ExchangeMisuse("a chunk needs an open request and at least one byte")
        return _frame(self._context.seal(plaintext))

    def final(self, plaintext: bytes = b"") -> bytes:
        """The final chunk."""
        self._end()
        return b"\x00" + self._context.seal(plaintext, _FINAL)

    def _end(self) -> None:
        if self._ended:
            raise ExchangeMisuse("the request has already ended")
        self._ended = True

    def response(self, limits: Limits = DEFAULT_LIMITS) -> "ResponseOpener":
        """The opener of the response to this request."""
        keys = _ResponseKeys(self._media, self._suite, self.enc, self._context)
        return ResponseOpener(self._media, keys, limits)

    def __repr__(self) -> str:
        return "RequestSealer(...)"


class ResponseOpener:
    """Opens one response. `feed()` returns plaintext as soon as it is authenticated, `finish()` returns the rest.

    The response is complete only if `finish()` returns.
    """

    def __init__(self, media: Media, keys: _ResponseKeys, limits: Limits = DEFAULT_LIMITS) -> None:
        self._media = media
        self._keys = keys
        self._limits = limits
        self._buffer = bytearray()
        self._reader: _ChunkReader | None = None
        self._failed = False

    def feed(self, data: bytes) -> bytes:
        """The plaintext that `data` completes. Raises `ChannelError`; after that the opener cannot be used again."""
        if self._failed:
            raise ExchangeMisuse("opening this response already failed or ended")
        try:
            if self._reader is None:
                self._buffer += data
                if not self._media.chunked:
                    if len(self._buffer) > self._keys.nonce_length + self._limits.message + TAG_LENGTH:
                        raise MessageTooLarge("the response is too long")
                    return b""
                if len(self._buffer) < self._keys.nonce_length:
                    return b""
                nonce, data = self._split()
                self._reader = _ChunkReader(self._keys.sequence(nonce), self._limits)
            return b"".join(self._reader.feed(data))
        except Exception:
            self._failed = True
            raise

    def finish(self) -> bytes:
        """The last plaintext. Raises `TruncatedMessage` if the response is incomplete."""
        if self._failed:
            raise ExchangeMisuse("opening this response already failed or ended")
        self._failed = True
        if self._reader is not None:
            return self._reader.finish()
        if self._media.chunked or len(self._buffer) < self._keys.nonce_length + TAG_LENGTH:
            raise TruncatedMessage("the response ends before its nonce and tag")
        nonce, sealed = self._split()
        return self._keys.sequence(nonce).open(sealed)

    def _split(self) -> tuple[bytes, bytes]:
        return bytes(self._buffer[: self._keys.nonce_length]), bytes(self._buffer[self._keys.nonce_length :])

    def __repr__(self) -> str:
        return "ResponseOpener(...)"
