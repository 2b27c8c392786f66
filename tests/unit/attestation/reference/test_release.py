"""The signed release: its format, its signature, what a policy makes of it, and two versions that follow each other."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from adytum.attestation.core.errors import EvidenceError, PolicyError, PolicyFileError
from adytum.attestation.document.evidence import Claims
from adytum.attestation.policy import rules
from adytum.attestation.policy.policy import Policy
from adytum.attestation.reference import release
from adytum.attestation.reference.release import Machine, Version
from adytum.attestation.simulated.device import SimulatedCpu
from tests.unit.attestation.support import CLAIMS, check, clock, document, with_claims

KEY, OTHER = (Ed25519PrivateKey.from_private_bytes(bytes([seed]) * 32) for seed in (1, 2))
PUBLIC = KEY.public_key().public_bytes_raw()
OLD_LAUNCH, NEW_LAUNCH, NEW_LAUNCH_LARGE = b"\x0a" * 48, b"\x0b" * 48, b"\x0c" * 48
OLD_CLAIMS = CLAIMS
NEW_CLAIMS = with_claims(configuration_sha256=b"\x44" * 32)
OLD = Version("0.1.0", (), (Machine(4, "EPYC-v4", OLD_LAUNCH),), (OLD_CLAIMS.configuration_sha256,))
NEW = Version(
    "0.2.0",
    (("adytum.raw", b"\x55" * 32),),
    (Machine(4, "EPYC-v4", NEW_LAUNCH), Machine(8, "EPYC-v4", NEW_LAUNCH_LARGE)),
    (NEW_CLAIMS.configuration_sha256,),
)


def publish(folder: Path, sequence: int, *versions: Version, key: Ed25519PrivateKey = KEY) -> Path:
    data = release.encode(sequence, "2026-11-23", versions)
    (folder / "release.json").write_bytes(data)
    (folder / "release.json.sig").write_bytes(release.sign(data, [key]))
    return folder / "release.json"


def policy(folder: Path, minimum: int = 1, keys: tuple[bytes, ...] = (PUBLIC,)) -> Policy:
    """The demo's policy, with a release required."""
    listed = ", ".join(f'"{key.hex()}"' for key in keys)
    stated = f'release = {{ file = "release.json", keys = [{listed}], minimum = {minimum} }}'
    path = folder / "policy.toml"
    path.write_text(Policy.accept_simulated().to_toml().replace('release = "none"', stated))
    return Policy.from_toml(path)


def serves(launch: bytes, claims: Claims) -> bytes:
    return document(claims, cpu=SimulatedCpu(launch, clock))


def test_two_versions_one_after_the_other(tmp_path: Path) -> None:
    old, new = serves(OLD_LAUNCH, OLD_CLAIMS), serves(NEW_LAUNCH, NEW_CLAIMS)
    publish(tmp_path, 7, OLD)
    before = policy(tmp_path)
    assert check(old, policy=before).measurement == OLD_LAUNCH
    with pytest.raises(PolicyError, match=r"release 7 \(0\.1\.0\)") as refused:
        check(new, policy=before)
    assert refused.value.claim == "release"

    publish(tmp_path, 8, NEW, OLD)
    during = policy(tmp_path)
    for data in (old, new, serves(NEW_LAUNCH_LARGE, NEW_CLAIMS)):
        check(data, policy=during)

    publish(tmp_path, 9, NEW)
    after = policy(tmp_path)
    check(new, policy=after)
    with pytest.raises(PolicyError, match=r"0\.2\.0"):
        check(old, policy=after)


def test_a_launch_of_one_version_with_the_configuration_of_another_is_refused(tmp_path: Path) -> None:
    publish(tmp_path, 8, NEW, OLD)
    for launch, claims in ((OLD_LAUNCH, NEW_CLAIMS), (NEW_LAUNCH, OLD_CLAIMS)):
        with pytest.raises(PolicyError, match="configuration"):
            check(serves(launch, claims), policy=policy(tmp_path))


def test_a_downgrade_is_refused_by_the_minimum(tmp_path: Path) -> None:
    publish(tmp_path, 8, NEW, OLD)
    policy(tmp_path, minimum=8)
    with pytest.raises(PolicyFileError, match="sequence 8, the policy wants 9"):
        policy(tmp_path, minimum=9)


def test_a_required_release_that_is_missing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PolicyFileError, match="requires a release"):
        policy(tmp_path)
    publish(tmp_path, 8, NEW)
    (tmp_path / "release.json.sig").unlink()
    with pytest.raises(PolicyFileError, match="requires a release"):
        policy(tmp_path)


