"""Receipts: a signed statement, inside the seal, of what was asked, what was answered and by which model.

A receipt is a JWS in compact form (RFC 7515) with EdDSA over Ed25519 (RFC 8037), so any JOSE library can check one that
a client kept. It travels in the trailer `adytum-receipt` of the answer's binary HTTP message (RFC 9292, 3.6); the
key is in the evidence. The server keeps nothing.

Hashes are SHA-256 in base64url without padding:

    enc       of the encapsulated key that named the request
    request   of the opened binary HTTP request, its padding included
    response  of the answer's content, comment lines that pad a stream included
    keys      of the key configuration that the request was sealed to (RFC 9458, 3)
    weights   the root of the model's weights as the evidence names it
"""

import base64
import binascii
import hashlib
import json
import re
from dataclasses import dataclass
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from adytum.inference.channel.errors import MalformedMessage, OpenFailed

TRAILER = b"adytum-receipt"
_TYPE = "adytum-receipt+jws"
_STEP = 256
_DIGITS = 10
"""Of the longest number that is hidden."""
_LIMIT = 8192
_PART = re.compile(rb"[A-Za-z0-9_-]+")
# `json.dumps` makes one anew in each call with options.
_ENCODER = json.JSONEncoder(separators=(",", ":"))


@dataclass(frozen=True)
class Spent:
    """What the answer took. `exact` is false where it was cut and the engine's own count never came."""

    model: str
    weights: bytes
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    exact: bool


@dataclass(frozen=True)
class Receipt:
    """What a backend signs. Digests are 32 bytes. `spent` is `None` where no engine was asked."""

    enc: bytes
    request: bytes
    response: bytes
    keys: bytes
    status: int
    issued_at: int
    """Seconds since 1970, by the backend's clock."""
    spent: Spent | None

    def sign(self, key: Ed25519PrivateKey) -> bytes:
        """The compact JWS. Its length does not depend on the numbers of tokens."""
        payload = self._payload()
        # JSON takes spaces behind it, and the length of a trailer is on the wire: the digits of a count must not be.
        numbers = (
            "".join(
                str(number)
                for number in (self.spent.prompt_tokens, self.spent.cached_tokens, self.spent.completion_tokens)
            )
            if self.spent is not None
            else ""
        )
        length = len(payload) - len(numbers) + 3 * _DIGITS + len("false")
        payload += b" " * (-(-length // _STEP) * _STEP - len(payload))
        signed = _HEAD + b"." + _encode(payload)
        return signed + b"." + _encode(key.sign(signed))

    def _payload(self) -> bytes:
        document: dict[str, Any] = {
            "v": 1,
            "enc": _encode(self.enc).decode(),
            "request": _encode(self.request).decode(),
            "response": _encode(self.response).decode(),
            "keys": _encode(self.keys).decode(),
            "status": self.status,
            "iat": self.issued_at,
            "model": None,
        }
        if self.spent is not None:
            document["model"] = self.spent.model
            document["weights"] = _encode(self.spent.weights).decode()
            document["usage"] = {
                "prompt_tokens": self.spent.prompt_tokens,
                "cached_tokens": self.spent.cached_tokens,
                "completion_tokens": self.spent.completion_tokens,
                "exact": self.spent.exact,
            }
        return _text(document)

    @classmethod
    def verify(cls, token: bytes, public_key: bytes) -> "Receipt":
        """Raises `OpenFailed` where the signature is not the key's, `MalformedMessage` where it is no receipt."""
        parts = token.split(b".")
        if len(token) > _LIMIT or len(parts) != 3 or not all(_PART.fullmatch(part) for part in parts):
            raise MalformedMessage("the receipt is not a compact JWS")
        head, payload, signature = map(_decode, parts)
        try:
            Ed25519PublicKey.from_public_bytes(public_key).verify(signature, parts[0] + b"." + parts[1])
        except (InvalidSignature, ValueError) as error:
            raise OpenFailed("the receipt's signature is not the attested key's") from error
        if _document(head) != {"alg": "EdDSA", "typ": _TYPE}:
            raise MalformedMessage("the receipt's header is not the expected one")
        return _receipt(_document(payload))


def digest(data: bytes) -> bytes:
    """SHA-256."""
    return hashlib.sha256(data).digest()


def _receipt(document: dict[str, Any]) -> Receipt:
    try:
        if document["v"] != 1:
            raise ValueError
        spent = None
        if document["model"] is not None:
            usage = document["usage"]
            if not isinstance(document["model"], str) or not isinstance(usage["exact"], bool):
                raise TypeError
            spent = Spent(
                document["model"],
                _digest(document["weights"]),
                _number(usage["prompt_tokens"]),
                _number(usage["cached_tokens"]),
                _number(usage["completion_tokens"]),
                usage["exact"],
            )
        return Receipt(
            enc=_digest(document["enc"]),
            request=_digest(document["request"]),
            response=_digest(document["response"]),
            keys=_digest(document["keys"]),
            status=_number(document["status"]),
            issued_at=_number(document["iat"]),
            spent=spent,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise MalformedMessage("the receipt does not have what a receipt has") from error


def _number(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError
    return value


def _digest(value: Any) -> bytes:
    if not isinstance(value, str):
        raise TypeError
    found = _decode(value.encode("ascii", "replace"))
    if len(found) != 32:
        raise ValueError
    return found


def _document(data: bytes) -> dict[str, Any]:
    try:
        document = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise MalformedMessage("the receipt is not JSON") from error
    if not isinstance(document, dict):
        raise MalformedMessage("the receipt is not a JSON object")
    return document


def _text(document: dict[str, Any]) -> bytes:
    return _ENCODER.encode(document).encode()


def _encode(data: bytes) -> bytes:
    return base64.urlsafe_b64encode(data).rstrip(b"=")


def _decode(part: bytes) -> bytes:
    try:
        found = base64.b64decode(part + b"=" * (-len(part) % 4), altchars=b"-_", validate=True)
    except (binascii.Error, ValueError) as error:
        raise MalformedMessage("the receipt is not base64url") from error
    # The last character has bits that count for nothing: one receipt has one form.
    if _encode(found) != part:
        raise MalformedMessage("the receipt is not canonical base64url")
    return found


_HEAD = _encode(_text({"alg": "EdDSA", "typ": _TYPE}))
