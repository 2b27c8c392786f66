"""Every recorded case gives its expected outcome: one table, and a test that no case is missing from it.

Through the same functions as the command line. Times are pinned: most certificates have expired since.
"""

import datetime
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from adytum.attestation.cli import commands
from adytum.attestation.cli.verdict import Verdict
from adytum.attestation.core.errors import EvidenceError
from adytum.attestation.snp.report import SnpReport

ACCEPTED = (0, "accepted")
DCAP = "tdx.collateral"


def at(text: str) -> datetime.datetime:
    return datetime.datetime.fromisoformat(text).replace(tzinfo=datetime.UTC)


AUGUST = at("2025-08-21T12:00")


@dataclass(frozen=True)
class Snp:
    """Reports by themselves, by default 30 days after their certificate begins."""

    case: str
    outcome: tuple[int, str] = ACCEPTED
    vek: str = "vcek.der"
    report: str = "report.bin"
    time: datetime.datetime | None = None
    crl: str | None = None
    product: str | None = None

    def run(self, folder: Path, about: dict[str, Any]) -> Verdict:
        product = self.product or about["product"].lower()
        roots = folder.parent / "amd-roots"
        middle = "asvk" if "vlek" in self.vek else "ask"
        chain = (roots / f"{product}_{middle}.pem").read_bytes() + (roots / f"{product}_ark.pem").read_bytes()
        begins = datetime.datetime.fromisoformat((about.get("vek_validity") or ["2026-01-01T00:00:00+00:00"])[0])
        return commands.snp(
            (folder / self.report).read_bytes(),
            (folder / self.vek).read_bytes(),
            chain,
            None if self.crl is None else (roots / self.crl).read_bytes(),
            None,
            self.time or begins + datetime.timedelta(days=30),
        )


@dataclass(frozen=True)
class Gpu:
    """Reports by themselves, with the manifests and answers named."""

    case: str
    outcome: tuple[int, str] = ACCEPTED
    rims: tuple[str, ...] = ()
    ocsp: str | None = None
    time: datetime.datetime = AUGUST
    matched: int = 0
    revocation: bool = False

    def run(self, folder: Path, about: dict[str, Any]) -> Verdict:
        return commands.gpu(
            (folder / "report.bin").read_bytes(),
            (folder / "chain.pem").read_bytes(),
            bytes.fromhex(about["nonce"]),
            [(folder / name).read_bytes() for name in self.rims],
            [] if self.ocsp is None else [path.read_bytes() for path in sorted(folder.glob(self.ocsp))],
            None,
            None,
            self.time,
        )


@dataclass(frozen=True)
class Tdx:
    """Quotes by themselves; `cut` bytes at the end are omitted."""

    case: str
    time: datetime.datetime
    outcome: tuple[int, str] = ACCEPTED
    collateral: bool = False
    cut: int = 0
    status: str | None = None

    def run(self, folder: Path, about: dict[str, Any]) -> Verdict:
        quote = (folder / "quote.bin").read_bytes()
        return commands.tdx(
            quote[: len(quote) - self.cut],
            (folder / "collateral.json").read_bytes() if self.collateral else None,
            None,
            self.time,
        )


