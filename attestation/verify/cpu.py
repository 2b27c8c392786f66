"""CPU evidence of every provider, verified by that provider's rules, as facts that a policy can judge."""

import datetime
from dataclasses import dataclass

from adytum.attestation.core.checks import Checks
from adytum.attestation.core.errors import Step, UnsupportedError
from adytum.attestation.core.trust import TrustRoots
from adytum.attestation.document.evidence import Collateral, CpuEvidence
from adytum.attestation.policy.rules import SnpFacts, TdxFacts
from adytum.attestation.simulated import report as simulated
from adytum.attestation.snp.verify import VerifiedSnp, verify_snp
from adytum.attestation.tdx.verify import verify_tdx
from adytum.attestation.vtpm.verify import verify_vtpm


@dataclass(frozen=True)
class CpuAppraisal:
    """What one CPU's evidence establishes."""

    provider: str
    report_data: bytes
    """64 bytes: what the report was asked to carry."""
    measurement: bytes
    """48 bytes. SEV-SNP: the launch measurement (behind a paravisor, the paravisor's). TDX: SHA-384 of MRTD and the
    four RTMRs. Simulated: what it was given."""
    key_sha256: bytes
    """SHA-256 of the SubjectPublicKeyInfo of the hardware's key."""
    signed_at: tuple[tuple[str, int], ...] = ()
    debug: bool = False
    migration: bool = False
    revocation_checked: bool | None = None
    valid_until: datetime.datetime | None = None
    snp: SnpFacts | None = None
    tdx: TdxFacts | None = None
    pcrs: dict[int, bytes] | None = None


def appraise_cpu(
    evidence: CpuEvidence, collateral: Collateral, *, trust: TrustRoots, now: datetime.datetime, checks: Checks
) -> CpuAppraisal:
    """Verifies by the provider's own rules. Raises `AttestationError`; an unknown provider is refused."""
    match evidence.provider:
        case simulated.PROVIDER:
            return _simulated(evidence, trust, now, checks)
        case "sev-snp":
            snp = verify_snp(
                evidence.report,
                evidence.certificates,
                ark=trust.amd_ark,
                now=now,
                checks=checks,
                crls=collateral.crls,
            )
            return _snp(evidence.provider, snp, snp.report.report_data)
        case "sev-snp-vtpm":
            vtpm = verify_vtpm(
                evidence.report,
                evidence.certificates,
                ark=trust.amd_ark,
                now=now,
                checks=checks,
                crls=collateral.crls,
            )
            return _snp(evidence.provider, vtpm.snp, vtpm.report_data, dict(enumerate(vtpm.pcrs)))
        case "tdx":
            return _tdx(evidence, collateral, trust, now, checks)
        case unknown:
            raise UnsupportedError(
                Step.CPU_REPORT,
                f"this version cannot verify CPU evidence of the provider {unknown}, "
                "and what is not verified is refused; use a version that can",
            )


def _simulated(evidence: CpuEvidence, trust: TrustRoots, now: datetime.datetime, checks: Checks) -> CpuAppraisal:
    report = simulated.SimulatedReport.verify(evidence, trust.simulated, now)
    checks.ok("simulated.report", "the report is signed by a simulated CPU, which proves nothing about hardware")
    return CpuAppraisal(
        provider=simulated.PROVIDER,
        report_data=report.report_data,
        measurement=report.measurement,
        key_sha256=report.key_sha256,
        signed_at=(("the CPU report's issued_at", report.issued_at),),
    )


def _snp(provider: str, snp: VerifiedSnp, report_data: bytes, pcrs: dict[int, bytes] | None = None) -> CpuAppraisal:
    return CpuAppraisal(
        provider=provider,
        report_data=report_data,
        measurement=snp.report.measurement,
        key_sha256=snp.key_sha256,
        debug=snp.report.debug,
        migration=snp.report.migration,
        revocation_checked=snp.revocation_checked,
        valid_until=snp.valid_until,
        snp=SnpFacts(snp.product, snp.tcb, snp.report.vmpl, snp.report.flags, snp.report.chip_id),
        pcrs=pcrs,
    )


def _tdx(
    evidence: CpuEvidence, collateral: Collateral, trust: TrustRoots, now: datetime.datetime, checks: Checks
) -> CpuAppraisal:
    tdx = verify_tdx(evidence.report, collateral=collateral.tdx, roots=trust.intel_sgx, now=now, checks=checks)
    return CpuAppraisal(
        provider=evidence.provider,
        report_data=tdx.report_data,
        measurement=tdx.measurement,
        key_sha256=tdx.key_sha256,
        debug=tdx.debug,
        migration=tdx.td.migratable,
        revocation_checked=tdx.revocation_checked,
        valid_until=tdx.valid_until,
        tdx=TdxFacts(tdx.tcb_status),
    )
