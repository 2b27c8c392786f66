"""Verifies an evidence document. The only way to get a `VerifiedEvidence`."""

import datetime
import hashlib
from dataclasses import InitVar, dataclass

from attestation.binding import NONCE_SIZE, report_data, root_from_path
from attestation.errors import Step, UnsupportedError, VerificationError
from attestation.evidence import NO_GPUS, Claims, Evidence
from attestation.policy import Policy
from attestation.rules import Facts
from attestation.simulated import report as simulated
from attestation.trust import TrustRoots

_TOKEN = object()


@dataclass(frozen=True, repr=False)
class VerifiedEvidence:
    """Proof that `verify` accepted a document. Nothing else makes one; what needs verified evidence takes this type."""

    token: InitVar[object]
    claims: Claims
    provider: str
    measurement: bytes
    cpu_key_sha256: bytes
    """SHA-256 of the SubjectPublicKeyInfo of the key that signed the CPU's report."""
    verified_at: datetime.datetime
    document_sha256: bytes
    claims_sha256: bytes

    def __post_init__(self, token: object) -> None:
        if token is not _TOKEN:
            raise TypeError("only attestation.verify.verify makes a VerifiedEvidence")

    def __repr__(self) -> str:
        return (
            f"VerifiedEvidence({self.provider}, replica={self.claims.replica}, "
            f"document_sha256={self.document_sha256.hex()})"
        )


def verify(
    document: bytes, *, nonce: bytes, policy: Policy, trust: TrustRoots, now: datetime.datetime
) -> VerifiedEvidence:
    """Verifies `document` for the client that chose `nonce`. Raises `AttestationError`, or returns the proof.

    1. Structure: the document and the claims in it follow the format, version 1, in canonical form and within the
       limits (`EvidenceError`).
    2. Nonce: its inclusion proof leads to the root that the document gives.
    3. CPU report: by the provider's own rules, its structure, its certificate and its signature. A provider that this
       version cannot verify is refused.
    4. Binding: the report carries SHA-512 over the nonce root, the claims and the GPU evidence, as received.
    5. GPU: the bundle is the empty one, and the claims do not speak of a mode that only attested GPUs could be in.
       This version cannot verify GPU evidence and refuses a bundle that has some.
    6. Policy: each of its rules accepts what steps 1 to 5 established (`PolicyError`). Last, so that a policy judges
       only what is signed.

    `now` needs a time zone (`ValueError`).
    """
    if now.tzinfo is None:
        raise ValueError("now has no time zone; use datetime.now(UTC)")

    # 1. Structure
    evidence = Evidence.parse(document)
    claims = Claims.parse(evidence.claims)

    # 2. Nonce
    if len(nonce) != NONCE_SIZE:
        raise VerificationError(
            Step.NONCE, "nonce.length", f"a nonce has {NONCE_SIZE} bytes, this one has {len(nonce)}"
        )
    proof = evidence.nonces
    if root_from_path(nonce, proof.index, proof.size, proof.path) != proof.root:
        raise VerificationError(
            Step.NONCE,
            "nonce.other",
            "the document was not made for this nonce; ask for evidence with a nonce of your own",
        )

    # 3. CPU report
    if evidence.cpu.provider != simulated.PROVIDER:
        raise UnsupportedError(
            Step.CPU_REPORT,
            f"this version cannot verify CPU evidence of the provider {evidence.cpu.provider}, "
            "and what is not verified is refused; use a version that can",
        )
    report = simulated.SimulatedReport.verify(evidence.cpu, trust.simulated, now)

    # 4. Binding
    if report.report_data != report_data(proof.root, evidence.claims, evidence.gpu):
        raise VerificationError(
            Step.BINDING,
            "binding.report_data",
            "the CPU's report was not made for this nonce root, these claims and this GPU evidence",
        )

    # 5. GPU
    if evidence.gpu != NO_GPUS:
        raise UnsupportedError(
            Step.GPU,
            "this version cannot verify GPU evidence, and what is not verified is refused; use a version that can",
        )
    if claims.cc_mode in ("on", "devtools"):
        raise VerificationError(
            Step.GPU,
            "gpu.absent",
            f"the claims say that the GPUs' mode is {claims.cc_mode}, and there is no GPU evidence for it",
        )

    # 6. Policy
    policy.evaluate(
        Facts(
            provider=evidence.cpu.provider,
            measurement=report.measurement,
            claims=claims,
            signed_at=(("claims.issued_at", claims.issued_at), ("the CPU report's issued_at", report.issued_at)),
            now=now.timestamp(),
            debug=False,
            migration=False,
            cpu_revocation_checked=None,
            snp=None,
            tdx=None,
            pcrs=None,
            gpus=(),
        )
    )
    return VerifiedEvidence(
        token=_TOKEN,
        claims=claims,
        provider=evidence.cpu.provider,
        measurement=report.measurement,
        cpu_key_sha256=report.key_sha256,
        verified_at=now,
        document_sha256=hashlib.sha256(document).digest(),
        claims_sha256=hashlib.sha256(evidence.claims).digest(),
    )
