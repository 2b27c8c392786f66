"""Receipts: a signed statement, inside the seal, of what was asked, what was answered and by which model.

A receipt is a JWS in compact form (RFC 7515) with EdDSA over Ed25519 (RFC 8037), so any JOSE library can check a
receipt that a client kept. It travels in the trailer `adytum-receipt` of the answer's binary HTTP message (RFC 9292,
3.6). Its key is in the evidence. The server does not store receipts.

Hashes are SHA-256 in base64url without padding:

    enc       of the request's encapsulated key
    request   of the opened binary HTTP request, including its padding
    response  of the answer's content, including the comment lines that pad a stream
    keys      of the key configuration that the request was sealed to (RFC 9458, 3)
    weights   the root hash of the model's weights, as in the evidence
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
"""Digits of the longest count whose length stays hidden."""
_LIMIT = 8192
_PART = re.compile(rb"[A-Za-z0-9_-]+")
# Kept, because `json.dumps` with options makes a new encoder in each call.
_ENCODER = json.JSONEncoder(separators=(",", ":"))


@dataclass(frozen=True)
class Spent:
    """What the answer used. `exact` is false if the engine was stopped before it reported its own count."""

    model: str
    weights: bytes
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    exact: bool


@dataclass(frozen=True)
class Receipt:
    """What a backend signs. Digests have 32 bytes. `spent` is `None` if no engine was asked."""

    enc: bytes
    request: bytes
    response: bytes
    keys: bytes
    status: int
    issued_at: int
    """Seconds since 1970, by the backend's clock."""
    spent: Spent | None

    def sign(self, key: Ed25519PrivateKey) -> bytes:
        """The compact JWS. Its length depends neither on the token counts nor on `exact`."""
        payload = self._payload()
        # The trailer's length is visible on the wire, so it must not depend on how many digits a count has, nor on
        # `exact`. JSON allows spaces after the document.
        spent = self.spent
        hidden = (
            f"{spent.prompt_tokens}{spent.cached_tokens}{spent.completion_tokens}{spent.exact}"
            if spent is not None
            else ""
        )
        length = len(payload) - len(hidden) + 3 * _DIGITS + len("false")
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
        """The receipt in `token`.

        Raises `OpenFailed` if `public_key` did not sign it, `MalformedMessage` if it is not a receipt.
        """
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
        raise MalformedMessage("a member of the receipt is missing or invalid") from error


def _number(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError
    return value


def _digest(value: Any) -> bytes:
    if not isinstance(value, str):
        raise TypeError
    found = _decode(value.encode())
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
    # The last character may have unused bits. They must be zero, so that a receipt has only one form.
    if _encode(found) != part:
        raise MalformedMessage("the receipt is not canonical base64url")
    return found


_HEAD = _encode(_text({"alg": "EdDSA", "typ": _TYPE}))
