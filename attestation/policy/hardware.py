"""The policy's rules about hardware: one claim, one class, like those in `rules`.

A rule about SNP judges SNP evidence, and so on: whose evidence counts at all is the rule `cpu`'s and `gpu`'s decision.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from adytum.attestation.core.errors import PolicyError
from adytum.attestation.document.facts import Facts, GpuFacts
from adytum.attestation.policy.rules import AnyValue, one_of

Allowed = Literal["refused", "allowed"]
Required = Literal["required", "optional"]
_VERSION = re.compile(r"[0-9A-Fa-f]+(\.[0-9A-Fa-f]+)*")


@dataclass(frozen=True)
class MinimumTcb:
    """The oldest firmware that counts, by product line and component. A product or component not listed is refused."""

    minimum: Mapping[str, Mapping[str, int]] | AnyValue

    def check(self, facts: Facts) -> None:
        if self.minimum == "any" or facts.cpu.snp is None:
            return
        wanted = self.minimum.get(facts.cpu.snp.product)
        if wanted is None:
            raise PolicyError(
                "minimum_tcb", f"the CPU is of the line {facts.cpu.snp.product}, which the policy does not list"
            )
        for name, level in wanted.items():
            found = facts.cpu.snp.tcb.get(name)
            if found is None:
                raise PolicyError("minimum_tcb", f"{facts.cpu.snp.product} has no firmware component {name}")
            if found < level:
                raise PolicyError(
                    "minimum_tcb", f"the CPU's {name} firmware is at level {found}; the policy wants {level} or newer"
                )


@dataclass(frozen=True)
class Debug:
    """Whether a guest that its host may read counts (SNP policy bit 19, TDX attribute bit 0)."""

    verdict: Allowed

    def check(self, facts: Facts) -> None:
        if facts.cpu.debug and self.verdict == "refused":
            raise PolicyError("debug", "the guest was started with debugging on, so its host can read all of it")


@dataclass(frozen=True)
class Migration:
    """Whether a guest that a migration agent may move counts (SNP policy bit 18, TDX attribute bit 29)."""

    verdict: Allowed

    def check(self, facts: Facts) -> None:
        if facts.cpu.migration and self.verdict == "refused":
            raise PolicyError("migration", "a migration agent may move the guest, and with it its memory")


@dataclass(frozen=True)
class Vmpl:
    """The privilege levels from which the SNP report may come."""

    accepted: frozenset[int] | AnyValue

    def check(self, facts: Facts) -> None:
        if self.accepted != "any" and facts.cpu.snp is not None and facts.cpu.snp.vmpl not in self.accepted:
            levels = ", ".join(map(str, sorted(self.accepted)))
            raise PolicyError("vmpl", f"the report comes from VMPL {facts.cpu.snp.vmpl}; the policy accepts {levels}")


@dataclass(frozen=True)
class Platform:
    """Flags of the SNP platform that have to be set, or clear."""

    set_: frozenset[str] | AnyValue
    clear: frozenset[str] | AnyValue

    def check(self, facts: Facts) -> None:
        if facts.cpu.snp is None:
            return
        if self.set_ != "any" and (missing := self.set_ - facts.cpu.snp.flags):
            raise PolicyError("platform_set", f"the platform does not have {', '.join(sorted(missing))}")
        if self.clear != "any" and (present := self.clear & facts.cpu.snp.flags):
            raise PolicyError("platform_clear", f"the platform has {', '.join(sorted(present))}")


@dataclass(frozen=True)
class Chips:
    """Which processors: the SNP report's chip_id, 64 bytes."""

    accepted: frozenset[bytes] | AnyValue

    def check(self, facts: Facts) -> None:
        if facts.cpu.snp is not None:
            one_of("chips", "the chip's id", facts.cpu.snp.chip_id, self.accepted)


@dataclass(frozen=True)
class Pcrs:
    """Values of the vTPM's registers (SHA-256). If any are named, evidence without a vTPM is refused."""

    values: Mapping[int, bytes] | AnyValue

    def check(self, facts: Facts) -> None:
        if self.values == "any":
            return
        if facts.cpu.pcrs is None:
            raise PolicyError("pcrs", "the policy names PCR values, and this evidence has no vTPM")
        for index, wanted in self.values.items():
            if facts.cpu.pcrs.get(index) != wanted:
                raise PolicyError("pcrs", f"PCR {index} is not {wanted.hex()}")


@dataclass(frozen=True)
class TdxStatus:
    """Intel's verdict on the platform's TCB. Evidence without collateral has none, which only `any` accepts."""

    accepted: frozenset[str] | AnyValue

    def check(self, facts: Facts) -> None:
        if self.accepted == "any" or facts.cpu.tdx is None:
            return
        if facts.cpu.tdx.status is None:
            raise PolicyError("tdx_status", "the evidence has no collateral of Intel's, so the TCB's status is unknown")
        one_of("tdx_status", "the TCB's status", facts.cpu.tdx.status, self.accepted)


