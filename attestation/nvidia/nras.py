"""NVIDIA's remote attestation service (NRAS) as an alternative appraisal: its signed verdict, verified offline.

The answer is a detached EAT (RFC 9711): `[["JWT", overall], {"GPU-0": jwt, ...}]`. A JWS in compact form (RFC 7515)
with one algorithm, ES384, is three base64url parts and one signature. No library is needed, and no other algorithm can
be chosen.
"""

import base64
import binascii
import datetime
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature

from adytum.attestation.core.checks import Checks
from adytum.attestation.core.errors import EvidenceError, Step, VerificationError
from adytum.attestation.core.limits import LIMITS

ISSUER = "https://nras.attestation.nvidia.com"
_ALGORITHM = ec.ECDSA(hashes.SHA384())
_HALF = 48


@dataclass(frozen=True)
class VerifiedNras:
    """A verdict that the service signed for the nonce: every GPU in it passed."""

    gpus: tuple[dict[str, object], ...]
    """Each GPU's claims."""
    valid_until: datetime.datetime


def verify_nras(answer: bytes, jwks: bytes, *, nonce: bytes, now: datetime.datetime, checks: Checks) -> VerifiedNras:
    """Verifies at `now` with the keys in `jwks` (RFC 7517), which the caller trusts. Raises `AttestationError`.

    1. Structure: an overall token and at least one GPU's (`EvidenceError`).
    2. Signatures: ES384 by the key that each token names.
    3. Issuer and times.
    4. Nonce, in the overall token and in each GPU's.
    5. Digests: the overall token names exactly these GPUs' tokens by their SHA-256.
    6. Results: the overall one, and each GPU's (measurements, secure boot, no debugging) are good.
    """
    # 1. Structure
    overall, submodules = _split(answer)
    keys = _keys(jwks)

    # 2. Signatures
    claims = _verified(overall, keys)
    gpus = {name: _verified(token, keys) for name, token in submodules.items()}
    checks.ok("nras.signature", "NVIDIA's service signed the verdict")

    # 3. Issuer and times
    expires = [_check_times(item, now) for item in (claims, *gpus.values())]
    checks.ok("nras.validity", "the verdict is from NVIDIA's service and current")

    # 4. Nonce
    if any(item.get("eat_nonce") != nonce.hex() for item in (claims, *gpus.values())):
        raise _wrong("nonce", "NVIDIA's verdict was made for another nonce")
    checks.ok("nras.nonce", "the verdict was made for this nonce")

    # 5. Digests
    named = claims.get("submods")
    digests = {name: ["DIGEST", ["SHA-256", hashlib.sha256(t.encode()).hexdigest()]] for name, t in submodules.items()}
    if named != digests:
        raise _wrong("digest", "NVIDIA's verdict does not name exactly the tokens of these GPUs")
    checks.ok("nras.digest", f"the verdict is about these {len(gpus)} GPUs")

    # 6. Results
    if claims.get("x-nvidia-overall-att-result") is not True:
        raise _wrong("result", "NVIDIA's verdict is that the evidence does not pass")
    for name, item in gpus.items():
        good = item.get("measres") == "success" and item.get("dbgstat") == "disabled"
        if not good or item.get("secboot") is not True:
            raise _wrong("result", f"NVIDIA's verdict is that {name!a} does not pass")
    checks.ok("nras.result", "the verdict is that every GPU passes")
    return VerifiedNras(tuple(gpus.values()), min(expires))


def check_devices(verdict: VerifiedNras, leaves: Sequence[x509.Certificate], checks: Checks) -> None:
    """Requires that the verdict is about exactly the GPUs with these certificates. Raises `VerificationError`.

    Another GPU may have answered the same nonce. The service's `ueid` is the serial number of the GPU's certificate,
    in decimal.
    """
    named = [gpu.get("ueid") for gpu in verdict.gpus]
    if not leaves or sorted(map(str, named)) != sorted(str(leaf.serial_number) for leaf in leaves):
        raise _wrong("device", "NVIDIA's verdict is not about exactly these GPUs")
    checks.ok("nras.device", f"the verdict is about {len(leaves)} GPUs, which are those of the evidence")


def _split(answer: bytes) -> tuple[str, dict[str, str]]:
    value = _json(answer, "NVIDIA's verdict")
    match value:
        case [["JWT", str(overall)], dict(submodules)] if 1 <= len(submodules) <= LIMITS.gpus and all(
            isinstance(token, str) and token.isascii() for token in submodules.values()
        ):
            return overall, submodules
    raise EvidenceError(f"NVIDIA's verdict is not an overall token with those of 1 to {LIMITS.gpus} GPUs")


