"""A signed release: the launches and configurations that are accepted by policies that trust its publisher.

It has two files. `release.json` is JSON; white space is free, because the signature is over its bytes:

    {"type": "adytum-release", "version": 2, "sequence": 8, "date": "2026-11-23",
     "versions": [{"name": "0.2.0",
                   "images": [{"name": "adytum-h100.raw", "sha256": 64 hex digits}, ...],
                   "measurements": [{"vcpus": 8, "vcpu_type": "EPYC-v4", "measurement": 96 hex digits}, ...],
                   "configurations": [64 hex digits, ...]}, ...]}

and `release.json.sig`: one line for each signature, 128 hexadecimal digits, Ed25519 (RFC 8032) over
"adytum release v2" | 0x00 | the file's bytes. The first of `versions` is the current one; further ones are still
accepted while they drain. Of two releases the one with the higher sequence is valid.
"""

import datetime
import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from adytum.attestation.core import strict
from adytum.attestation.core.ed25519 import small_order
from adytum.attestation.core.errors import EvidenceError, PolicyFileError
from adytum.attestation.core.limits import LIMITS
from adytum.attestation.reference.measurements import digest

_LABEL = b"adytum release v2\x00"
_SIGNATURE = re.compile("[0-9a-f]{128}")
_RELEASE = frozenset({"type", "version", "sequence", "date", "versions"})
_VERSION = frozenset({"name", "images", "measurements", "configurations"})


@dataclass(frozen=True)
class Machine:
    """One shape in which a version is launched, and its measurement."""

    vcpus: int
    vcpu_type: str
    measurement: bytes


@dataclass(frozen=True)
class Version:
    """One version of the image."""

    name: str
    images: tuple[tuple[str, bytes], ...]
    """File name and SHA-256 of each published image."""
    machines: tuple[Machine, ...]
    configurations: tuple[bytes, ...]
    """SHA-256 of the configurations that it may run."""

    def accepts(self, measurement: bytes, configuration: bytes | None) -> bool:
        """Whether this version has both. If the configuration is unknown (None), the measurement alone decides."""
        known = configuration is None or configuration in self.configurations
        return known and any(machine.measurement == measurement for machine in self.machines)


@dataclass(frozen=True)
class Release:
    """One release. `sha256` is that of its bytes."""

    sequence: int
    date: str
    versions: tuple[Version, ...]
    sha256: bytes

    def version(self, measurement: bytes, configuration: bytes | None) -> Version | None:
        """The version that this launch and configuration belong to."""
        return next((found for found in self.versions if found.accepts(measurement, configuration)), None)


@dataclass(frozen=True)
class RequiredRelease:
    """A release that a policy requires: signed by one of these keys, from this sequence on."""

    release: Release
    file: str
    """The path, as the policy writes it."""
    keys: frozenset[bytes]
    minimum: int


def load(path: Path, file: str, keys: frozenset[bytes], minimum: int) -> RequiredRelease:
    """The release of a policy. Raises `PolicyFileError`."""
    try:
        data, signatures = _read(path), _read(signature_path(path))
    except (OSError, ValueError) as error:
        raise PolicyFileError(
            f"the policy requires a release, and {path} and its .sig cannot be read: {error}. Get both from the "
            "publisher"
        ) from error
    try:
        found = verify(data, signatures, keys)
    except EvidenceError as error:
        raise PolicyFileError(f"the release {path} cannot be used: {error}") from error
    if found.sequence < minimum:
        raise PolicyFileError(
            f"the release {path} has the sequence {found.sequence}, the policy wants {minimum} or later; get the "
            "current one from its publisher"
        )
    return RequiredRelease(found, file, keys, minimum)


def signature_path(path: Path) -> Path:
    """The path of the signature of the release at `path`."""
    return path.with_name(path.name + ".sig")


