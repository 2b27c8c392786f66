"""Manifests: every real one at a time, the real measurements against them, every byte, every end."""

import datetime
import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from adytum.attestation.core.checks import Checks
from adytum.attestation.core.errors import AttestationError, EvidenceError
from adytum.attestation.core.trust import NVIDIA_RIM
from adytum.attestation.nvidia.rim import Rim, compare, rim_ids, verify_rim
from adytum.attestation.nvidia.spdm import GpuReport
from tests.unit.attestation.nvidia.authority import NOW, Authority, FakeGpu
from tests.unit.attestation.nvidia.rim_authority import RimAuthority, refused

FULL = "h100-550.90.07-full"
FULL_TIME = datetime.datetime(2025, 10, 24, 12, tzinfo=datetime.UTC)
SECOND = datetime.timedelta(seconds=1)
A, B, C = (bytes([letter]) * 48 for letter in b"abc")


@dataclass(frozen=True)
class Real:
    """A real manifest, the day it is judged for, and what comes out: a code, or what it is about."""

    path: str
    day: str
    code: str = ""
    about: tuple[str, str, str, int] | None = None
    """Kind, product, version, measurements that count."""


VBIOS_9F = ("VBIOS", "GH100", "96.00.9F.00.01", 12)
REAL = (
    Real(f"{FULL}/driver_rim.xml", "2025-10-24", about=("driver", "GH100", "550.90.07", 21)),
    Real(f"{FULL}/vbios_rim.xml", "2025-10-24", about=VBIOS_9F),
    Real(f"{FULL}/vbios_rim.xml", "2026-03-01", "gpu.rim.chain.validity"),
    Real(f"{FULL}/vbios_rim.xml", "2020-01-01", "gpu.rim.chain.validity"),
    # The signature's digest is another document's.
    Real("h100-535.86.09-rim-mismatch/driver_rim.xml", "2025-10-24", "gpu.rim.digest"),
    Real("h100-535.86.09-rim-mismatch/vbios_rim.xml", "2025-10-24", about=("VBIOS", "GH100", "96.00.5E.00.01", 12)),
    # Expired in February 2025, and of another digest; the digest is looked at first.
    Real("h100-570.124.03-rim-expired/driver_rim.xml", "2025-10-24", "gpu.rim.digest"),
    Real("rims/1010_0200_882_96005E0001_PROD.swidtag", "2025-01-15", about=("VBIOS", "GH100", "96.00.5E.00.01", 12)),
    Real("rims/1010_0200_882_96005E0001_PROD.swidtag", "2025-10-24", "gpu.rim.chain.validity"),
    Real("rims/1010_0200_882_960074001A_PROD.swidtag", "2025-01-15", about=("VBIOS", "GH100", "96.00.74.00.1A", 12)),
    Real("rims/1010_0205_862_9600740020_PROD.swidtag", "2025-01-15", about=("VBIOS", "GH100", "96.00.74.00.20", 12)),
    Real("rims/NV_GPU_DRIVER_GH100_550.144.03.xml", "2025-10-24", about=("driver", "GH100", "550.144.03", 21)),
    Real("rims/incorrect_signature_driver_rim.xml", "2025-10-24", "gpu.rim.signature"),
    # "NVIDIA CoRIM L1 Root CA Debug Only".
    Real("rims/incorrect_cert_chain_driver_rim.xml", "2025-10-24", "gpu.rim.chain.root"),
    Real(
        "rims/switchVBIOSRim_NV_SWITCH_BIOS_5612_0002_890_9610550001.xml",
        "2026-10-01",
        about=("VBIOS", "LS10", "96.10.55.00.01", 31),
    ),
)


def read(vectors: Path, name: str) -> bytes:
    return (vectors / "nvidia-gpu" / name).read_bytes()


def real(data: bytes | Rim, now: datetime.datetime = FULL_TIME, roots: frozenset[bytes] = NVIDIA_RIM) -> Rim:
    return verify_rim(data, roots=roots, now=now, checks=Checks())


def test_the_list_of_real_manifests_is_complete(vectors: Path) -> None:
    folder = vectors / "nvidia-gpu"
    there = {str(path.relative_to(folder)) for form in ("*.xml", "*.swidtag") for path in folder.rglob(form)}
    assert {path for path in there if "malformed-synthetic" not in path} == {case.path for case in REAL}


