"""`adytum measure`: published answers, and that nothing of what is launched can change without the measurement."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from adytum.attestation.core.errors import EvidenceError, PolicyFileError
from adytum.attestation.policy.policy import Policy
from adytum.attestation.reference.measurements import Measurements
from adytum.inference.__main__ import main
from tests.unit.attestation.reference.launch import firmware

pytest.importorskip("sevsnpmeasure", reason="needs sev-snp-measure: pip install 'adytum[deploy]'")

from adytum.attestation.reference.launch import Launch, MeasureError, measure  # after the skip

PUBLISHED_FIRMWARE = bytes.fromhex(
    "086e2e9149ebf45abdc3445fba5b2da8270bdbb04094d7a2c37faaa4b24af3aa16aff8c374c2a55c467a50da6d466b74"
)
"""Launch digest of the pages of the firmware in sev-snp-measure's tests (0.0.13, tests/test_guest.py)."""


@pytest.fixture
def launch(tmp_path: Path) -> Launch:
    for name, data in (("OVMF.fd", firmware.end()), ("vmlinuz", b"kernel" * 1000), ("initrd", b"disk" * 1000)):
        (tmp_path / name).write_bytes(data)
    return Launch(
        tmp_path / "OVMF.fd", tmp_path / "vmlinuz", tmp_path / "initrd", "root=/dev/vda roothash=00", "EPYC-v4"
    )


PUBLISHED = {
    # The tests of sev-snp-measure 0.0.13 (tests/test_guest.py) that have these answers.
    "snp_ovmf_hash_gen_default": (
        "329c8ce0972ae52343b64d34a434a86f245dfd74f5ed7aae15d22efc78fb9683632b9b50e4e1d7fa41179ef98a7ef198"
    ),
    "snp_ovmf_hash_gen_feature_snp_only": (
        "ddc5224521617a536ee7ce9dd6224d1b58a8d4fda1c741f3ac99fc4bfa04ba6e9fc98646d4a07a9079397fa3852819b5"
    ),
    "snp_default": ("803f691094946e42068aaa3a8f9e26a5c89f36f7b73ecfb28c653360fe4b3aba7e534442e7e1e17895dfe778d0228977"),
    "snp_ovmf_hash_full_feature_snp_only": (
        "6d287813eb5222d770f75005c664e34c204f385ce832cc2ce7d0d6f354454362f390ef83a92046c042e706363b4b08fa"
    ),
    "snp_with_multiple_vcpus_default": (
        "4953b1fb416fa874980e8442b3706d345926d5f38879134e00813c5d7abcbe78eafe7b422907be0b4698e2414a631942"
    ),
    "snp_with_multiple_vcpus_feature_snp_only": (
        "5061fffb019493a903613d56d54b94912a1a2f9e4502385f5c194616753720a92441310ba6c4933de877c36e23046ad5"
    ),
}


@pytest.mark.parametrize(
    ("vcpus", "cmdline", "features", "name"),
    [
        (1, "", 0x21, "snp_ovmf_hash_gen_default"),
        (1, "", 0x01, "snp_ovmf_hash_gen_feature_snp_only"),
        (1, "console=ttyS0 loglevel=7", 0x21, "snp_default"),
        (1, "console=ttyS0 loglevel=7", 0x01, "snp_ovmf_hash_full_feature_snp_only"),
        (4, "", 0x21, "snp_with_multiple_vcpus_default"),
        (4, "", 0x01, "snp_with_multiple_vcpus_feature_snp_only"),
    ],
)
def test_published_answers(tmp_path: Path, vcpus: int, cmdline: str, features: int, name: str) -> None:
    (tmp_path / "end.fd").write_bytes(firmware.end())
    (tmp_path / "empty").write_bytes(b"")
    empty = tmp_path / "empty"
    launch = Launch(tmp_path / "end.fd", empty, empty, cmdline, "EPYC-v4", features)
    found = measure(launch, [vcpus], firmware_digest=PUBLISHED_FIRMWARE)
    assert found.by_vcpus == {vcpus: bytes.fromhex(PUBLISHED[name])}


