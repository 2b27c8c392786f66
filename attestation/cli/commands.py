"""What the command line does: each command appraises what it is given and returns a verdict."""

import datetime
import http.client
import os
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from adytum.attestation.core import strict
from adytum.attestation.core.certificates import load, load_all
from adytum.attestation.core.checks import Checks
from adytum.attestation.core.errors import EvidenceError, PolicyError, UnsupportedError, VerificationError
from adytum.attestation.core.limits import LIMITS
from adytum.attestation.core.trust import TrustRoots
from adytum.attestation.document.binding import NONCE_SIZE
from adytum.attestation.document.evidence import Collateral, CpuEvidence
from adytum.attestation.document.facts import CpuFacts, Facts
from adytum.attestation.policy.policy import Policy
from adytum.attestation.verify.cpu import verify_cpu
from adytum.attestation.verify.document import VerifiedEvidence, verify

ACCEPTED, REJECTED, UNSUPPORTED, MALFORMED = 0, 10, 20, 30
_RESULTS = {ACCEPTED: "accepted", REJECTED: "rejected", UNSUPPORTED: "unsupported", MALFORMED: "malformed"}
_FETCH_SECONDS = 30.0
_PEM = b"-----BEGIN"
_GPU = ("architecture", "driver", "vbios", "cc_mode", "rims_checked", "revocation_checked")
_NO_CPU = CpuFacts("none", report_data=b"", measurement=b"", key_sha256=b"")
"""For the rules about GPUs, which judge a GPU's report by itself."""


class Unusable(Exception):
    """The command cannot be carried out as given."""


class NotFetched(Exception):
    """There is no document to judge."""


@dataclass(frozen=True)
class Verdict:
    """How an appraisal ended. `facts` is what it established, for JSON; empty unless accepted."""

    status: int
    code: str
    reason: str
    checks: Checks
    facts: dict[str, object]

    @property
    def result(self) -> str:
        """accepted, rejected, unsupported or malformed."""
        return _RESULTS[self.status]

    def as_json(self) -> dict[str, object]:
        """The object that the command line prints."""
        return {
            "result": self.result,
            "code": self.code,
            "reason": self.reason,
            "checks": [{"code": check.code, "says": check.says} for check in self.checks.passed],
            "not_checked": [{"code": check.code, "says": check.says} for check in self.checks.not_given],
            "evidence": self.facts,
        }


def judge(appraise: Callable[[Checks], dict[str, object]]) -> Verdict:
    """Runs `appraise` and turns its end into a verdict."""
    checks = Checks()
    try:
        facts = appraise(checks)
    except EvidenceError as error:
        return Verdict(MALFORMED, error.code, str(error), checks, {})
    except UnsupportedError as error:
        return Verdict(UNSUPPORTED, error.code, str(error), checks, {})
    except (VerificationError, PolicyError) as error:
        return Verdict(REJECTED, error.code, str(error), checks, {})
    return Verdict(ACCEPTED, "accepted", "", checks, facts)


def verify_document(
    document: bytes, nonce: bytes, policy: Path, now: datetime.datetime, simulated: frozenset[bytes] | None
) -> Verdict:
    """A whole document, for the client that chose the nonce."""
    rules = Policy.from_toml(policy)

    def appraise(checks: Checks) -> dict[str, object]:
        trust = TrustRoots(simulated=simulated)
        return document_facts(verify(document, nonce=nonce, policy=rules, trust=trust, now=now, checks=checks))

    return judge(appraise)


def fetch(url: str, policy: Path, out: Path | None, simulated: frozenset[bytes] | None) -> Verdict:
    """A backend's evidence on a fresh nonce. Raises `NotFetched`, `Unusable`."""
    Policy.from_toml(policy)  # A bad policy is told before a backend is asked.
    nonce = os.urandom(NONCE_SIZE)
    document = download(url, nonce)
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
    """An SEV-SNP report by itself. Without a policy: debugging and migration have to be off."""

    def appraise(checks: Checks) -> dict[str, object]:
        certificates = (*load_all(vek, "the VEK"), *load_all(chain, "the chain"))
        evidence = CpuEvidence("sev-snp", _bare(report), tuple(c.public_bytes(Encoding.DER) for c in certificates))
        collateral = Collateral(crls=() if crl is None else (_crl(crl),))
        found = verify_cpu(evidence, collateral, trust=TrustRoots(), now=now, checks=checks)
        return _cpu(found, policy, now, checks)

    return judge(appraise)


