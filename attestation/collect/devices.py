"""This machine's devices, by the names that a configuration uses."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Self, TypeVar

from adytum.attestation.collect.endorsements import VendorEndorsements
from adytum.attestation.collect.rounds import CpuDevice, Endorsements, GpuDevices, NoEndorsements, NoGpus
from adytum.attestation.collect.vendors import VendorCache, https
from adytum.attestation.core import strict
from adytum.attestation.core.errors import CollectionError, NotThereYet
from adytum.attestation.simulated.device import SimulatedCpu
from adytum.attestation.snp.device import SevSnp
from adytum.attestation.tdx.device import Tdx
from adytum.attestation.vtpm.device import SnpVtpm

T = TypeVar("T")
Cpu = Literal["simulated", "sev-snp", "sev-snp-vtpm", "tdx"]
Gpus = Literal["none", "nvidia"]
_TRIES, _PAUSE_S = 30, 2.0


@dataclass(frozen=True)
class Devices:
    """The devices that a backend collects evidence from, and the cache of what vendors sign."""

    cpu: CpuDevice
    gpus: GpuDevices
    endorsements: Endorsements
    cc_mode: Callable[[], str]
    """none without GPUs; else on, off or devtools, read from the driver now. Raises `CollectionError`."""
    set_ready: Callable[[], None]
    """Lets the GPUs compute. Raises `CollectionError`."""
    refresh: Callable[[], None]
    """Fetches from vendors what is due. For a background task; a vendor's failure raises nothing."""

    @classmethod
    def of(cls, cpu: Cpu, gpus: Gpus) -> Self:
        """The devices of that kind. Raises `CollectionError` if the machine lacks them."""
        cache = VendorCache(https)
        unendorsed = cpu == "simulated" and gpus == "none"
        endorsements: Endorsements = NoEndorsements() if unendorsed else VendorEndorsements(cache)
        if gpus == "none":
            return cls(_cpu(cpu, cache), NoGpus(), endorsements, lambda: "none", lambda: None, cache.refresh)
        from adytum.attestation.nvidia.device import NvidiaGpus

        nvidia = NvidiaGpus()
        return cls(_cpu(cpu, cache), nvidia, endorsements, nvidia.mode, lambda: nvidia.set_ready(True), cache.refresh)


def collect(cpu: Cpu | Literal["none"], gpus: Gpus, nonce: bytes) -> dict[str, object]:
    """Reports of this machine's devices on a 32-byte nonce, for JSON. Raises `CollectionError`.

    The CPU's report carries the nonce and 32 zero bytes. This is not an evidence document: nothing ties the reports to
    each other or to a key. `adytum serve` makes documents.
    """
    found: dict[str, object] = {"nonce": nonce.hex()}
    if cpu != "none":
        cache = VendorCache(https)
        device = _cpu(cpu, cache)
        evidence = waiting(lambda: device.report(nonce + bytes(32)), cache.refresh)
        found["cpu"] = {
            "provider": evidence.provider,
            "report": strict.base64_text(evidence.report),
            "certificates": [strict.base64_text(certificate) for certificate in evidence.certificates],
        }
    if gpus != "none":
        from adytum.attestation.nvidia.device import NvidiaGpus

        found["gpu"] = strict.base64_text(NvidiaGpus().collect(nonce))
    if len(found) == 1:
        raise CollectionError("nothing to collect: name a CPU or GPUs")
    return found


def waiting(collect: Callable[[], T], refresh: Callable[[], None], sleep: Callable[[float], None] = time.sleep) -> T:
    """What `collect` returns once the vendors have answered; waits a minute at most. Raises `CollectionError`."""
    for _ in range(_TRIES - 1):
        try:
            return collect()
        except NotThereYet:
            refresh()
            sleep(_PAUSE_S)
    return collect()


def _cpu(name: Cpu, cache: VendorCache) -> CpuDevice:
    match name:
        case "simulated":
            return SimulatedCpu()
        case "sev-snp":
            return SevSnp(cache.amd_certificates, cache.amd_chain)
        case "sev-snp-vtpm":
            return SnpVtpm(cache.azure_certificates)
        case "tdx":
            return Tdx()
