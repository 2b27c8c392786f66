"""The GPUs' part of an evidence document: every GPU's report, certificates and state, in one canonical form.

The CPU's report covers the hash of these bytes. A GPU does not sign its confidential-computing state: the measured
guest reads it from the driver, so it is worth as much as the measurement that a policy requires.
"""

import datetime
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

from adytum.attestation.core import strict
from adytum.attestation.core.checks import Checks
from adytum.attestation.core.errors import EvidenceError, Step, VerificationError
from adytum.attestation.core.limits import LIMITS, Limits
from adytum.attestation.core.trust import TrustRoots
from adytum.attestation.document.facts import GpuFacts
from adytum.attestation.nvidia.rim import Rim
from adytum.attestation.nvidia.verify import verify_gpu

_ARCHITECTURES = frozenset({"hopper", "blackwell"})
_CC = frozenset({"on", "off"})
_MULTI_GPU = frozenset({"none", "protected-pcie", "nvlink"})
_GPU = frozenset({"architecture", "certificates", "report", "state"})
_STATE = frozenset({"cc", "devtools", "multi_gpu"})


@dataclass(frozen=True)
class GpuEvidence:
    """One GPU's evidence, not yet verified."""

    architecture: str
    certificates: tuple[bytes, ...]
    """DER, leaf first."""
    report: bytes
    cc: str
    """on or off: the driver's ccFeature."""
    devtools: bool
    """DevTools mode: confidential computing with the protections off, for debugging."""
    multi_gpu: str
    """none, protected-pcie or nvlink: the driver's multiGpuMode."""

    @property
    def cc_mode(self) -> str:
        """on, off or devtools. Under protected PCIe the mode is on, although the driver's ccFeature is off."""
        if self.devtools:
            return "devtools"
        return "on" if self.cc == "on" or self.multi_gpu == "protected-pcie" else "off"

    @classmethod
    def parse(cls, value: object, where: str, limits: Limits = LIMITS) -> Self:
        """Reads its JSON value. Raises `EvidenceError`."""
        fields = strict.Fields(value, where, _GPU)
        state = strict.Fields(fields.raw("state"), f"{where}.state", _STATE)
        devtools = state.raw("devtools")
        if not isinstance(devtools, bool):
            raise EvidenceError(f"{where}.state.devtools is neither true nor false")
        return cls(
            architecture=fields.choice("architecture", _ARCHITECTURES),
            certificates=fields.items(
                "certificates", limits.certificates, lambda item, at: strict.octets(item, at, limits.certificate)
            ),
            report=fields.octets("report", limits.report),
            cc=state.choice("cc", _CC),
            devtools=devtools,
            multi_gpu=state.choice("multi_gpu", _MULTI_GPU),
        )

    def value(self) -> dict[str, object]:
        """Its JSON value."""
        return {
            "architecture": self.architecture,
            "certificates": [strict.base64_text(certificate) for certificate in self.certificates],
            "report": strict.base64_text(self.report),
            "state": {"cc": self.cc, "devtools": self.devtools, "multi_gpu": self.multi_gpu},
        }


def encode_bundle(gpus: Sequence[GpuEvidence]) -> bytes:
    """The bundle's bytes. Raises `ValueError` without GPUs: then the bundle is `evidence.NO_GPUS`."""
    if not 1 <= len(gpus) <= LIMITS.gpus:
        raise ValueError(f"a bundle has 1 to {LIMITS.gpus} GPUs")
    data = strict.encode([gpu.value() for gpu in gpus])
    parse_bundle(data)
    return data


def parse_bundle(data: bytes, limits: Limits = LIMITS) -> tuple[GpuEvidence, ...]:
    """Reads a bundle with at least one GPU. Raises `EvidenceError`."""
    value = strict.decode(data, "the GPU evidence", limits.gpu)
    if not isinstance(value, list) or not 1 <= len(value) <= limits.gpus:
        raise EvidenceError(f"the GPU evidence is not a list of 1 to {limits.gpus} GPUs")
    return tuple(GpuEvidence.parse(item, f"gpu[{place}]", limits) for place, item in enumerate(value))


def verify_bundle(
    bundle: bytes,
    *,
    nonce: bytes,
    roots: TrustRoots,
    now: datetime.datetime,
    checks: Checks,
    rims: Sequence[bytes] = (),
    ocsp: Sequence[bytes] = (),
) -> tuple[GpuFacts, ...]:
    """Every GPU of a bundle, all on one nonce. Raises `AttestationError`, or returns at least one.

    1. Structure: the bundle is in its canonical form.
    2. Each GPU, by `verify_gpu`. Its architecture is the one in the bundle; so is its mode of protected PCIe, if its
       driver reports that.
    3. All are different devices, of one architecture, in one state. Under protected PCIe it is noted that the
       NVSwitches were not checked.
    """
    # 1. Structure
    parsed = parse_bundle(bundle)

    # 2. Each GPU
    found: list[GpuFacts] = []
    # Parsed once, not once for each GPU: a document may bring many manifests.
    manifests = [Rim.parse(rim) for rim in rims]
    for place, item in enumerate(parsed):
        own = Checks()
        try:
            gpu = verify_gpu(
                item.report,
                item.certificates,
                nonce=nonce,
                roots=roots,
                now=now,
                checks=own,
                rims=manifests,
                ocsp=ocsp,
            )
        finally:
            checks.add(own, f"GPU {place}")
        if gpu.architecture != item.architecture:
            raise _wrong(
                "architecture", f"GPU {place} is a {gpu.architecture}, the evidence states {item.architecture}"
            )
        if gpu.protected_pcie not in (None, item.multi_gpu == "protected-pcie"):
            raise _wrong("state", f"GPU {place} reports another multi-GPU mode than the evidence states")
        found.append(replace(gpu, cc_mode=item.cc_mode))

    # 3. Together
    if len({gpu.key_sha256 for gpu in found}) != len(found):
        raise _wrong("duplicate", "the evidence has one GPU twice")
    if len({gpu.architecture for gpu in found}) != 1:
        raise _wrong("architecture", "the GPUs are of different architectures")
    # The driver has one state for the whole machine.
    if len({(item.cc, item.devtools, item.multi_gpu) for item in parsed}) != 1:
        raise _wrong("state", "the evidence states different confidential-computing states for the GPUs")
    if parsed[0].multi_gpu == "protected-pcie":
        checks.lacks("gpu.switches", "NVSwitches carry the GPUs' traffic, and this version cannot appraise them")
    checks.ok("gpu.count", f"{len(found)} different GPUs, confidential computing {found[0].cc_mode}")
    return tuple(found)


def _wrong(code: str, message: str) -> VerificationError:
    return VerificationError(Step.GPU, f"gpu.{code}", message)