@dataclass(frozen=True)
class CpuRevocation:
    """Whether the CPU's certificates must have been checked against a current list of revoked ones."""

    verdict: Required

    def check(self, facts: Facts) -> None:
        if self.verdict == "required" and facts.cpu.revocation_checked is False:
            raise PolicyError("cpu_revocation", "the evidence has no list of revoked CPU certificates to check against")


@dataclass(frozen=True)
class Gpu:
    """How many GPUs have to be attested: a number, at least one, or none."""

    expected: int | Literal["none", "required"]

    def check(self, facts: Facts) -> None:
        found = len(facts.gpus)
        if self.expected == "required" and found == 0:
            raise PolicyError(
                "gpu", 'the evidence has no GPU, and the policy requires one; if none is expected, write gpu = "none"'
            )
        if self.expected == "none" and found != 0:
            raise PolicyError("gpu", f"the evidence has {found} GPUs, and the policy expects none")
        if isinstance(self.expected, int) and found != self.expected:
            raise PolicyError("gpu", f"the evidence has {found} GPUs, and the policy expects {self.expected}")


@dataclass(frozen=True)
class GpuArchitecture:
    """Which architectures."""

    accepted: frozenset[str] | AnyValue

    def check(self, facts: Facts) -> None:
        for gpu in facts.gpus:
            one_of("gpu_architecture", "a GPU's architecture", gpu.architecture, self.accepted)


@dataclass(frozen=True)
class CcMode:
    """Confidential computing of the GPUs, as the backend claims it and as each GPU's state says it."""

    accepted: frozenset[str]

    def check(self, facts: Facts) -> None:
        if facts.claims is not None:
            one_of("cc_mode", "the GPUs' confidential-computing mode", facts.claims.cc_mode, self.accepted)
        for gpu in facts.gpus:
            one_of("cc_mode", "a GPU's confidential-computing mode", gpu.cc_mode, self.accepted)


@dataclass(frozen=True)
class Versions:
    """Accepted versions: each is exact, or `>=` and the oldest that counts. Parts compare as hexadecimal numbers."""

    accepted: frozenset[str] | AnyValue

    def accepts(self, version: str) -> bool:
        """Whether one of them fits. A version in another form than dotted numbers fits only an equal one."""
        return self.accepted == "any" or any(
            version == wanted
            or (wanted.startswith(">=") and _parts(version) is not None and _at_least(version, wanted[2:].strip()))
            for wanted in self.accepted
        )


def _at_least(version: str, oldest: str) -> bool:
    found, wanted = _parts(version), _parts(oldest)
    return found is not None and wanted is not None and found >= wanted


def _parts(version: str) -> tuple[int, ...] | None:
    if not _VERSION.fullmatch(version):
        return None
    return tuple(int(part, 16) for part in version.split("."))


@dataclass(frozen=True)
class GpuDriver(Versions):
    """The driver's version, from each GPU's own report."""

    def check(self, facts: Facts) -> None:
        _versions("gpu_driver", "driver", self, facts, lambda gpu: gpu.driver)


@dataclass(frozen=True)
class GpuVbios(Versions):
    """The VBIOS's version, from each GPU's own report."""

    def check(self, facts: Facts) -> None:
        _versions("gpu_vbios", "VBIOS", self, facts, lambda gpu: gpu.vbios)


def _versions(claim: str, what: str, rule: Versions, facts: Facts, version: Callable[[GpuFacts], str]) -> None:
    for gpu in facts.gpus:
        if not rule.accepts(version(gpu)):
            wanted = ", ".join(sorted(rule.accepted))
            raise PolicyError(claim, f"a GPU's {what} is {version(gpu)}; the policy accepts {wanted or 'nothing'}")


@dataclass(frozen=True)
class GpuRims:
    """Whether each GPU's measurements must have been compared with NVIDIA's manifests of driver and VBIOS."""

    verdict: Required

    def check(self, facts: Facts) -> None:
        if self.verdict == "required" and not all(gpu.rims_checked for gpu in facts.gpus):
            raise PolicyError("gpu_rims", "the evidence lacks NVIDIA's manifest of a GPU's driver or VBIOS")


@dataclass(frozen=True)
class GpuRevocation:
    """Whether the GPUs' certificates must have been checked with answers of NVIDIA's OCSP service."""

    verdict: Required

    def check(self, facts: Facts) -> None:
        if self.verdict == "required" and not all(gpu.revocation_checked for gpu in facts.gpus):
            raise PolicyError("gpu_revocation", "the evidence lacks an OCSP answer for a certificate of a GPU")
