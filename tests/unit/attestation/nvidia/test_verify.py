"""Verification of one GPU: the real reports, with the manifests and the answers that belong to them, at their time."""

import datetime
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.serialization import Encoding

from adytum.attestation.core.certificates import load_all
from adytum.attestation.core.checks import Checks
from adytum.attestation.core.errors import EvidenceError, Step, UnsupportedError, VerificationError
from adytum.attestation.core.trust import TrustRoots
from adytum.attestation.document.facts import GpuFacts
from adytum.attestation.nvidia.spdm import GpuReport
from adytum.attestation.nvidia.verify import verify_gpu
from tests.unit.attestation.nvidia.authority import NOW
from tests.unit.attestation.nvidia.test_spdm import CASES, GPUS, case_says, real_report

FULL = "h100-550.90.07-full"
DEVICE_OCSP = datetime.datetime(2025, 8, 21, 12, tzinfo=datetime.UTC)
"""When the full case's answers about the device's certificates are current."""
MANIFEST_OCSP = datetime.datetime(2025, 10, 24, 18, tzinfo=datetime.UTC)
"""When those about the manifests' signers are."""
BASIC = ["gpu.structure", "gpu.chain", "gpu.signature", "gpu.nonce"]


def codes(checks: Checks) -> tuple[list[str], list[str]]:
    return [check.code for check in checks.passed], [check.code for check in checks.not_given]


@dataclass(frozen=True)
class Real:
    """A recorded case."""

    report: bytes
    chain: tuple[bytes, ...]
    nonce: bytes
    rims: tuple[bytes, ...]
    ocsp: Mapping[str, bytes]

    @classmethod
    def of(cls, vectors: Path, case: str) -> "Real":
        folder = vectors / "nvidia-gpu" / case
        chain = load_all((folder / "chain.pem").read_bytes(), "the chain")
        return cls(
            report=real_report(vectors, case),
            chain=tuple(certificate.public_bytes(Encoding.DER) for certificate in chain),
            nonce=bytes.fromhex(case_says(vectors, case)["nonce"]),
            rims=tuple(path.read_bytes() for path in sorted(folder.glob("*_rim.xml"))),
            ocsp={path.stem: path.read_bytes() for path in sorted(folder.glob("ocsp/*.der"))},
        )

    def verified(
        self,
        *,
        now: datetime.datetime = DEVICE_OCSP,
        checks: Checks | None = None,
        rims: Sequence[bytes] = (),
        ocsp: Sequence[bytes] = (),
    ) -> GpuFacts:
        return verify_gpu(
            self.report,
            self.chain,
            nonce=self.nonce,
            roots=TrustRoots(),
            now=now,
            checks=Checks() if checks is None else checks,
            rims=rims,
            ocsp=ocsp,
        )


@pytest.mark.parametrize("case", [case for case in GPUS if not case.endswith("badsig")])
def test_real_reports_by_themselves(vectors: Path, case: str) -> None:
    """Those whose manifest is tampered with or whose certificate is on hold too: no manifest, no OCSP answer here."""
    checks = Checks()
    says = case_says(vectors, case)
    gpu = Real.of(vectors, case).verified(checks=checks)
    assert gpu.architecture == says["arch"].lower()
    assert (gpu.driver, gpu.vbios) == (says["driver_version"], says["vbios_version"])
    flag = GpuReport.parse(Real.of(vectors, case).report).feature_flag
    assert flag == {"": None, "0000": 0, "0200": 2}[says["feature_flag"]]
    assert (gpu.rims_checked, gpu.measurements_matched, gpu.revocation_checked) == (False, 0, False)
    assert gpu.valid_until.year == 9999
    passed, lacking = codes(checks)
    if says["fwid_in_report"]:
        assert (passed, lacking) == ([*BASIC, "gpu.fwid"], ["gpu.rim", "gpu.ocsp"])
    else:
        assert (passed, lacking) == (BASIC, ["gpu.fwid", "gpu.rim", "gpu.ocsp"])


def test_a_real_report_with_a_wrong_signature(vectors: Path) -> None:
    with pytest.raises(VerificationError) as caught:
        Real.of(vectors, "h100-560.00-badsig").verified()
    assert caught.value.code == "gpu.signature"


def test_a_real_report_with_a_byte_behind_it(vectors: Path) -> None:
    real = Real.of(vectors, "h100-580.95.05-trailing-byte")
    assert real.verified() == replace(real, report=real.report[:-1]).verified()


def test_the_full_real_set(vectors: Path) -> None:
    checks = Checks()
    real = Real.of(vectors, FULL)
    gpu = real.verified(now=DEVICE_OCSP, rims=real.rims, checks=checks)
    assert (gpu.rims_checked, gpu.measurements_matched) == (True, 33)
    assert gpu.valid_until == datetime.datetime(2026, 2, 22, 23, 17, 58, tzinfo=datetime.UTC)
    assert codes(checks) == ([*BASIC, "gpu.fwid", "gpu.rim", "gpu.rim", "gpu.measurements"], ["gpu.ocsp"])