def verify(data: bytes, signatures: bytes, keys: Iterable[bytes]) -> Release:
    """The release that one of the Ed25519 keys (32 bytes each) signed. Raises `EvidenceError`."""
    lines = signatures.decode("ascii", "replace").splitlines()
    if not 1 <= len(lines) <= LIMITS.release_keys or not all(map(_SIGNATURE.fullmatch, lines)):
        raise EvidenceError(f"its .sig is not 1 to {LIMITS.release_keys} lines of 128 hexadecimal digits")
    if not any(_holds(data, bytes.fromhex(line), key) for line in lines for key in keys):
        raise EvidenceError("no signature of it is valid for a trusted key")
    return parse(data)


def _holds(data: bytes, signature: bytes, key: bytes) -> bool:
    # Anybody can sign under a key of small order, like the zeros of an unfilled example.
    if small_order(key):
        return False
    try:
        Ed25519PublicKey.from_public_bytes(key).verify(signature, _LABEL + data)
    except (InvalidSignature, ValueError):
        return False
    return True


def parse(data: bytes) -> Release:
    """Reads a release without verifying its signature. Raises `EvidenceError`."""
    fields = strict.Fields(strict.read(data, "the release", LIMITS.policy), "release", _RELEASE)
    fields.constant("type", "adytum-release")
    fields.constant("version", 2)
    date = fields.text("date", LIMITS.text)
    try:
        if datetime.date.fromisoformat(date).isoformat() != date:
            raise ValueError
    except ValueError as error:
        raise EvidenceError("release.date is not a day like 2026-11-23") from error
    versions = fields.items("versions", LIMITS.release_versions, _version)
    if not versions or len({version.name for version in versions}) != len(versions):
        raise EvidenceError("release.versions is empty, or names one version twice")
    return Release(fields.integer("sequence"), date, versions, hashlib.sha256(data).digest())


def encode(sequence: int, date: str, versions: Iterable[Version]) -> bytes:
    """The bytes of a release, to be signed. Raises `EvidenceError` for one that no client would accept."""
    value = {
        "type": "adytum-release",
        "version": 2,
        "sequence": sequence,
        "date": date,
        "versions": [
            {
                "name": version.name,
                "images": [{"name": name, "sha256": sha256.hex()} for name, sha256 in version.images],
                "measurements": [
                    {"vcpus": m.vcpus, "vcpu_type": m.vcpu_type, "measurement": m.measurement.hex()}
                    for m in version.machines
                ],
                "configurations": [configuration.hex() for configuration in version.configurations],
            }
            for version in versions
        ],
    }
    data = json.dumps(value, indent=2).encode("ascii") + b"\n"
    parse(data)
    return data


def sign(data: bytes, keys: Iterable[Ed25519PrivateKey]) -> bytes:
    """The content of the .sig file: one line for each key."""
    return b"".join(key.sign(_LABEL + data).hex().encode() + b"\n" for key in keys)


def _version(value: object, where: str) -> Version:
    fields = strict.Fields(value, where, _VERSION)
    machines = fields.items("measurements", LIMITS.release_measurements, _machine)
    if not machines:
        raise EvidenceError(f"{where} names no measurement")
    configurations = fields.items("configurations", LIMITS.release_measurements, _sha256)
    if not configurations:
        raise EvidenceError(f"{where} names no configuration")
    images = fields.items("images", LIMITS.release_measurements, _image)
    return Version(fields.text("name", LIMITS.text), images, machines, configurations)


def _machine(value: object, where: str) -> Machine:
    fields = strict.Fields(value, where, frozenset({"vcpus", "vcpu_type", "measurement"}))
    return Machine(
        fields.integer("vcpus", LIMITS.vcpus),
        fields.text("vcpu_type", LIMITS.text),
        digest(fields.raw("measurement"), f"{where}.measurement"),
    )


def _image(value: object, where: str) -> tuple[str, bytes]:
    fields = strict.Fields(value, where, frozenset({"name", "sha256"}))
    return fields.text("name", LIMITS.text), fields.digest("sha256")


def _sha256(value: object, where: str) -> bytes:
    return strict.Fields({"digest": value}, where, frozenset({"digest"})).digest("digest")


def _read(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(LIMITS.policy + 1)
