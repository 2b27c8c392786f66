"""How a command ends: a verdict, and the JSON that it prints."""

from collections.abc import Callable
from dataclasses import dataclass

from adytum.attestation.core import strict
from adytum.attestation.core.checks import Checks
from adytum.attestation.core.errors import EvidenceError, PolicyError, UnsupportedError, VerificationError
from adytum.attestation.document.facts import CpuFacts
from adytum.attestation.verifier.document import VerifiedEvidence

ACCEPTED, REJECTED, UNSUPPORTED, MALFORMED = 0, 10, 20, 30
RESULTS = {ACCEPTED: "accepted", REJECTED: "rejected", UNSUPPORTED: "unsupported", MALFORMED: "malformed"}
_GPU = ("architecture", "driver", "vbios", "cc_mode", "rims_checked", "revocation_checked")


@dataclass(frozen=True)
class Verdict:
    """How an appraisal ended. `facts` is what it established, for JSON; it is empty unless accepted."""

    status: int
    code: str
    reason: str
    checks: Checks
    facts: dict[str, object]

    @property
    def result(self) -> str:
        """accepted, rejected, unsupported or malformed."""
        return RESULTS[self.status]

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
    """Runs `appraise` and turns its result or error into a verdict."""
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


def document_facts(verified: VerifiedEvidence) -> dict[str, object]:
    """What a verified document establishes, for JSON."""
    claims = verified.claims
    return {
        **cpu_facts(verified.facts.cpu),
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


def cpu_facts(cpu: CpuFacts) -> dict[str, object]:
    """What a CPU's report establishes, for JSON."""
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