def test_real_revocation_answers(vectors: Path) -> None:
    """The two groups were recorded two months apart: each covers its part at its time, together they never do."""
    real = Real.of(vectors, FULL)
    device = [der for name, der in real.ocsp.items() if name.startswith("gpu_certificate")]
    manifests = [der for name, der in real.ocsp.items() if not name.startswith("gpu_certificate")]
    assert (len(device), len(manifests)) == (3, 4)
    gpu = real.verified(now=DEVICE_OCSP, ocsp=device)
    assert gpu.revocation_checked
    assert DEVICE_OCSP < gpu.valid_until < DEVICE_OCSP + datetime.timedelta(days=1)
    assert not real.verified(now=DEVICE_OCSP, ocsp=device[:2]).revocation_checked
    assert not real.verified(now=DEVICE_OCSP, ocsp=device, rims=real.rims).revocation_checked
    part = real.verified(now=MANIFEST_OCSP, ocsp=manifests, rims=real.rims)
    assert (part.revocation_checked, part.rims_checked) == (False, True)
    for answers in (device, manifests, [*device, *manifests]):
        with pytest.raises(VerificationError) as caught:
            real.verified(now=NOW, ocsp=answers, rims=real.rims)
        assert caught.value.code == "gpu.ocsp.validity"


@pytest.mark.parametrize(
    ("case", "manifests", "now", "code"),
    [
        (FULL, ["driver", "vbios"], datetime.datetime(2026, 3, 1, tzinfo=datetime.UTC), "gpu.rim.chain.validity"),
        (FULL, ["vbios"], datetime.datetime(2026, 7, 1, tzinfo=datetime.UTC), "gpu.rim.chain.validity"),
        ("h100-535.86.09-rim-mismatch", ["driver"], DEVICE_OCSP, "gpu.rim.digest"),
        ("h100-535.86.09-rim-mismatch", ["driver", "vbios"], DEVICE_OCSP, "gpu.rim.digest"),
        ("h100-535.86.09-rim-mismatch", ["vbios"], DEVICE_OCSP, "gpu.measurements"),
        ("h100-570.124.03-rim-expired", ["driver"], DEVICE_OCSP, "gpu.rim.digest"),
        (FULL, ["driver", "vbios"], datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC), "gpu.chain.validity"),
    ],
)
def test_real_manifests_that_do_not_hold(
    vectors: Path, case: str, manifests: list[str], now: datetime.datetime, code: str
) -> None:
    folder = vectors / "nvidia-gpu" / case
    rims = [(folder / f"{name}_rim.xml").read_bytes() for name in manifests]
    with pytest.raises(VerificationError) as caught:
        Real.of(vectors, case).verified(now=now, rims=rims)
    assert caught.value.code == code


def test_another_product_s_manifests_count_for_nothing(vectors: Path) -> None:
    checks = Checks()
    gpu = Real.of(vectors, "h100-580.159.03").verified(rims=Real.of(vectors, FULL).rims, checks=checks)
    assert not gpu.rims_checked
    assert "gpu.rim" in codes(checks)[1]


def test_a_real_switch_is_not_covered(vectors: Path) -> None:
    real = Real.of(vectors, "nvswitch-ls10")
    with pytest.raises(UnsupportedError, match="NVSwitch") as caught:
        real.verified()
    assert (caught.value.step, caught.value.code) == (Step.GPU, "unsupported")
    with pytest.raises(VerificationError) as wrong:
        replace(real, report=real.report[:-1] + bytes([real.report[-1] ^ 1])).verified()
    assert wrong.value.code == "gpu.signature"


@pytest.mark.slow
def test_every_byte_of_a_real_report_is_signed(vectors: Path) -> None:
    """One bit of each of its 4,117 bytes; none may change. (Zero bytes after it are the only ones that may.)"""
    real = Real.of(vectors, FULL)
    accepted = []
    for at in range(len(real.report)):
        data = bytearray(real.report)
        data[at] ^= 1 << at % 8
        try:
            replace(real, report=bytes(data)).verified()
        except (EvidenceError, VerificationError):
            continue
        accepted.append(at)
    assert accepted == []


@pytest.mark.parametrize("place", range(5))
def test_bytes_of_a_real_chain(vectors: Path, place: int) -> None:
    """Every 7th byte, and the first and last 16, of each certificate; of the root too: its pin covers only its key."""
    real = Real.of(vectors, FULL)
    certificate = real.chain[place]
    size = len(certificate)
    for at in sorted({*range(0, size, 7), *range(16), *range(size - 16, size)}):
        changed = bytearray(certificate)
        changed[at] ^= 1
        chain = (*real.chain[:place], bytes(changed), *real.chain[place + 1 :])
        with pytest.raises((EvidenceError, VerificationError)):
            replace(real, chain=chain).verified()


@pytest.mark.parametrize("case", CASES)
def test_each_real_report_needs_its_own_chain(vectors: Path, case: str) -> None:
    other = Real.of(vectors, FULL if case != FULL else "h100-580.159.03")
    with pytest.raises(VerificationError) as caught:
        replace(Real.of(vectors, case), chain=other.chain).verified()
    assert caught.value.code == "gpu.signature"
