"""CPU evidence of every provider, verified by that provider's rules."""

import datetime

from adytum.attestation.core.checks import Checks
from adytum.attestation.core.errors import Step, UnsupportedError
from adytum.attestation.core.trust import TrustRoots
from adytum.attestation.document.evidence import Collateral, CpuEvidence
from adytum.attestation.document.facts import CpuFacts
from adytum.attestation.simulated import report as simulated
from adytum.attestation.snp.verify import verify_snp
from adytum.attestation.tdx.verify import verify_tdx
from adytum.attestation.vtpm.verify import verify_vtpm


def verify_cpu(
    evidence: CpuEvidence, collateral: Collateral, *, trust: TrustRoots, now: datetime.datetime, checks: Checks
) -> CpuFacts:
    """Verifies by the provider's own rules. Raises `AttestationError`; an unknown provider is refused."""
    match evidence.provider:
        case simulated.PROVIDER:
            return simulated.verify_simulated(evidence, pins=trust.simulated, now=now, checks=checks)
        case "sev-snp" | "sev-snp-vtpm":
            verify = verify_snp if evidence.provider == "sev-snp" else verify_vtpm
            return verify(
                evidence.report,
                evidence.certificates,
                ark=trust.amd_ark,
                now=now,
                checks=checks,
                crls=collateral.crls,
            )
        case "tdx":
            return verify_tdx(evidence.report, collateral=collateral.tdx, roots=trust.intel_sgx, now=now, checks=checks)
        case unknown:
            raise UnsupportedError(
                Step.CPU_REPORT,
                f"this version cannot verify CPU evidence of the provider {unknown}, "
                "and what is not verified is refused; use a version that can",
            )