BOTH = ("driver_rim.xml", "vbios_rim.xml")
CASES: tuple[Snp | Gpu | Tdx, ...] = (
    # SEV-SNP: every version and product line, VCEK and VLEK.
    Snp("sev-snp/milan-v2-virtee"),
    Snp("sev-snp/milan-v2-google", (10, "policy.debug")),
    Snp("sev-snp/milan-v2-azure-hcl"),
    Snp("sev-snp/milan-v2-azure-hcl", report="hcl-report.bin"),
    Snp("sev-snp/milan-v2-trustee-badvceks"),
    Snp("sev-snp/milan-v2-trustee-badvceks", (10, "snp.chain.chain"), vek="vcek-invalid-legacy.der"),
    Snp("sev-snp/milan-v2-trustee-badvceks", (10, "snp.chain.chain"), vek="vcek-invalid-new.der"),
    Snp("sev-snp/milan-v3-dstack"),
    Snp("sev-snp/milan-v3-azure-2"),
    Snp("sev-snp/milan-v3-vlek-aws", vek="vlek.der"),
    Snp("sev-snp/milan-v3-vlek-aws", (10, "snp.chain.validity"), vek="vlek.der", time=at("2026-01-01")),
    Snp("sev-snp/genoa-v3-tsm-auxblob"),
    Snp("sev-snp/genoa-v3-tsm-auxblob", report="outblob.bin"),
    Snp("sev-snp/genoa-v3-azure"),
    Snp("sev-snp/genoa-v3-azure", report="hcl-report.bin"),
    Snp("sev-snp/genoa-v3-microsoft"),
    Snp("sev-snp/siena-v5-lunal"),
    # Its platform_info has bit 6 set, which nobody documents.
    Snp("sev-snp/turin-v5-microsoft"),
    # Lists of revoked certificates: current, not yet and no longer; Genoa's names an ASK that is not this chain's.
    Snp("sev-snp/milan-v3-azure-2", time=at("2025-06-01"), crl="milan_crl.pem"),
    Snp("sev-snp/milan-v3-azure-2", (10, "snp.crl.validity"), time=at("2025-05-01"), crl="milan_crl.pem"),
    Snp("sev-snp/milan-v3-azure-2", (10, "snp.crl.validity"), time=at("2026-06-01"), crl="milan_crl.pem"),
    Snp("sev-snp/genoa-v3-azure", time=at("2025-06-01"), crl="genoa_crl.pem"),
    Snp("sev-snp/genoa-v3-azure", (10, "snp.crl.signature"), time=at("2025-06-01"), crl="milan_crl.pem"),
    # Another line's chain.
    Snp("sev-snp/genoa-v3-azure", (10, "snp.chain.root"), product="milan"),
    # GPUs.
    Gpu("nvidia-gpu/h100-550.90.07-full", rims=BOTH, matched=33),
    Gpu("nvidia-gpu/h100-550.90.07-full", ocsp="ocsp/gpu_certificate*", revocation=True),
    Gpu("nvidia-gpu/h100-550.90.07-full", rims=BOTH, matched=33, ocsp="ocsp/gpu_[drv]*", time=at("2025-10-24T12:00")),
    Gpu("nvidia-gpu/h100-550.90.07-full", (10, "gpu.ocsp.validity"), ocsp="ocsp/gpu_c*", time=at("2025-10-24T12:00")),
    Gpu("nvidia-gpu/h100-550.90.07-full", (10, "gpu.rim.chain.validity"), rims=BOTH, time=at("2026-03-01")),
    Gpu("nvidia-gpu/h100-550.90.07-full", rims=BOTH[:1], matched=21),
    Gpu("nvidia-gpu/h100-580.159.03"),
    Gpu("nvidia-gpu/h100-535.86.09-rim-mismatch"),
    Gpu("nvidia-gpu/h100-535.86.09-rim-mismatch", (10, "gpu.rim.digest"), rims=BOTH),
    # Its VBIOS's manifest is validly signed, and names another value at its index 9.
    Gpu("nvidia-gpu/h100-535.86.09-rim-mismatch", (10, "gpu.measurements"), rims=BOTH[1:]),
    Gpu("nvidia-gpu/h100-570.124.03-rim-expired"),
    Gpu("nvidia-gpu/h100-570.124.03-rim-expired", (10, "gpu.rim.digest"), rims=BOTH[:1]),
    Gpu("nvidia-gpu/h100-560.00-badsig", (10, "gpu.signature")),
    Gpu("nvidia-gpu/h100-570.86.10-cert-hold"),
    Gpu("nvidia-gpu/h100-580.95.05-trailing-byte"),
    Gpu("nvidia-gpu/h100-ppcie-590.12-gpu-0"),
    Gpu("nvidia-gpu/h100-ppcie-590.12-gpu-1"),
    Gpu("nvidia-gpu/h100-ppcie-590.12-gpu-2"),
    Gpu("nvidia-gpu/h100-ppcie-590.12-gpu-3"),
    Gpu("nvidia-gpu/blackwell-gb100-575.32"),
    # The recorded expectation is "accept" for its signature, which holds: a wrong one is rejected before this.
    Gpu("nvidia-gpu/nvswitch-ls10", (20, "unsupported")),
    # TDX.
    Tdx("tdx/v4-uptodate-phala", at("2025-06-20T10:32:27")),
    Tdx("tdx/v4-uptodate-phala", at("2025-06-20T10:32:27"), collateral=True, status="UpToDate"),
    Tdx("tdx/v4-uptodate-phala", at("2025-08-01"), (10, DCAP), collateral=True),
    Tdx("tdx/v5-outdated-phala", at("2026-02-19T11:12:11")),
    Tdx("tdx/v5-outdated-phala", at("2026-02-19T11:12:11"), (10, DCAP), collateral=True),
    # 39 bytes of text follow the quote, "extra bytes(only for testing purpose)". Zeros may follow, text may not.
    Tdx("tdx/v4-spr-google", at("2023-07-01"), (30, "malformed")),
    Tdx("tdx/v4-spr-google", at("2023-07-01"), cut=39),
    Tdx("tdx/v5-google", at("2026-06-01")),
    Tdx("tdx/v4-debug-td", at("2024-06-01"), (10, "policy.debug")),
)
PARSED_ONLY = ("sev-snp/milan-v4-gce-parseonly", "sev-snp/milan-v5-parseonly")
ELSEWHERE = (
    # The quotes were made for other data than the 64 bytes of a adytum document: tests/unit/attestation/vtpm.
    "azure-vtpm/milan-v3-quote",
    "azure-vtpm/milan-v3-quote-user-data",
    "azure-vtpm/genoa-v3-quote",
)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.case}-{case.outcome[1]}")
def test_case(case: Snp | Gpu | Tdx, vectors: Path) -> None:
    if isinstance(case, Tdx) and case.collateral:
        pytest.importorskip("dcap_qvl", reason="needs the extra tdx")
    folder = vectors / case.case
    verdict = case.run(folder, json.loads((folder / "case.json").read_text()))
    assert (verdict.status, verdict.code) == case.outcome, verdict.reason
    if isinstance(case, Gpu) and verdict.status == 0:
        assert verdict.facts["measurements_matched"] == case.matched
        assert verdict.facts["rims_checked"] is (case.matched > 0 and case.rims == BOTH)
        assert verdict.facts["revocation_checked"] is case.revocation
    if isinstance(case, Tdx) and verdict.status == 0:
        assert verdict.facts["tdx"] == {"status": case.status}
    if isinstance(case, Snp) and verdict.status == 0:
        assert verdict.facts["cpu_revocation_checked"] is (case.crl is not None)