@pytest.mark.parametrize("case", REAL, ids=lambda case: f"{case.path}-{case.day}")
def test_real_manifests(vectors: Path, case: Real) -> None:
    data, now = read(vectors, case.path), datetime.datetime.fromisoformat(f"{case.day}T12:00:00+00:00")
    if case.about is None:
        with refused(case.code):
            real(data, now)
        return
    checks = Checks()
    rim = verify_rim(data, roots=NVIDIA_RIM, now=now, checks=checks)
    assert (rim.kind, rim.product, rim.version, len(rim.measurements)) == case.about
    assert [check.code for check in checks.passed] == ["gpu.rim"]
    assert all(len(digest) == 48 for accepted in rim.measurements.values() for digest in accepted)


def test_real_manifests_of_other_structure(vectors: Path) -> None:
    """Other people's negatives. None has the namespace of NVIDIA's or a signature: below are signed ones for each."""
    files = sorted((vectors / "nvidia-gpu" / "rims" / "malformed-synthetic").iterdir())
    assert len(files) == 18
    for path in files:
        with pytest.raises(EvidenceError):
            real(path.read_bytes())


def test_a_real_manifest_is_valid_to_the_second(vectors: Path) -> None:
    data = read(vectors, f"{FULL}/driver_rim.xml")
    rim = real(data)
    start = max(certificate.not_valid_before_utc for certificate in rim.chain)
    assert (start.year, rim.valid_until.year) == (2024, 2026)
    for now in (start, rim.valid_until):
        assert real(data, now).version == "550.90.07"
    for now in (start - SECOND, rim.valid_until + SECOND):
        with refused("gpu.rim.chain.validity"):
            real(data, now)


def test_trust_starts_from_the_pins(vectors: Path) -> None:
    authority = RimAuthority()
    data = read(vectors, f"{FULL}/driver_rim.xml")
    for roots in (frozenset[bytes](), authority.roots):
        with refused("gpu.rim.chain.root"):
            real(data, roots=roots)
    with refused("gpu.rim.chain.root"):
        real(authority.rim({1: [A]}), NOW)


# Real measurements


def full(vectors: Path) -> tuple[GpuReport, Rim, Rim]:
    driver, vbios = (real(read(vectors, f"{FULL}/{name}_rim.xml")) for name in ("driver", "vbios"))
    return GpuReport.parse(read(vectors, f"{FULL}/report.bin")), driver, vbios


def test_real_measurements_33_of_33(vectors: Path) -> None:
    report, driver, vbios = full(vectors)
    assert compare(report.measurements, (driver, vbios), nvdec0_on=report.nvdec0_on) == 33
    assert compare(report.measurements, (vbios, driver), nvdec0_on=report.nvdec0_on) == 33
    assert compare(report.measurements, (driver,), nvdec0_on=report.nvdec0_on) == 21
    assert compare(report.measurements, (vbios,), nvdec0_on=report.nvdec0_on) == 12


def test_every_named_measurement_counts(vectors: Path) -> None:
    """Also the index rule: with any other distance than one, real measurements would not agree."""
    report, driver, vbios = full(vectors)
    named = driver.measurements.keys() | vbios.measurements.keys()
    for index in range(1, 65):
        changed = {**report.measurements, index: b"\xee" * 48}
        if index in named - {36}:
            with refused("gpu.measurements", f"the measurements {index} are not"):
                compare(changed, (driver, vbios), nvdec0_on=False)
        else:
            assert compare(changed, (driver, vbios), nvdec0_on=False) == 33 - (index in named)
    shifted = {index + 1: value for index, value in report.measurements.items()}
    with refused("gpu.measurements"):
        compare(shifted, (driver, vbios), nvdec0_on=False)