def test_no_input_changes_without_the_measurement(launch: Launch, tmp_path: Path) -> None:
    known = measure(launch, [2]).by_vcpus[2]
    assert measure(launch, [2]).by_vcpus[2] == known
    seen = {known, measure(launch, [3]).by_vcpus[3], measure(launch, [1]).by_vcpus[1]}
    assert len(seen) == 3
    changes: list[Launch] = [
        replace(launch, cmdline=launch.cmdline + " "),
        replace(launch, cmdline=launch.cmdline[:-1] + "1"),
        replace(launch, cmdline=""),
        replace(launch, initrd=None),
        replace(launch, vcpu_type="EPYC-Milan"),
        replace(launch, vcpu_type="EPYC-Genoa"),
        replace(launch, guest_features=0x21),
    ]
    for name in ("OVMF.fd", "vmlinuz", "initrd"):
        data = (tmp_path / name).read_bytes()
        for at in (0, len(data) // 2, len(data) - 1):
            other = tmp_path / f"{name}-{at}"
            other.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
            field = {"OVMF.fd": "firmware", "vmlinuz": "kernel", "initrd": "initrd"}[name]
            changes.append(replace(launch, **{field: other}))
    for change in changes:
        found = measure(change, [2]).by_vcpus[2]
        assert found not in seen, change
        seen.add(found)


def test_the_guest_policy_is_not_measured_but_told(launch: Launch) -> None:
    """The report carries it; the measurement does not."""
    other = replace(launch, guest_policy=0x20000)
    assert measure(other, [1]).by_vcpus == measure(launch, [1]).by_vcpus
    assert measure(other, [1]).guest_policy == 0x20000


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"vcpu_type": "EPYC-Bergamo"}, "choose from EPYC"),
        ({"guest_policy": 0xB0000}, "read or move"),
        ({"guest_policy": 0x70000}, "read or move"),
        ({"guest_policy": 0x10000}, "bit 17"),
        ({"guest_features": 0x20}, "SEV-SNP"),
        ({"cmdline": "a\nb"}, "command line"),
        ({"cmdline": "é"}, "command line"),
        ({"cmdline": "a" * 2048}, "command line"),
    ],
)
def test_refused_launches(launch: Launch, change: dict[str, object], says: str) -> None:
    with pytest.raises(MeasureError, match=says):
        measure(replace(launch, **change), [1])


@pytest.mark.parametrize("vcpus", [[], [0], [4097]])
def test_refused_numbers(launch: Launch, vcpus: list[int]) -> None:
    with pytest.raises(MeasureError, match="virtual CPUs"):
        measure(launch, vcpus)


@pytest.mark.parametrize("data", [b"", b"\0" * 4096, b"\0" * 4097, firmware.end(firmware.WITHOUT_HASHES)])
def test_firmware_that_does_not_measure_kernels_is_refused(launch: Launch, data: bytes) -> None:
    launch.firmware.write_bytes(data)
    with pytest.raises(MeasureError, match="firmware"):
        measure(launch, [1])


def arguments(launch: Launch, *more: str) -> list[str]:
    return [
        *("measure", "--firmware", str(launch.firmware), "--kernel", str(launch.kernel)),
        *("--initrd", str(launch.initrd), "--vcpus", "8", "--vcpus", "4", *more),
    ]


def test_the_command_writes_what_a_policy_takes(launch: Launch, tmp_path: Path) -> None:
    out = tmp_path / "measurements.json"
    (tmp_path / "cmdline").write_text(launch.cmdline + "\n")
    result = CliRunner().invoke(main, arguments(launch, "--cmdline-file", str(tmp_path / "cmdline"), "--out", str(out)))
    assert result.exit_code == 0, result.output
    expected = measure(launch, [4, 8])
    assert Measurements.load(out) == expected
    assert list(expected.by_vcpus) == [4, 8]
    told = json.loads(out.read_bytes())
    assert told["tool"] == "sev-snp-measure 0.0.13"
    assert told["kernel"] == {"bytes": 6000, "sha256": hashlib.sha256(b"kernel" * 1000).hexdigest()}
    assert told["cmdline"] == launch.cmdline

    policy = tmp_path / "policy.toml"
    result = CliRunner().invoke(main, ["policy", "init", "--measurements", str(out), "--out", str(policy)])
    assert result.exit_code == 0, result.output
    assert Policy.from_toml(policy) == Policy.default(expected.accepted)


@pytest.mark.parametrize(
    "more",
    [
        (),
        ("--append", "x", "--cmdline-file", __file__),
        ("--append", "x", "--vcpu-type", "Xeon"),
        ("--append", "x", "--guest-policy", "many"),
        ("--append", "x", "--guest-policy", "0xb0000"),
        ("--append", "x", "--firmware-digest", "00"),
        ("--append", "x", "--kernel", "/absent"),
        ("--append", "x", "--out", "/absent/m.json"),
    ],
)
def test_bad_arguments_are_told(launch: Launch, more: tuple[str, ...]) -> None:
    result = CliRunner().invoke(main, arguments(launch, *more))
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output


def test_a_changed_file_is_refused_or_says_something_else(launch: Launch, tmp_path: Path) -> None:
    good = measure(launch, [1, 2])
    data = good.encode()
    assert Measurements.parse(data) == good
    value = json.loads(data)
    for change in (
        {"type": "adytum-release"},
        {"version": 2},
        {"measurements": []},
        {"measurements": [{"vcpus": 0, "measurement": "00" * 48}]},
        {"measurements": [{"vcpus": 1, "measurement": "00" * 47}]},
        {"measurements": [{"vcpus": 1, "measurement": "00" * 48}] * 2},
        {"cmdline": "a\nb"},
        {"cmdline": None},
        {"kernel": None},
        {"more": 1},
        {"tool": "\x1b[2J"},
        {"tool": 1},
    ):
        with pytest.raises(EvidenceError):
            Measurements.parse(json.dumps(value | change).encode())
    for cut in range(len(data) - 2):
        with pytest.raises(EvidenceError):
            Measurements.parse(data[:cut])
    (tmp_path / "empty.json").write_bytes(b"")
    with pytest.raises(PolicyFileError, match="cannot be used"):
        Measurements.load(tmp_path / "empty.json")
    with pytest.raises(PolicyFileError, match="cannot be read"):
        Measurements.load(tmp_path / "absent.json")
