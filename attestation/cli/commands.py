"""What each command does: it appraises what it is given and returns a verdict."""

import datetime
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from adytum.attestation.cli.verdict import Verdict, cpu_facts, document_facts, judge
from adytum.attestation.core.certificates import load, load_all
from adytum.attestation.core.checks import Checks
from adytum.attestation.core.errors import EvidenceError
from adytum.attestation.core.limits import LIMITS
from adytum.attestation.core.trust import TrustRoots
from adytum.attestation.document.binding import NONCE_SIZE
from adytum.attestation.document.evidence import Collateral, CpuEvidence
from adytum.attestation.document.facts import CpuFacts, Facts
from adytum.attestation.policy.policy import Policy
from adytum.attestation.verifier.cpu import verify_cpu
from adytum.attestation.verifier.document import verify
from adytum.attestation.verifier.fetch import fetch_document

_PEM = b"-----BEGIN"
_NO_CPU = CpuFacts("none", report_data=b"", measurement=b"", key_sha256=b"")
"""For the rules about GPUs, which judge a GPU's report by itself."""


class Unusable(Exception):
    """The command cannot be carried out as it was given."""


def verify_document(
    document: bytes, nonce: bytes, policy: Path, now: datetime.datetime, simulated: frozenset[bytes] | None
) -> Verdict:
    """Verifies a whole document for the client that chose the nonce. Raises `PolicyFileError`."""
    rules = Policy.from_toml(policy)

    def appraise(checks: Checks) -> dict[str, object]:
        trust = TrustRoots(simulated=simulated)
        return document_facts(verify(document, nonce=nonce, policy=rules, trust=trust, now=now, checks=checks))

    return judge(appraise)


def fetch(url: str, policy: Path, out: Path | None, simulated: frozenset[bytes] | None) -> Verdict:
    """Fetches a backend's evidence on a fresh nonce, and verifies it.

    Raises `FetchError`, `PolicyFileError`, `Unusable`."""
    Policy.from_toml(policy)  # A bad policy is reported before the backend is asked.
    nonce = os.urandom(NONCE_SIZE)
    document = fetch_document(url, nonce)
    if out is not None:
        try:
            out.write_bytes(document)
        except OSError as error:
            raise Unusable(f"{out} cannot be written: {error.strerror}") from error
    verdict = verify_document(document, nonce, policy, datetime.datetime.now(datetime.UTC), simulated)
    return replace(verdict, facts={**verdict.facts, "nonce": nonce.hex()})


def snp(
    report: bytes, vek: bytes, chain: bytes, crl: bytes | None, policy: Path | None, now: datetime.datetime
) -> Verdict:
    """Verifies an SEV-SNP report by itself. Without a policy, debugging and migration have to be off."""

    def appraise(checks: Checks) -> dict[str, object]:
        certificates = (*load_all(vek, "the VEK"), *load_all(chain, "the chain"))
        evidence = CpuEvidence("sev-snp", _bare(report), tuple(c.public_bytes(Encoding.DER) for c in certificates))
        collateral = Collateral(crls=() if crl is None else (_crl(crl),))
        found = verify_cpu(evidence, collateral, trust=TrustRoots(), now=now, checks=checks)
        return _cpu(found, policy, now, checks)

    return judge(appraise)


def tdx(quote: bytes, collateral: bytes | None, policy: Path | None, now: datetime.datetime) -> Verdict:
    """Verifies a TDX quote by itself. Without a policy, debugging and migration have to be off."""

    def appraise(checks: Checks) -> dict[str, object]:
        evidence = CpuEvidence("tdx", quote, ())
        found = verify_cpu(evidence, Collateral(tdx=collateral), trust=TrustRoots(), now=now, checks=checks)
        return _cpu(found, policy, now, checks)

    return judge(appraise)


def gpu(
    report: bytes,
    chain: bytes,
    nonce: bytes,
    rims: Sequence[bytes],
    ocsp: Sequence[bytes],
    nras: tuple[bytes, bytes] | None,
    policy: Path | None,
    now: datetime.datetime,
) -> Verdict:
    """Verifies a GPU's report by itself. It does not contain the confidential-computing mode; only a document does."""
    from adytum.attestation.nvidia.nras import check_devices, verify_nras
    from adytum.attestation.nvidia.verify import verify_gpu

    def appraise(checks: Checks) -> dict[str, object]:
        certificates = tuple(c.public_bytes(Encoding.DER) for c in load_all(chain, "the chain"))
        found = verify_gpu(
            report, certificates, nonce=nonce, roots=TrustRoots(), now=now, checks=checks, rims=rims, ocsp=ocsp
        )
        if nras is not None:
            verdict = verify_nras(*nras, nonce=nonce, now=now, checks=checks)
            check_devices(verdict, [load(certificates[0], "the GPU's certificate")], checks)
        checks.lacks("gpu.cc_mode", "a report by itself does not state whether confidential computing is on")
        if policy is not None:
            Policy.from_toml(policy).evaluate_gpus(Facts(_NO_CPU, (found,), None, now.timestamp()))
            checks.ok("policy", "the policy's rules about GPUs accept it")
        else:
            checks.lacks("policy", "there is no policy")
        return {
            "architecture": found.architecture,
            "driver": found.driver,
            "vbios": found.vbios,
            "key_sha256": found.key_sha256.hex(),
            "measurements_matched": found.measurements_matched,
            "rims_checked": found.rims_checked,
            "revocation_checked": found.revocation_checked,
            "valid_until": found.valid_until.isoformat(),
        }

    return judge(appraise)


def read(path: Path) -> bytes:
    """A file's content, up to the largest size that any command reads. Raises `Unusable`."""
    try:
        with path.open("rb") as file:
            return file.read(LIMITS.document + 1)
    except (OSError, ValueError) as error:
        raise Unusable(f"{path} cannot be read: {error}") from error


def _cpu(found: CpuFacts, policy: Path | None, now: datetime.datetime, checks: Checks) -> dict[str, object]:
    facts = Facts(found, (), None, now.timestamp())
    if policy is not None:
        Policy.from_toml(policy).evaluate_cpu(facts)
        checks.ok("policy", "the policy's rules about CPUs accept it")
    else:
        default = Policy.default(frozenset())
        default.debug.check(facts)
        checks.ok("policy.debug", "debugging is off: the host cannot read the guest")
        default.migration.check(facts)
        checks.ok("policy.migration", "no migration agent may move the guest")
        checks.lacks("policy", "there is no policy: measurement, firmware level and all else were not judged")
    return {**cpu_facts(found), "report_data": found.report_data.hex()}


def _bare(report: bytes) -> bytes:
    """The SNP report in a paravisor's HCL report, or the report itself."""
    if not report.startswith(b"HCLA"):
        return report
    from adytum.attestation.vtpm.hcl import HclReport

    return HclReport.parse(report).snp_report


def _crl(data: bytes) -> bytes:
    if _PEM not in data:
        return data
    try:
        return x509.load_pem_x509_crl(data).public_bytes(Encoding.DER)
    except Exception as error:  # The library's errors for odd lists have no common base.
        raise EvidenceError("the list of revoked certificates cannot be read") from error
