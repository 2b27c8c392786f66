"""Verifies SEV-SNP evidence of a guest behind Azure's paravisor, with the quote of its virtual TPM."""

import datetime
from collections.abc import Mapping, Sequence
from dataclasses import replace

from adytum.attestation.core.checks import Checks
from adytum.attestation.core.errors import EvidenceError, Step, VerificationError
from adytum.attestation.document.facts import CpuFacts
from adytum.attestation.snp.report import SnpReport
from adytum.attestation.snp.verify import verify_snp
from adytum.attestation.vtpm.evidence import PROVIDER, VtpmReport, qualifying_data
from adytum.attestation.vtpm.hcl import HclReport
from adytum.attestation.vtpm.quote import verify_quote


def verify_vtpm(
    report: bytes,
    certificates: Sequence[bytes],
    *,
    ark: Mapping[str, frozenset[bytes]],
    now: datetime.datetime,
    checks: Checks,
    crls: Sequence[bytes] = (),
) -> CpuFacts:
    """Verifies at `now`, which needs a time zone. Raises `AttestationError`, or returns the facts.

    1. Structure: the four parts, and the paravisor's report in them (`EvidenceError`, `UnsupportedError`).
    2. SNP: the embedded report, by `verify_snp` with `certificates`, `ark` and `crls`.
    3. Runtime data: the SNP report was requested at VMPL 0, where only the paravisor runs, and its report data is the
       hash of the runtime data. At another level the guest could have requested it for runtime data of its own making.
    4. Quote: the attestation key named in the runtime data signed it, over all registers, and they are those presented.
    5. User data: the runtime data has the 64 bytes that the guest wrote.
    6. Qualifying data: the quote carries the SHA-256 of these bytes. So the registers are as fresh as the SNP report.
    """
    # 1. Structure
    parts = VtpmReport.parse(report)
    hcl = HclReport.parse(parts.hcl)
    if hcl.encoded != parts.hcl:
        raise EvidenceError("the paravisor's report has bytes after its end")
    checks.ok("vtpm.structure", "the paravisor's report follows its format")

    # 2. SNP
    snp = verify_snp(hcl.snp_report, certificates, ark=ark, now=now, checks=checks, crls=crls)

    # 3. Runtime data
    if (vmpl := SnpReport.parse(hcl.snp_report).vmpl) != 0:
        raise _wrong("vmpl", f"the SNP report was requested at VMPL {vmpl}, so not by the paravisor")
    if snp.report_data != hcl.report_data:
        raise _wrong("runtime_data", "the runtime data is not what the SNP report was made for")
    checks.ok("vtpm.runtime_data", "the hardware signed the paravisor's runtime data, which names the TPM's key")

    # 4. Quote
    quote = verify_quote(parts.quote, parts.signature, parts.pcrs, hcl.attestation_key, checks)

    # 5. User data
    if hcl.user_data is None:
        raise _wrong("user_data", "the runtime data has no user-data, so the SNP report was not made for anything")
    checks.ok("vtpm.user_data", "the runtime data has the 64 bytes that the guest had signed")

    # 6. Qualifying data
    if quote.qualifying_data != qualifying_data(hcl.user_data):
        raise _wrong("qualifying_data", "the TPM's quote was not made for the same 64 bytes as the SNP report")
    checks.ok("vtpm.qualifying_data", "the TPM's quote was made for the same 64 bytes")
    return replace(snp, provider=PROVIDER, report_data=hcl.user_data, pcrs=dict(enumerate(parts.pcrs)))


def _wrong(code: str, message: str) -> VerificationError:
    return VerificationError(Step.CPU_REPORT, f"vtpm.{code}", message)