def _keys(jwks: bytes) -> dict[str, ec.EllipticCurvePublicKey]:
    value = _json(jwks, "the service's key set")
    entries = value.get("keys") if isinstance(value, dict) else None
    if not isinstance(entries, list):
        raise EvidenceError("the service's key set is not a JWK set")
    found: dict[str, ec.EllipticCurvePublicKey] = {}
    for entry in entries:
        if not isinstance(entry, dict) or (entry.get("kty"), entry.get("crv")) != ("EC", "P-384"):
            continue
        x, y = _base64url(entry.get("x")), _base64url(entry.get("y"))
        try:
            key = ec.EllipticCurvePublicNumbers(
                int.from_bytes(x, "big"), int.from_bytes(y, "big"), ec.SECP384R1()
            ).public_key()
        except ValueError as error:
            raise EvidenceError("the service's key set has a key that is not on P-384") from error
        name = entry.get("kid")
        if not isinstance(name, str) or name in found:
            raise EvidenceError("the service's key set has a key without a name of its own")
        found[name] = key
    return found


def _verified(token: str, keys: dict[str, ec.EllipticCurvePublicKey]) -> dict[str, object]:
    parts = token.split(".")
    if len(parts) != 3 or not token.isascii():
        raise EvidenceError("a token of NVIDIA's verdict does not have three parts")
    header = _json(_base64url(parts[0]), "a token's header")
    if not isinstance(header, dict) or header.get("alg") != "ES384" or "crit" in header:
        raise EvidenceError("a token of NVIDIA's verdict is not signed with ES384")
    key = keys.get(str(header.get("kid")))
    if key is None:
        raise _wrong("key", "a token of NVIDIA's verdict names a key that is not in the key set; fetch the set again")
    signature = _base64url(parts[2])
    if len(signature) != 2 * _HALF:
        raise EvidenceError("a token's signature is not two numbers of 48 bytes")
    r, s = (int.from_bytes(half, "big") for half in (signature[:_HALF], signature[_HALF:]))
    try:
        key.verify(encode_dss_signature(r, s), f"{parts[0]}.{parts[1]}".encode(), _ALGORITHM)
    except InvalidSignature as error:
        raise _wrong("signature", "the signature of a token of NVIDIA's verdict is invalid") from error
    claims = _json(_base64url(parts[1]), "a token's claims")
    if not isinstance(claims, dict):
        raise EvidenceError("a token's claims are not an object")
    return claims


def _check_times(claims: dict[str, object], now: datetime.datetime) -> datetime.datetime:
    if claims.get("iss") != ISSUER:
        raise _wrong("issuer", "the verdict is not from NVIDIA's service")
    seconds = now.timestamp()
    start, issued, end = claims.get("nbf"), claims.get("iat"), claims.get("exp")
    if not (type(start) is int and type(issued) is int and type(end) is int):
        raise EvidenceError("a token of NVIDIA's verdict does not state when it is valid")
    if not max(start, issued) <= seconds < end:
        raise _wrong("validity", "NVIDIA's verdict is not valid at this time; ask for a new one")
    try:
        return datetime.datetime.fromtimestamp(end, datetime.UTC)
    except (ValueError, OverflowError, OSError) as error:
        raise EvidenceError("a token of NVIDIA's verdict is valid beyond the calendar") from error


def _json(data: bytes, what: str) -> object:
    if len(data) > LIMITS.collateral:
        raise EvidenceError(f"{what} is larger than {LIMITS.collateral} bytes")
    try:
        value: object = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise EvidenceError(f"{what} is not JSON") from error
    return value


def _base64url(text: object) -> bytes:
    if not isinstance(text, str) or not text.isascii():
        raise EvidenceError("a token has a part that is not base64url")
    try:
        decoded = base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
    except (binascii.Error, ValueError) as error:
        raise EvidenceError("a token has a part that is not base64url") from error
    # The decoder also accepts the other alphabet, padding, and bits after the last byte. Nothing signs the third part.
    if base64.urlsafe_b64encode(decoded).rstrip(b"=").decode() != text:
        raise EvidenceError("a token has a part that is not base64url in its one form")
    return decoded


def _wrong(code: str, message: str) -> VerificationError:
    return VerificationError(Step.GPU, f"nras.{code}", message)
