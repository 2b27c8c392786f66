"""Verifies an evidence document. The only way to get a `VerifiedEvidence`."""

import datetime
import hashlib
from dataclasses import InitVar, dataclass

from adytum.attestation.core.checks import Checks
from adytum.attestation.core.errors import Step, VerificationError
from adytum.attestation.core.trust import TrustRoots
from adytum.attestation.document.binding import NONCE_SIZE, gpu_nonce, report_data, root_from_path
from adytum.attestation.document.evidence import NO_GPUS, Claims, Evidence
from adytum.attestation.document.facts import Facts, GpuFacts
from adytum.attestation.policy.policy import Policy
from adytum.attestation.verifier.cpu import verify_cpu

_TOKEN = object()


@dataclass(frozen=True, repr=False)
class VerifiedEvidence:
    """Proof that `verify` accepted a document. Nothing else makes one; what needs verified evidence takes this type."""

    token: InitVar[object]
    facts: Facts
    """All that the policy judged."""
    checks: Checks
    """What was checked, in order, and what was not because its input was missing."""
    verified_at: datetime.datetime
    document_sha256: bytes
    claims_sha256: bytes

    def __post_init__(self, token: object) -> None:
        if token is not _TOKEN:
            raise TypeError("only adytum.attestation.verifier.document.verify makes a VerifiedEvidence")

    def __repr__(self) -> str:
        return (
            f"VerifiedEvidence({self.provider}, replica={self.claims.replica}, "
            f"document_sha256={self.document_sha256.hex()})"
        )

    @property
    def claims(self) -> Claims:
        return self.facts.stated

    @property
    def provider(self) -> str:
        return self.facts.cpu.provider

    @property
    def measurement(self) -> bytes:
        return self.facts.cpu.measurement

    @property
    def valid_until(self) -> datetime.datetime | None:
        """When the first certificate or piece of collateral expires; None for simulated evidence without GPUs."""
        expiries = (self.facts.cpu.valid_until, *(gpu.valid_until for gpu in self.facts.gpus))
        return min((expiry for expiry in expiries if expiry is not None), default=None)


def verify(
    document: bytes,
    *,
    nonce: bytes,
    policy: Policy,
    trust: TrustRoots,
    now: datetime.datetime,
    checks: Checks | None = None,
) -> VerifiedEvidence:
    """Verifies `document` for the client that chose `nonce`. Raises `AttestationError`, or returns the proof.

    1. Structure: the document and the claims in it follow the format, version 1, in canonical form and within the
       limits (`EvidenceError`).
    2. Nonce: its inclusion proof leads to the root in the document.
    3. CPU report: by the provider's own rules (`snp.verify`, `vtpm.verify`, `tdx.verify`, `simulated.report`): its
       structure, its certificates up to a pinned root, its signature. An unknown provider is refused.
    4. Binding: the report carries SHA-512 over the nonce root, the claims and the GPU evidence, as received.
    5. GPU: each GPU's report in the bundle, by `nvidia.verify`, on the nonce that derives from root and claims. Every
       GPU is in the mode that the claims state.
    6. Policy: each of its rules accepts the facts that steps 1 to 5 established (`PolicyError`). It comes last, so that
       a policy judges only what is signed.

    `now` needs a time zone (`ValueError`). `checks` is filled as far as verification comes, also if it raises.
    """
    if now.tzinfo is None:
        raise ValueError("now has no time zone; use datetime.now(UTC)")
    checks = Checks() if checks is None else checks

    # 1. Structure
    evidence = Evidence.parse(document)
    claims = Claims.parse(evidence.claims)
    checks.ok("document.structure", "the document follows its format")

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
    checks.ok("nonce", f"the nonce is number {proof.index} of the {proof.size} that this report serves")

    # 3. to 5.
    facts = establish(evidence, claims, trust=trust, now=now, checks=checks)

    # 6. Policy
    policy.evaluate(facts)
    checks.ok("policy", "the policy accepts every claim")
    return VerifiedEvidence(
        token=_TOKEN,
        facts=facts,
        checks=checks,
        verified_at=now,
        document_sha256=hashlib.sha256(document).digest(),
        claims_sha256=hashlib.sha256(evidence.claims).digest(),
    )


def establish(
    evidence: Evidence, claims: Claims, *, trust: TrustRoots, now: datetime.datetime, checks: Checks
) -> Facts:
    """Steps 3 to 5: what the hardware signed, without a client's nonce or policy. Raises `AttestationError`.

    By itself this proves nothing to a client: `verify` does.
    """
    # 3. CPU report
    proof = evidence.nonces
    cpu = verify_cpu(evidence.cpu, evidence.collateral, trust=trust, now=now, checks=checks)

    # 4. Binding
    if cpu.report_data != report_data(proof.root, evidence.claims, evidence.gpu):
        raise VerificationError(
            Step.BINDING,
            "binding.report_data",
            "the CPU's report was not made for this nonce root, these claims and this GPU evidence",
        )
    checks.ok("binding.report_data", "the CPU's report was made for this nonce, these keys and this GPU evidence")

    # 5. GPU
    gpus: tuple[GpuFacts, ...] = ()
    if evidence.gpu != NO_GPUS:
        # Imported here, so that evidence without GPUs is verified without lxml.
        from adytum.attestation.nvidia.bundle import verify_bundle

        gpus = verify_bundle(
            evidence.gpu,
            nonce=gpu_nonce(proof.root, evidence.claims),
            roots=trust,
            now=now,
            checks=checks,
            rims=evidence.collateral.rims,
            ocsp=evidence.collateral.ocsp,
        )
    _check_mode(claims, gpus)
    checks.ok("gpu.mode", f"the claims' confidential-computing mode, {claims.cc_mode}, is that of the GPUs' evidence")
    return Facts(cpu, gpus, claims, now.timestamp())


def _check_mode(claims: Claims, gpus: tuple[GpuFacts, ...]) -> None:
    if not gpus and claims.cc_mode in ("on", "devtools"):
        raise VerificationError(
            Step.GPU,
            "gpu.absent",
            f"the claims state the GPUs' mode {claims.cc_mode}, and there is no GPU evidence for it",
        )
    # "off" without evidence is a GPU that cannot attest. The policy's `cc_mode` and `gpu` judge that.
    for gpu in gpus:
        if gpu.cc_mode != claims.cc_mode:
            raise VerificationError(
                Step.GPU,
                "gpu.mode",
                f"the claims state the GPUs' mode {claims.cc_mode}, and a GPU is in the mode {gpu.cc_mode}",
            )
