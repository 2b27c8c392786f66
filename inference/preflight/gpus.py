"""The rows of the GPUs, from what their driver reports."""

import re

from adytum.attestation.core.errors import CollectionError
from adytum.attestation.nvidia.device import GpuInfo
from adytum.inference.preflight.probe import Probe
from adytum.inference.preflight.table import NOT_KNOWN, OK, UNKNOWN, WRONG, Row

_SUPPORTED = {
    "hopper": re.compile(r"\bH(100|200)\b"),
    "blackwell": re.compile(r"\bG?B(100|200|300)\b|RTX PRO 6000 Blackwell Server"),
}
_NOT_HOPPERS = "this is not a version for Hopper"
_GPUS_WANTED = "H100 (PCIe, NVL, SXM), H200 or Blackwell"
_GPU_ROWS = {
    "driver": ("GPU driver", "535.86 or later"),
    "vbios": ("VBIOS", "96.00.5E.00.01 or later"),
    "cc-mode": ("CC mode", "on"),
    "devtools": ("CC DevTools", "off"),
    "switches": ("NVSwitches", "none"),
    "ready": ("GPU ready state", "can be read; set by the backend"),
}


def gpus(probe: Probe) -> list[Row]:
    try:
        gpus = probe.gpus()
    except CollectionError as error:
        return _without_gpus(_on_bus(probe), str(error))
    if not gpus:
        return _without_gpus(_on_bus(probe), "the driver lists no GPU; pass one through to this machine")
    found = []
    for place, gpu in enumerate(gpus):
        number = f" {place}" if len(gpus) > 1 else ""
        found += [_gpu(gpu, f"GPU{number}"), _vbios(gpu, f"VBIOS{number}")]
    # The driver has one version and one state for all GPUs. If they differed, each would have to be right.
    for key, judge in (("driver", _driver), ("cc-mode", _cc), ("devtools", _devtools), ("switches", _switches)):
        found += [_row(key, *judgement) for judgement in dict.fromkeys(judge(gpu) for gpu in gpus)]
    found += [_row("ready", *judgement) for judgement in dict.fromkeys(_ready(gpu) for gpu in gpus)]
    return found


def _row(key: str, found: str, verdict: str, advice: str = "") -> Row:
    name, wanted = _GPU_ROWS[key]
    return Row(key, name, found, wanted, verdict, advice)


def _without_gpus(on_bus: int | None, reason: str) -> list[Row]:
    """The rows without a GPU. The reason is in the first row only."""
    if on_bus == 0:
        advice = "pass a GPU through to this machine"
        first = Row("gpu", "GPU", "no NVIDIA device on the PCI bus", _GPUS_WANTED, WRONG, advice)
    else:
        text = NOT_KNOWN if on_bus is None else f"{on_bus} NVIDIA device{'s' * (on_bus > 1)} on the PCI bus"
        first = Row("gpu", "GPU", text, _GPUS_WANTED, UNKNOWN, reason)
    return [first, *(_row(key, NOT_KNOWN, UNKNOWN) for key in _GPU_ROWS)]


def _on_bus(probe: Probe) -> int | None:
    """How many of NVIDIA's display controllers (class 03) are on the PCI bus; None if this kernel shows no such bus."""
    names = probe.names("sys/bus/pci/devices")
    if names is None:
        return None
    folder = "sys/bus/pci/devices"
    return sum(
        (probe.text(f"{folder}/{name}/vendor") or "").strip() == "0x10de"
        and (probe.text(f"{folder}/{name}/class") or "").startswith("0x03")
        for name in names
    )


def _gpu(gpu: GpuInfo, name: str) -> Row:
    memory = "" if gpu.protected_kib is None else f", {gpu.protected_kib / 2**20:.0f} GiB protected"
    found = f"{gpu.name} ({gpu.architecture}{memory})"
    names = _SUPPORTED.get(gpu.architecture)
    if names is None:
        return Row("gpu", name, found, _GPUS_WANTED, WRONG, "this GPU has no confidential computing; use a listed one")
    if not names.search(gpu.name):
        return Row("gpu", name, found, _GPUS_WANTED, UNKNOWN, "this model is not in the table; its evidence will tell")
    return Row("gpu", name, found, _GPUS_WANTED, OK)


def _vbios(gpu: GpuInfo, name: str) -> Row:
    version, wanted = gpu.vbios_version, _GPU_ROWS["vbios"][1]
    if gpu.architecture == "blackwell":
        # Blackwell's versions count differently, and its first one already has confidential computing.
        return Row("vbios", name, version, "no minimum on Blackwell", OK)
    verdict, advice = hopper_vbios(version) if gpu.architecture == "hopper" else (UNKNOWN, _NOT_HOPPERS)
    return Row("vbios", name, version or NOT_KNOWN, wanted, verdict, advice)


def hopper_vbios(version: str) -> tuple[str, str]:
    """Verdict and advice for the VBIOS of a Hopper GPU: 96.00.5E.00.01 is the first with confidential computing."""
    # Two hexadecimal digits per field. Hopper's versions start with 96; others cannot be compared.
    if not re.fullmatch(r"96(\.[0-9A-Fa-f]{2}){4}", version):
        return UNKNOWN, _NOT_HOPPERS
    if [int(field, 16) for field in version.split(".")] < [0x96, 0x00, 0x5E, 0x00, 0x01]:
        return WRONG, "update the GPU's firmware; the machine's vendor has it"
    return OK, ""


def _driver(gpu: GpuInfo) -> tuple[str, str, str]:
    parsed = re.match(r"(\d{1,9})\.(\d{1,9})(\.\d+)*$", gpu.driver_version)
    if parsed is None:
        return (
            gpu.driver_version or NOT_KNOWN,
            UNKNOWN,
            "this version cannot be compared; install 535.86 or later",
        )
    if (int(parsed[1]), int(parsed[2])) < (535, 86):
        return gpu.driver_version, WRONG, "install NVIDIA's driver 535.86 or later, with the open kernel modules"
    return gpu.driver_version, OK, ""


def _cc(gpu: GpuInfo) -> tuple[str, str, str]:
    if gpu.cc_mode == "on":
        return "on", OK, ""
    if gpu.cc_mode == "devtools":
        return "for debugging", WRONG, "the host has to set the mode: nvidia_gpu_tools.py --set-cc-mode=on"
    return gpu.cc_mode, WRONG, "the host has to set the mode: nvidia_gpu_tools.py --set-cc-mode=on, then reset the GPU"


def _devtools(gpu: GpuInfo) -> tuple[str, str, str]:
    if gpu.cc_mode == "devtools":
        return "on", WRONG, "DevTools mode turns the protections off: the host has to set CC mode to on"
    return "off", OK, ""


def _switches(gpu: GpuInfo) -> tuple[str, str, str]:
    if gpu.multi_gpu == "protected-pcie":
        return "protected PCIe", UNKNOWN, "NVSwitches see traffic between GPUs, and this version does not attest them"
    return "none" if gpu.multi_gpu == "none" else f"none ({gpu.multi_gpu})", OK, ""


def _ready(gpu: GpuInfo) -> tuple[str, str, str]:
    if gpu.ready is None:
        return NOT_KNOWN, UNKNOWN, "the driver does not report it; run this as root, with CC mode on"
    # A machine starts "not ready": the backend sets the state after it has verified its own evidence.
    return "ready" if gpu.ready else "not ready yet", OK, ""
