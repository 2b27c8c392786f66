"""A signed release file: the launch measurements of one release, for policies that trust its publisher.

Canonical JSON (README.md, "Encoding"): `{"release": base64, "signature": base64}`. The release, canonical JSON as well:
`{"measurements": [hex, 96 digits, ...], "name": string, "type": "cloister-release", "version": 1}`. The signature is
Ed25519 (RFC 8032) over "cloister release v1" | 0x00 | release.
"""

import re
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from attestation import strict
from attestation.errors import EvidenceError, PolicyFileError
from attestation.limits import LIMITS

_LABEL = b"cloister release v1\x00"
_MEASUREMENT = re.compile("[0-9a-f]{96}")


def load(path: Path, key: bytes) -> frozenset[bytes]:
    """The measurements, 48 bytes each, of the file that the Ed25519 key (32 bytes) signed. Raises `PolicyFileError`."""
    try:
        with path.open("rb") as file:
            data = file.read(LIMITS.policy + 1)
    except (OSError, ValueError) as error:
        raise PolicyFileError(f"the release file {path} cannot be read: {error}") from error
    try:
        return parse(data, key)
    except EvidenceError as error:
        raise PolicyFileError(f"the release file {path} cannot be used: {error}") from error


def parse(data: bytes, key: bytes) -> frozenset[bytes]:
    """As `load`, from the file's bytes. Raises `EvidenceError`."""
    outer = strict.Fields(
        strict.decode(data, "the release file", LIMITS.policy), "file", frozenset({"release", "signature"})
    )
    release = outer.octets("release", LIMITS.policy)
    try:
        Ed25519PublicKey.from_public_bytes(key).verify(outer.octets("signature", 64), _LABEL + release)
    except (InvalidSignature, ValueError) as error:
        raise EvidenceError("its signature does not hold for the policy's key") from error
    names = frozenset({"measurements", "name", "type", "version"})
    fields = strict.Fields(strict.decode(release, "the release", LIMITS.policy), "release", names)
    fields.constant("type", "cloister-release")
    fields.constant("version", 1)
    fields.text("name", LIMITS.text)
    found = fields.items("measurements", LIMITS.release_measurements, _measurement)
    if not found:
        raise EvidenceError("it names no measurement")
    return frozenset(found)


def sign(name: str, measurements: frozenset[bytes], key: Ed25519PrivateKey) -> bytes:
    """A release file."""
    release = strict.encode(
        {
            "type": "cloister-release",
            "version": 1,
            "name": name,
            "measurements": sorted(measurement.hex() for measurement in measurements),
        }
    )
    signature = key.sign(_LABEL + release)
    return strict.encode({"release": strict.base64_text(release), "signature": strict.base64_text(signature)})


def _measurement(value: object, where: str) -> bytes:
    if not isinstance(value, str) or not _MEASUREMENT.fullmatch(value):
        raise EvidenceError(f"{where} is not 96 lower-case hexadecimal digits")
    return bytes.fromhex(value)
