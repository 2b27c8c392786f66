"""The Encrypted HTTP Body Protocol, server side, without IO. `README.md` beside this file specifies its wire format.

Body: repeated `u32 length | ciphertext`. A response's keys derive from the request's HPKE context by export, so only
the client that sealed the request can open it. The protocol does not authenticate method, path, status or a stream's
end, which is why Oblivious HTTP is the main protocol.
"""

import os
import re

from adytum.inference.channel import hpke
from adytum.inference.channel.errors import (
    ExchangeMisuse,
    MalformedMessage,
    MessageTooLarge,
    OpenFailed,
    TruncatedMessage,
    UnknownKey,
)
from adytum.inference.channel.hpke import (
    NONCE_LENGTH,
    TAG_LENGTH,
    AeadId,
    Context,
    KdfId,
    KemId,
    PrivateKey,
    Sequence,
    Suite,
)
from adytum.inference.channel.limits import DEFAULT_LIMITS, Limits

REQUEST_HEADER = "ehbp-encapsulated-key"
RESPONSE_HEADER = "ehbp-response-nonce"
KEY_CONFIG_PROBLEM = "urn:ietf:params:ehbp:error:key-config"
SUITE = Suite(KemId.X25519, KdfId.HKDF_SHA256, AeadId.AES_256_GCM)

_INFO = b"ehbp request"
_EXPORT = b"ehbp response"
_SECRET_LENGTH = 32
_ENC = re.compile("[0-9a-f]{64}")


def response_sequence(secret: bytes, enc: bytes, nonce: bytes) -> Sequence:
    """The sequence that seals or opens a response, derived from the exported secret."""
    prk = hpke.extract(enc + nonce, secret)
    key = hpke.expand(prk, b"key", hpke.key_length(SUITE.aead))
    return Sequence(hpke.new_aead(SUITE.aead, key), hpke.expand(prk, b"nonce", NONCE_LENGTH))


class RequestOpener:
    """Opens one request body: `feed()` its bytes, then `finish()`.

    EHBP does not identify the key, so `keys` are all that the request may be sealed to, newest first. The first frame
    decides. `header` is the value of `Ehbp-Encapsulated-Key`. Raises `MalformedMessage` or `UnknownKey`.
    """

    def __init__(self, header: str, keys: tuple[PrivateKey, ...], limits: Limits = DEFAULT_LIMITS) -> None:
        if not _ENC.fullmatch(header):
            raise MalformedMessage("the encapsulated key is not 64 lower-case hexadecimal digits")
        self.enc = bytes.fromhex(header)
        self.recipient = b""
        """The public key that the request was sealed to. Empty until a frame has been opened."""
        self._candidates = [(key.public_bytes, hpke.setup_recipient(SUITE, key, self.enc, _INFO)) for key in keys]
        if not self._candidates:
            raise UnknownKey("the server holds no key for EHBP")
        self._context: Context | None = None
        self._limits = limits
        self._buffer = bytearray()
        self._plain = bytearray()
        self._frames = 0
        self._failed = False

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
        buffer = self._buffer
        buffer += data
        at = 0
        while len(buffer) - at >= 4:
            length = int.from_bytes(buffer[at : at + 4], "big")
            # The length is not authenticated, so it is bounded before a frame is buffered.
            if length > min(self._limits.frame, self._limits.message + TAG_LENGTH):
                raise MessageTooLarge("a frame is too long")
            if 0 < length < TAG_LENGTH:
                raise MalformedMessage("a frame is shorter than its authentication tag")
            if len(buffer) - at - 4 < length:
                break
            self._frames += 1
            if self._frames > self._limits.chunks:
                raise MessageTooLarge("too many frames")
            if length:
                self._plain += self._open(bytes(buffer[at + 4 : at + 4 + length]))
                if len(self._plain) > self._limits.message:
                    raise MessageTooLarge("the request is too long")
            at += 4 + length
        del buffer[:at]

    def _open(self, ciphertext: bytes) -> bytes:
        if self._context is not None:
            return self._context.open(ciphertext)
        for public, candidate in self._candidates:
            try:
                plaintext = candidate.open(ciphertext)
            except OpenFailed:
                continue
            self._context, self.recipient = candidate, public
            return plaintext
        raise UnknownKey("none of the server's keys opens the first frame")

    def abandon(self) -> "ResponseSealer":
        """The sealer for an answer that does not need the rest of the request. Nothing may be fed after this call.

        Raises `TruncatedMessage` before the first frame.
        """
        self._failed = True
        if self._context is None:
            raise TruncatedMessage("the body has no frame")
        return ResponseSealer(self._context.export(_EXPORT, _SECRET_LENGTH), self.enc)

    def finish(self) -> "tuple[bytes, ResponseSealer]":
        """(request body, sealer of its response). Raises `TruncatedMessage` inside a frame and without any frame."""
        if self._failed:
            raise ExchangeMisuse("opening this request already failed")
        self._failed = True
        if self._buffer or self._context is None:
            raise TruncatedMessage("the body ends inside a frame, or has none")
        return bytes(self._plain), ResponseSealer(self._context.export(_EXPORT, _SECRET_LENGTH), self.enc)


class ResponseSealer:
    """Seals one response body. `nonce` goes into the header `Ehbp-Response-Nonce`, in hexadecimal."""

    def __init__(self, secret: bytes, enc: bytes) -> None:
        self.nonce = os.urandom(32)
        self._sequence = response_sequence(secret, enc, self.nonce)

    def frame(self, plaintext: bytes) -> bytes:
        """One frame of at least one byte."""
        if not plaintext:
            raise ExchangeMisuse("a frame has at least one byte")
        sealed = self._sequence.seal(plaintext)
        return len(sealed).to_bytes(4, "big") + sealed

    def __repr__(self) -> str:
        return "ResponseSealer(...)"