def test_real_manifests_of_another_version(vectors: Path) -> None:
    report, _, vbios = full(vectors)
    other = real(read(vectors, "rims/NV_GPU_DRIVER_GH100_550.144.03.xml"))
    with refused("gpu.measurements"):
        compare(report.measurements, (other, vbios), nvdec0_on=report.nvdec0_on)
    early = GpuReport.parse(read(vectors, "h100-535.86.09-rim-mismatch/report.bin"))
    rim = real(read(vectors, "h100-535.86.09-rim-mismatch/vbios_rim.xml"))
    # Manifest index 9.
    with refused("gpu.measurements", "the measurements 10 are not"):
        compare(early.measurements, (rim,), nvdec0_on=early.nvdec0_on)


@pytest.mark.parametrize(
    ("case", "architecture", "expected"),
    [
        (FULL, "hopper", ("NV_GPU_DRIVER_GH100_550.90.07", "NV_GPU_VBIOS_1010_0200_882_96009F0001")),
        (
            "h100-535.86.09-rim-mismatch",
            "hopper",
            ("NV_GPU_DRIVER_GH100_535.86.09", "NV_GPU_VBIOS_1010_0200_882_96005E0001"),
        ),
        (
            "h100-580.159.03",
            "hopper",
            ("NV_GPU_DRIVER_GH100_580.159.03", "NV_GPU_VBIOS_1010_0205_862_9600740020"),
        ),
    ],
)
def test_names_at_the_service(vectors: Path, case: str, architecture: str, expected: tuple[str, str]) -> None:
    assert rim_ids(GpuReport.parse(read(vectors, f"{case}/report.bin")), architecture) == expected


def test_names_of_blackwells_manifests(vectors: Path) -> None:
    says = json.loads(read(vectors, "blackwell-gb100-575.32/case.json"))
    report = GpuReport.parse(read(vectors, "blackwell-gb100-575.32/report.bin"))
    chip = says["chip_info"] or "GB100"
    driver, vbios = rim_ids(report, "blackwell")
    assert driver == f"NV_GPU_CC_DRIVER_{chip}_575.32"
    assert vbios == f"NV_GPU_VBIOS_{says['project']}_{says['project_sku']}_{says['chip_sku']}_970088000F"
    newer = FakeGpu(Authority(), "blackwell", opaque={35: b"GB202\0"})
    assert rim_ids(GpuReport.parse(newer.report(bytes(32))), "blackwell")[0] == "NV_GPU_CC_DRIVER_GB202_550.90.07"


# Every change, every end


@pytest.mark.slow
def test_every_byte_of_a_real_manifest_counts(vectors: Path) -> None:
    """A sample: every 7th byte, and every one of the beginning and of SignedInfo, each replaced in two ways.

    What is accepted all the same is white space for white space: between attributes, where canonicalization makes one
    space of it, and in the base64 of the signature and the certificates. The result is then the same in every field.
    """
    data = read(vectors, f"{FULL}/vbios_rim.xml")
    good = real(data)
    information = data.index(b"<ds:SignedInfo>")
    offsets = {*range(0, len(data), 7), *range(480), *range(information, information + 1200)}
    accepted = 0
    for offset in sorted(offsets):
        for value in (data[offset] ^ 1, 0x0A):
            changed = data[:offset] + bytes([value]) + data[offset + 1 :]
            if changed == data:
                continue
            try:
                rim = real(changed)
            except AttestationError:
                continue
            accepted += 1
            assert data[offset] in b" \n", offset
            assert value in b" \n", offset
            assert (rim.product, rim.version, rim.measurements, rim.chain) == (
                good.product,
                good.version,
                good.measurements,
                good.chain,
            )
    assert accepted > 10


def test_base64_has_one_form(vectors: Path) -> None:
    """Bits behind the last byte of a certificate, which a decoder drops."""
    data = read(vectors, f"{FULL}/vbios_rim.xml")
    assert data.count(b"4=\n</ds:X509Certificate>") == 1
    with pytest.raises(EvidenceError, match="one form"):
        real(data.replace(b"4=\n</ds:X509Certificate>", b"5=\n</ds:X509Certificate>"))


def test_every_truncation_is_malformed(vectors: Path) -> None:
    """At every 16th byte, and at every one of the last and first 300."""
    data = read(vectors, f"{FULL}/driver_rim.xml")
    for end in {*range(0, len(data), 16), *range(300), *range(len(data) - 300, len(data))}:
        with pytest.raises(EvidenceError):
            real(data[:end])