@pytest.mark.parametrize("case", PARSED_ONLY)
def test_parsed_only(case: str, vectors: Path) -> None:
    about = json.loads((vectors / case / "case.json").read_text())
    report = SnpReport.parse((vectors / case / "report.bin").read_bytes())
    assert (report.version, report.product) == (about["report_version"], about["product"])
    assert report.report_data.hex() == about["report_data"]
    assert report.measurement.hex() == about["measurement"]


def test_reports_say_what_the_table_of_vectors_says(vectors: Path) -> None:
    seen = 0
    for path in sorted(vectors.glob("sev-snp/*/case.json")):
        about = json.loads(path.read_text())
        report = SnpReport.parse((path.parent / "report.bin").read_bytes())
        assert report.version == about["report_version"]
        assert report.signing_key == about["signing_key"].lower()
        assert report.policy == int(about["policy"], 16)
        assert report.platform_info == int(about["platform_info"], 16)
        assert report.vmpl == about["vmpl"]
        assert report.reported_tcb.hex() == about["reported_tcb"]
        assert report.current_tcb.hex() == about["current_tcb"]
        assert report.chip_id.hex() == about["chip_id"]
        assert report.report_data.hex() == about["report_data"]
        assert report.measurement.hex() == about["measurement"]
        assert report.product in (None, about["product"])
        seen += 1
    assert seen == 14


def test_no_case_is_missing(vectors: Path) -> None:
    found = {f"{path.parent.parent.name}/{path.parent.name}" for path in vectors.glob("*/*/case.json")}
    listed = {case.case for case in CASES} | set(PARSED_ONLY) | set(ELSEWHERE)
    assert found == listed
    print(f"{len(found)} recorded cases, {len(CASES) + len(PARSED_ONLY)} outcomes")  # noqa: T201 - for -s


def test_every_byte_of_a_real_report_matters(vectors: Path) -> None:
    """1,184 bytes: signed, signature, or zero where the version is reserved. Not one may be another."""
    case = Snp("sev-snp/genoa-v3-azure")
    folder = vectors / case.case
    about = json.loads((folder / "case.json").read_text())
    data = (folder / "report.bin").read_bytes()
    from adytum.attestation.core.certificates import load_all
    from adytum.attestation.core.checks import Checks
    from adytum.attestation.core.errors import AttestationError
    from adytum.attestation.core.trust import AMD_ARK
    from adytum.attestation.snp.verify import verify_snp

    roots = folder.parent / "amd-roots"
    files = (folder / "vcek.der", roots / "genoa_ask.pem", roots / "genoa_ark.pem")
    from cryptography.hazmat.primitives.serialization import Encoding

    chain = [load_all(path.read_bytes(), "it")[0].public_bytes(Encoding.DER) for path in files]
    now = datetime.datetime.fromisoformat(about["vek_validity"][0]) + datetime.timedelta(days=30)

    def accepted(report: bytes) -> bool:
        try:
            verify_snp(report, chain, ark=AMD_ARK, now=now, checks=Checks())
        except AttestationError:
            return False
        return True

    assert accepted(data)
    assert [i for i in range(len(data)) if accepted(data[:i] + bytes([data[i] ^ 0x10]) + data[i + 1 :])] == []


def test_truncated_reports_are_malformed(vectors: Path) -> None:
    from adytum.attestation.nvidia.spdm import GpuReport
    from adytum.attestation.tdx.quote import TdxQuote

    for name, parse in (
        ("sev-snp/turin-v5-microsoft/report.bin", SnpReport.parse),
        ("nvidia-gpu/h100-580.159.03/report.bin", GpuReport.parse),
        ("tdx/v5-google/quote.bin", TdxQuote.parse),
    ):
        data = (vectors / name).read_bytes()
        parse(data)
        for end in range(len(data)):
            with pytest.raises(EvidenceError):
                parse(data[:end])