def tdx(quote: bytes, collateral: bytes | None, policy: Path | None, now: datetime.datetime) -> Verdict:
    """A TDX quote by itself. Without a policy: debugging and migration have to be off."""

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
    """A GPU's report by itself. Its confidential-computing mode is not in it: only a whole document can say that."""
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
        checks.lacks("gpu.cc_mode", "a report by itself does not say whether confidential computing is on")
        if policy is not None:
            Policy.from_toml(policy).evaluate_gpus(Facts(_NO_CPU, (found,), None, now.timestamp()))
            checks.ok("policy", "the policy's rules about GPUs accept it")
        else:
            checks.lacks("policy", "no policy was given")
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
    """A file, up to the size of the largest thing that any command reads. Raises `Unusable`."""
    try:
        with path.open("rb") as file:
            return file.read(LIMITS.document + 1)
    except (OSError, ValueError) as error:
        raise Unusable(f"{path} cannot be read: {error}") from error


def document_facts(verified: VerifiedEvidence) -> dict[str, object]:
    """What a verified document establishes, for JSON."""
    claims = verified.claims
    return {
        **_cpu_facts(verified.facts.cpu),
        "document_sha256": verified.document_sha256.hex(),
        "verified_at": verified.verified_at.isoformat(timespec="seconds"),
        "valid_until": verified.valid_until and verified.valid_until.isoformat(),
        "gpus": [{name: getattr(gpu, name) for name in _GPU} for gpu in verified.facts.gpus],
        "replica": claims.replica,
        "gateway_path": claims.gateway_path,
        "key_configurations": strict.base64_text(claims.key_configurations),
        "keys_expire_at": claims.keys_expire_at,
        "receipt_key": claims.receipt_key.hex(),
        "tls_spki_sha256": claims.tls_spki_sha256 and claims.tls_spki_sha256.hex(),
        "models": [
            {"id": m.id, "task": m.task, "aliases": list(m.aliases), "weights_root": m.weights_root.hex()}
            for m in claims.models
        ],
        "configuration_sha256": claims.configuration_sha256.hex(),
        "padding": claims.padding,
        "sandbox": claims.sandbox,
        "software_version": claims.software_version,
        "cc_mode": claims.cc_mode,
        "issued_at": claims.issued_at,
    }


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
        checks.lacks("policy", "no policy was given: measurement, firmware level and all else were not judged")
    return {**_cpu_facts(found), "report_data": found.report_data.hex()}


def _cpu_facts(cpu: CpuFacts) -> dict[str, object]:
    found: dict[str, object] = {
        "provider": cpu.provider,
        "measurement": cpu.measurement.hex(),
        "cpu_key_sha256": cpu.key_sha256.hex(),
        "debug": cpu.debug,
        "migration": cpu.migration,
        "cpu_revocation_checked": cpu.revocation_checked,
    }
    if cpu.snp is not None:
        found["snp"] = {
            "product": cpu.snp.product,
            "tcb": dict(cpu.snp.tcb),
            "vmpl": cpu.snp.vmpl,
            "flags": sorted(cpu.snp.flags),
            "chip_id": cpu.snp.chip_id.hex(),
        }
    if cpu.tdx is not None:
        found["tdx"] = {"status": cpu.tdx.status}
    if cpu.pcrs is not None:
        found["pcrs"] = {str(index): value.hex() for index, value in cpu.pcrs.items()}
    return found


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


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """Evidence of another server than the one named would be about that other server."""

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: object, newurl: str
    ) -> None:
        return None


def download(url: str, nonce: bytes) -> bytes:
    """A backend's evidence document on a nonce, unverified. Raises `NotFetched`, `Unusable`."""
    try:
        parts = urllib.parse.urlsplit(url)
    except ValueError as error:
        raise Unusable(f"{url} is no address: {error}") from error
    if parts.scheme not in ("http", "https") or not parts.netloc or parts.query or parts.fragment:
        raise Unusable("give the backend's address as http://host:port or https://host:port")
    request = f"{url.rstrip('/')}/.well-known/attestation?nonce={nonce.hex()}"
    deadline = time.monotonic() + _FETCH_SECONDS
    document = bytearray()
    try:
        with urllib.request.build_opener(_NoRedirects).open(request, timeout=_FETCH_SECONDS) as answer:
            while part := answer.read1(65536):
                document += part
                if len(document) > LIMITS.document:
                    raise NotFetched(f"the answer is larger than {LIMITS.document} bytes, no evidence document is")
                if time.monotonic() > deadline:
                    raise NotFetched(f"the answer took more than {_FETCH_SECONDS:.0f} s")
    except urllib.error.HTTPError as error:
        raise NotFetched(f"the backend answered with status {error.code} instead of evidence") from error
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise NotFetched(f"no evidence came from {url}: {error}") from error
    return bytes(document)