def test_another_key_is_refused(tmp_path: Path) -> None:
    publish(tmp_path, 8, NEW, key=OTHER)
    with pytest.raises(PolicyFileError, match="no signature"):
        policy(tmp_path)
    assert policy(tmp_path, keys=(PUBLIC, OTHER.public_key().public_bytes_raw())).release.required != "none"


def test_a_release_signed_with_two_keys_serves_those_who_know_either(tmp_path: Path) -> None:
    data = release.encode(8, "2026-11-23", [NEW])
    signatures = release.sign(data, [OTHER, KEY])
    for key in (KEY, OTHER):
        assert release.verify(data, signatures, [key.public_key().public_bytes_raw()]).sequence == 8
    third = Ed25519PrivateKey.from_private_bytes(b"\x03" * 32).public_key().public_bytes_raw()
    with pytest.raises(EvidenceError, match="no signature"):
        release.verify(data, signatures, [third])
    with pytest.raises(EvidenceError, match="no signature"):
        release.verify(data, signatures, [])


@pytest.mark.slow
def test_every_changed_byte_is_refused() -> None:
    data = release.encode(8, "2026-11-23", [NEW, OLD])
    signature = release.sign(data, [KEY])
    assert release.verify(data, signature, [PUBLIC]).versions == (NEW, OLD)
    for at in range(len(data)):
        for changed in (data[:at], data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :], data[:at] + b" " + data[at:]):
            with pytest.raises(EvidenceError):
                release.verify(changed, signature, [PUBLIC])
    for at in range(len(signature) - 1):
        for changed in (signature[:at], signature[:at] + bytes([signature[at] ^ 1]) + signature[at + 1 :]):
            with pytest.raises(EvidenceError):
                release.verify(data, changed, [PUBLIC])
    with pytest.raises(EvidenceError):
        release.verify(data, signature * 9, [PUBLIC])


def test_under_a_key_of_small_order_nothing_counts() -> None:
    """The zeros of an unfilled example: a signature under them can be made without any key."""
    data = release.encode(8, "2026-11-23", [NEW])
    anybody = (b"\x01" + bytes(63)).hex().encode() + b"\n"
    with pytest.raises(EvidenceError, match="no signature"):
        release.verify(data, anybody, [b"\x01" + bytes(31)])


@pytest.mark.parametrize(
    "change",
    [
        {"type": "adytum-measurements"},
        {"version": 1},
        {"sequence": -1},
        {"sequence": 1.0},
        {"sequence": True},
        {"date": "23.11.2026"},
        {"date": "20261123"},
        {"versions": []},
        {"versions": "0.2.0"},
        {"more": 1},
    ],
)
def test_validly_signed_and_something_else(change: dict[str, Any]) -> None:
    value = json.loads(release.encode(8, "2026-11-23", [NEW])) | change
    data = json.dumps(value).encode()
    with pytest.raises(EvidenceError):
        release.verify(data, release.sign(data, [KEY]), [PUBLIC])


@pytest.mark.parametrize(
    "version",
    [
        replace(NEW, machines=()),
        replace(NEW, configurations=()),
        replace(NEW, name="with space"),
        replace(NEW, machines=(Machine(4, "EPYC-v4", b"short"),)),
        replace(NEW, configurations=(b"short",)),
        replace(NEW, images=(("x" * 257, bytes(32)),)),
    ],
)
def test_nobody_writes_what_nobody_reads(version: Version) -> None:
    with pytest.raises(EvidenceError):
        release.encode(8, "2026-11-23", [version])


def test_a_version_named_twice_is_refused() -> None:
    with pytest.raises(EvidenceError, match="twice"):
        release.encode(8, "2026-11-23", [NEW, replace(OLD, name="0.2.0")])


def test_a_policy_with_a_release_is_written_and_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(tmp_path, 8, NEW)
    original = policy(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert Policy.from_toml(original.to_toml().encode()) == original


def test_a_report_by_itself_is_judged_by_its_measurement(tmp_path: Path) -> None:
    publish(tmp_path, 8, NEW)
    rule = policy(tmp_path).release
    verified = check(serves(NEW_LAUNCH, NEW_CLAIMS), policy=policy(tmp_path))
    rule.check(replace(verified.facts, claims=None))
    old = replace(verified.facts.cpu, measurement=OLD_LAUNCH)
    with pytest.raises(PolicyError, match="release"):
        rule.check(replace(verified.facts, claims=None, cpu=old))
    rules.SignedRelease("none").check(replace(verified.facts, cpu=old))
