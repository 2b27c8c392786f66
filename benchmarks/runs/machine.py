"""The machine of a run: GPUs through NVML, processor, TEE and kernel; and whether it matches its label."""

import os
import platform
import re
from collections.abc import Callable
from typing import Any

from adytum.attestation.core.errors import CollectionError, EvidenceError
from adytum.attestation.nvidia.device import NvidiaGpus
from adytum.attestation.snp.device import SevSnp
from adytum.attestation.snp.report import SnpReport, tcb_levels
from adytum.benchmarks.errors import Unusable
from adytum.inference.preflight.machine import vm
from adytum.inference.preflight.probe import Probe
from adytum.inference.preflight.table import UNKNOWN

NO_GPU = "no GPU"
LABELS = ("cc-on", "cc-off", "tee-only", "no-gpu")
Fact = dict[str, Any]


def fact(value: Any) -> Fact:
    """A known fact. `value` is not None."""
    return {"value": value}


def absent(reason: str) -> Fact:
    """An unknown fact, and why it is unknown."""
    return {"value": None, "reason": reason}


def known(value: Any, reason: str) -> Fact:
    """A fact, or absent for `reason` if the value is None."""
    return absent(reason) if value is None else fact(value)


def facts(name: str = "", probe: Probe | None = None) -> dict[str, Any]:
    """The run file's `machine`. `name`: a name for people."""
    probe = probe or Probe()
    tee, hypervisor = vm(probe), (probe.text("sys/class/dmi/id/sys_vendor") or "").strip()
    model = re.search(r"^model name[ \t]*:[ \t]*(.+)$", probe.text("proc/cpuinfo") or "", re.MULTILINE)
    processor = model[1].strip() if model else None
    memory = re.search(r"^MemTotal:\s+(\d+) kB", probe.text("proc/meminfo") or "", re.MULTILINE)
    unclear = tee.row.verdict == UNKNOWN
    found = {
        "gpu": _gpus(),
        "cpu": known(processor, "/proc/cpuinfo names no model"),
        "cores": known(os.cpu_count(), "the kernel does not report it"),
        "memory_gib": known(round(int(memory[1]) / 2**20, 1) if memory else None, "/proc/meminfo cannot be read"),
        "tee": absent(f"{tee.row.found}: {tee.row.advice}") if unclear else fact(tee.kind or "none"),
        "snp_tcb": _tcb(tee.kind),
        "kernel": fact(platform.release()),
        "cmdline": known((probe.text("proc/cmdline") or "").strip() or None, "/proc/cmdline cannot be read"),
        "swiotlb": _swiotlb(probe),
        "hypervisor": known(hypervisor or None, "the kernel shows no DMI table"),
    }
    return {"name": name or _name(found, processor), **found}


def _name(found: dict[str, Any], processor: str | None) -> str:
    products = found["gpu"]["products"]["value"]
    return f"{os.cpu_count()} cores of {processor or 'an unknown processor'}, " + (
        ", ".join(products) if products else "no GPU"
    )


def _gpus() -> dict[str, Any]:
    try:
        gpus = NvidiaGpus()
        state, infos = gpus.state(), gpus.facts()
    except CollectionError as error:
        return _no_gpus(str(error))
    if not infos:
        return _no_gpus("the driver lists no GPU")
    unsaid = "the driver does not report it"
    return {
        "mode": state.mode,
        "count": fact(len(infos)),
        "products": fact([gpu.name for gpu in infos]),
        "driver": known(infos[0].driver_version or None, unsaid),
        "vbios": fact([gpu.vbios_version for gpu in infos]),
        "devtools": fact(state.devtools),
        "multi_gpu": fact(state.multi_gpu),
        "ready": known(infos[0].ready, unsaid),
        "protected_kib": known(infos[0].protected_kib, unsaid),
        **{name: _each(len(infos), ask) for name, ask in _ASKED.items()},
    }


def _no_gpus(reason: str) -> dict[str, Any]:
    names = ("count", "products", "driver", "vbios", "devtools", "multi_gpu", "ready", "protected_kib", *_ASKED)
    return {"mode": NO_GPU, **{name: absent(reason) for name in names}}


