"""What verification establishes about the CPU, each GPU and the claims. The policy judges these facts and nothing else.

Each vendor's verification makes its own facts. Every field was signed, unless its comment says otherwise.
"""

import datetime
from collections.abc import Mapping
from dataclasses import dataclass

from adytum.attestation.core.errors import PolicyError
from adytum.attestation.document.evidence import Claims


@dataclass(frozen=True)
class SnpFacts:
    """Of a verified SEV-SNP report."""

    product: str
    """Milan, Genoa or Turin."""
    tcb: Mapping[str, int]
    """Reported firmware levels by component: bootloader, tee, snp, microcode, and fmc on Turin."""
    vmpl: int
    """The privilege level, 0 to 3, that requested the report."""
    flags: frozenset[str]
    """Names of the platform_info bits that are set."""
    chip_id: bytes
    """64 bytes; zero if a VLEK signed."""
    vek: str
    """The kind of key that signed: vcek or vlek."""
    csp_id: str | None
    """The cloud provider that a VLEK belongs to; None for a VCEK."""


@dataclass(frozen=True)
class TdxFacts:
    """Of a verified TDX quote. Without collateral Intel's verdict is unknown, and the defaults stand."""

    status: str | None = None
    """Intel's verdict on the platform and the quoting enclave, the worse of the two: UpToDate, SWHardeningNeeded,
    ConfigurationNeeded, ConfigurationAndSWHardeningNeeded, OutOfDate or OutOfDateConfigurationNeeded."""
    advisory_ids: tuple[str, ...] = ()
    """Intel's security advisories that apply at that level."""
    tcb_evaluation: int | None = None
    """The number of Intel's TCB evaluation data set. It rises with every recovery event."""


@dataclass(frozen=True)
class CpuFacts:
    """Of one CPU's verified report."""

    provider: str
    report_data: bytes
    """The 64 bytes that the guest had signed."""
    measurement: bytes
    """48 bytes. SEV-SNP: the launch measurement (behind a paravisor, the paravisor's). TDX: SHA-384 of MRTD and the
    four RTMRs. Simulated: chosen by the backend."""
    key_sha256: bytes
    """SHA-256 of the SubjectPublicKeyInfo of the hardware's key."""
    issued_at: int | None = None
    """Seconds since 1970. None: only simulated reports state a time."""
    debug: bool = False
    migration: bool = False
    revocation_checked: bool | None = None
    """None: simulated evidence, whose certificate nobody could revoke."""
    valid_until: datetime.datetime | None = None
    """When the first certificate or piece of collateral expires. None: simulated evidence."""
    snp: SnpFacts | None = None
    tdx: TdxFacts | None = None
    pcrs: Mapping[int, bytes] | None = None
    """The virtual TPM's registers, SHA-256. None: there is no virtual TPM."""


@dataclass(frozen=True)
class GpuFacts:
    """Of one verified GPU."""

    architecture: str
    """hopper or blackwell."""
    driver: str
    """The driver's version, like 550.90.07."""
    vbios: str
    """The VBIOS's version, like 96.00.9F.00.01."""
    fwid: bytes
    """The firmware that the GPU's certificate is for, 48 bytes."""
    key_sha256: bytes
    """SHA-256 of the SubjectPublicKeyInfo of the GPU's key: it identifies the device."""
    protected_pcie: bool | None
    """Whether the GPU reports protected PCIe; None if its driver does not report it."""
    rims_checked: bool
    """Whether the measurements were compared with both manifests, the driver's and the VBIOS's."""
    measurements_matched: int
    revocation_checked: bool
    """Whether every certificate that NVIDIA's service answers for has a current, good answer."""
    valid_until: datetime.datetime
    """When the first certificate, manifest or OCSP answer expires."""
    cc_mode: str = "unknown"
    """on, off or devtools, as the guest read it from the driver: the GPU does not sign it, the CPU's report covers it.
    unknown: the report was verified by itself, without a document."""


@dataclass(frozen=True)
class Facts:
    """All that the policy judges."""

    cpu: CpuFacts
    gpus: tuple[GpuFacts, ...]
    claims: Claims | None
    """None if a report is judged by itself, without a document."""
    now: float
    """The time of verification, seconds since 1970."""

    @property
    def stated(self) -> Claims:
        """The claims, for rules about them. Raises `PolicyError` if there are none."""
        if self.claims is None:
            raise PolicyError("claims", "a report by itself has no claims; verify a whole document")
        return self.claims

    @property
    def signed_at(self) -> tuple[tuple[str, int], ...]:
        """Every time under a signature: its name, seconds since 1970."""
        claimed = None if self.claims is None else self.claims.issued_at
        times = (("claims.issued_at", claimed), ("the CPU report's issued_at", self.cpu.issued_at))
        return tuple((name, at) for name, at in times if at is not None)
