"""A policy from a backend's evidence: it accepts from now on what the backend shows today.

This is trust on first use. The evidence is verified; before using the file, its user has to compare whether this is the
backend, the release and the machine to trust.
"""

import datetime
from dataclasses import replace

from adytum.attestation.core.checks import Checks
from adytum.attestation.core.trust import TrustRoots
from adytum.attestation.document.evidence import NO_GPUS, Claims, Evidence
from adytum.attestation.policy import hardware, rules
from adytum.attestation.policy.policy import Policy
from adytum.attestation.verifier.document import VerifiedEvidence, verify


def policy_from(
    document: bytes, *, nonce: bytes, trust: TrustRoots, now: datetime.datetime, checks: Checks
) -> tuple[Policy, VerifiedEvidence]:
    """Verifies a document as the provider and mode that it claims, and pins what it shows.

    Raises `AttestationError`."""
    evidence = Evidence.parse(document)
    claims = Claims.parse(evidence.claims)
    lenient = Policy.self_check(evidence.cpu.provider, claims.cc_mode, evidence.gpu != NO_GPUS)
    verified = verify(document, nonce=nonce, policy=lenient, trust=trust, now=now, checks=checks)
    return pin(verified), verified


def pin(verified: VerifiedEvidence) -> Policy:
    """Accepts this provider, measurement, configuration and models, and this firmware, driver and VBIOS or newer ones.

    Chips, replica, TLS key and software version are not pinned: they change without changing what runs.
    """
    cpu, gpus, claims = verified.facts.cpu, verified.facts.gpus, verified.claims
    base = Policy.self_check(cpu.provider, claims.cc_mode, bool(gpus))
    pinned = replace(
        base,
        measurement=rules.Measurement("any" if cpu.provider == "simulated" else frozenset({cpu.measurement})),
        configuration=rules.Configuration(frozenset({claims.configuration_sha256})),
        padding=rules.Padding(frozenset({claims.padding})),
        sandbox=rules.Sandbox(frozenset({claims.sandbox})),
        models=rules.Models({model.id: model.weights_root for model in claims.models}),
        cpu_revocation=hardware.CpuRevocation("required" if cpu.revocation_checked else "optional"),
    )
    if cpu.snp is not None:
        pinned = replace(
            pinned,
            minimum_tcb=hardware.MinimumTcb({cpu.snp.product: dict(cpu.snp.tcb)}),
            vmpl=hardware.Vmpl(frozenset({cpu.snp.vmpl})),
        )
    if cpu.pcrs is not None:
        # Boot loader, its configuration, kernel and command line, and Secure Boot's state.
        pinned = replace(pinned, pcrs=hardware.Pcrs({index: cpu.pcrs[index] for index in (4, 7, 8, 9, 11, 12)}))
    if cpu.tdx is not None:
        status = cpu.tdx.status
        pinned = replace(pinned, tdx_status=hardware.TdxStatus("any" if status is None else frozenset({status})))
    if gpus:
        pinned = replace(
            pinned,
            gpu=hardware.Gpu(len(gpus)),
            gpu_architecture=hardware.GpuArchitecture(frozenset(gpu.architecture for gpu in gpus)),
            gpu_driver=hardware.GpuDriver(frozenset({f">={min(gpu.driver for gpu in gpus)}"})),
            gpu_vbios=hardware.GpuVbios(frozenset({f">={min(gpu.vbios for gpu in gpus)}"})),
            gpu_rims=hardware.GpuRims(_required(all(gpu.rims_checked for gpu in gpus))),
            gpu_revocation=hardware.GpuRevocation(_required(all(gpu.revocation_checked for gpu in gpus))),
        )
    return pinned


def _required(seen: bool) -> hardware.Required:
    return "required" if seen else "optional"
