"""The bounds of `attestation/core/limits.py` that no other test reaches: at the bound accepted, beyond it refused."""

import datetime
import json
from dataclasses import replace
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding

from adytum.attestation.core.certificates import load
from adytum.attestation.core.errors import EvidenceError, PolicyFileError
from adytum.attestation.core.limits import LIMITS
from adytum.attestation.nvidia.bundle import parse_bundle
from adytum.attestation.policy.policy import Policy
from adytum.attestation.reference import release
from adytum.attestation.reference.release import Machine, Version

KEY = Ed25519PrivateKey.from_private_bytes(bytes(32))
PUBLIC = KEY.public_key().public_bytes_raw()
VERSION = Version("0.2.0", (), (Machine(4, "EPYC-v4", b"\x0b" * 48),), (b"\x44" * 32,))


def test_a_certificate() -> None:
    name, when = x509.Name([]), datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)
    made = x509.CertificateBuilder(name, name, KEY.public_key(), 1, when, when + datetime.timedelta(days=1))
    der = made.sign(KEY, None).public_bytes(Encoding.DER)
    assert load(der, "the certificate", replace(LIMITS, certificate=len(der))).serial_number is not None
    with pytest.raises(EvidenceError, match="larger than"):
        load(der, "the certificate", replace(LIMITS, certificate=len(der) - 1))


def test_the_gpu_bundle() -> None:
    with pytest.raises(EvidenceError, match="not JSON"):
        parse_bundle(b" " * LIMITS.gpu)
    with pytest.raises(EvidenceError, match="more than"):
        parse_bundle(b" " * (LIMITS.gpu + 1))


def _versions(count: int) -> list[Version]:
    return [replace(VERSION, name=f"0.{number}.0") for number in range(count)]


def _launches(count: int) -> list[Version]:
    return [replace(VERSION, machines=tuple(Machine(n + 1, "EPYC-v4", b"\x0b" * 48) for n in range(count)))]


@pytest.mark.parametrize(
    ("versions", "bound"), [(_versions, LIMITS.release_versions), (_launches, LIMITS.release_measurements)]
)
def test_a_release(versions: object, bound: int) -> None:
    assert callable(versions)
    assert release.encode(1, "2026-11-23", versions(bound))
    with pytest.raises(EvidenceError):
        release.encode(1, "2026-11-23", versions(bound + 1))


def test_signatures_of_a_release() -> None:
    data = release.encode(1, "2026-11-23", [VERSION])
    line = release.sign(data, [KEY])
    assert release.verify(data, line * LIMITS.release_keys, [PUBLIC])
    with pytest.raises(EvidenceError, match="lines of"):
        release.verify(data, line * (LIMITS.release_keys + 1), [PUBLIC])


def test_a_minimum_sequence(tmp_path: Path) -> None:
    def policy(minimum: int) -> bytes:
        stated = f'release = {{ file = "release.json", keys = ["{PUBLIC.hex()}"], minimum = {minimum} }}'
        return Policy.accept_simulated().to_toml().replace('release = "none"', stated).encode()

    (tmp_path / "release.json").write_bytes(data := release.encode(LIMITS.sequence, "2026-11-23", [VERSION]))
    (tmp_path / "release.json.sig").write_bytes(release.sign(data, [KEY]))
    assert json.loads(data)["sequence"] == LIMITS.sequence
    path = tmp_path / "policy.toml"
    path.write_bytes(policy(LIMITS.sequence))
    Policy.from_toml(path)
    path.write_bytes(policy(LIMITS.sequence + 1))
    with pytest.raises(PolicyFileError, match="minimum"):
        Policy.from_toml(path)