def _clocks(nvml: Any, gpu: Any) -> dict[str, int]:
    kinds = {"sm": nvml.NVML_CLOCK_SM, "memory": nvml.NVML_CLOCK_MEM}
    return {name: nvml.nvmlDeviceGetClockInfo(gpu, kind) for name, kind in kinds.items()} | {
        f"{name}_max": nvml.nvmlDeviceGetMaxClockInfo(gpu, kind) for name, kind in kinds.items()
    }


def _power(nvml: Any, gpu: Any) -> dict[str, float]:
    return {
        "now": nvml.nvmlDeviceGetPowerUsage(gpu) / 1000,
        "limit": nvml.nvmlDeviceGetEnforcedPowerLimit(gpu) / 1000,
    }


def _topology(nvml: Any, gpu: Any) -> dict[str, Any]:
    bus = nvml.nvmlDeviceGetPciInfo(gpu).busId
    return {
        "bus": bus.decode() if isinstance(bus, bytes) else bus,
        "pcie_generation": nvml.nvmlDeviceGetCurrPcieLinkGeneration(gpu),
        "pcie_width": nvml.nvmlDeviceGetCurrPcieLinkWidth(gpu),
    }


_ASKED: dict[str, Callable[[Any, Any], Any]] = {"clocks_mhz": _clocks, "power_w": _power, "topology": _topology}


def _each(count: int, ask: Callable[[Any, Any], Any]) -> Fact:
    """Each GPU's answer, or why there is none. NVML must be initialised."""
    import pynvml  # type: ignore[import-untyped]  # NVIDIA ships no types.

    try:
        return fact([ask(pynvml, pynvml.nvmlDeviceGetHandleByIndex(place)) for place in range(count)])
    except pynvml.NVMLError as error:
        return absent(f"the driver does not report it: {error}")


def _tcb(kind: str) -> Fact:
    if kind not in ("sev-snp", "azure"):
        return absent("not an SEV-SNP guest")
    if kind == "azure":
        return absent("behind Azure's paravisor; the report is in the backend's evidence")

    def refuse(*_: object) -> Any:
        raise CollectionError("the host supplies no certificate, and none is needed here")

    # Only the report is needed: certificates that the host lacks are not fetched.
    seen: list[SnpReport] = []

    def vendor(report: SnpReport) -> tuple[bytes, ...]:
        seen.append(report)
        return ()

    try:
        report = SnpReport.parse(SevSnp(vendor, refuse).report(bytes(64)).report)
    except (CollectionError, EvidenceError) as error:
        if not seen:
            return absent(str(error))
        report = seen[0]
    return fact(
        {
            name: tcb_levels(report.product, value) if report.product else value.hex()
            for name, value in (("reported", report.reported_tcb), ("current", report.current_tcb))
        }
    )


def _swiotlb(probe: Probe) -> Fact:
    folder = "sys/kernel/debug/swiotlb"
    slabs = {name: probe.text(f"{folder}/io_tlb_{name}") for name in ("nslabs", "used")}
    if slabs["nslabs"] is None:
        return absent(f"/{folder} cannot be read: mount debugfs, as root; `cmdline` has what was asked for")
    return fact({name: int(text) for name, text in slabs.items() if text is not None and text.strip().isdigit()})


def label_of(machine: dict[str, Any]) -> str:
    """The label of a run on this machine. Raises `Unusable` if it cannot be determined."""
    mode, tee = machine["gpu"]["mode"], machine["tee"]
    if mode == NO_GPU:
        return "no-gpu"
    if mode == "devtools":
        raise Unusable("the GPU is in DevTools mode, whose figures are neither CC-On's nor CC-Off's: the host sets it")
    if mode == "on":
        return "cc-on"
    if tee["value"] is None:
        raise Unusable(f"it is unknown whether this machine is a TEE, so neither cc-off nor tee-only: {tee['reason']}")
    return "cc-off" if tee["value"] == "none" else "tee-only"


def labelled(machine: dict[str, Any], wanted: str | None) -> str:
    """The label. Raises `Unusable` if it is not the `wanted` one."""
    label = label_of(machine)
    if wanted is not None and wanted != label:
        raise Unusable(
            f"the label is {wanted} and the machine is {label}: its GPUs' mode of confidential computing, by their "
            f"driver, is {machine['gpu']['mode']!r}, and its TEE {machine['tee']['value']!r}. Nothing was measured. "
            "Omit --label, or change the machine's mode"
        )
    return label
