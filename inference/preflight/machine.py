"""The rows of the machine: processor, virtual machine, kernel, system, and everything that could write memory to a
disk."""

import re
import struct
from dataclasses import dataclass

from adytum.inference.preflight.probe import Probe
from adytum.inference.preflight.table import NOT_KNOWN, OK, UNKNOWN, WRONG, Row


@dataclass(frozen=True)
class Vm:
    kind: str
    """sev-snp, tdx, azure (SEV-SNP behind Azure's paravisor) or empty."""
    row: Row


_HYPER_V = b"Microsoft Hv"
_HYPERVISOR, _ISOLATION = 0x40000000, 0x4000000C
_ISOLATED_SNP, _ISOLATED_TDX = 2, 3
"""Microsoft, Hypervisor Top-Level Functional Specification: isolation configuration, EBX bits 3:0."""


def vm(probe: Probe) -> Vm:
    def verdict(kind: str, found: str, verdict: str = OK, advice: str = "") -> Vm:
        wanted = "SEV-SNP or TDX, active"
        return Vm(kind, Row("confidential-vm", "confidential VM", found, wanted, verdict, advice))

    flags = _cpu_field(probe, "flags").split()
    # The kernel makes these only in SEV-SNP guests: the drivers attach to nothing else.
    if probe.has("dev/sev-guest") or probe.has("sys/devices/system/cpu/sev/vmpl"):
        return verdict("sev-snp", "SEV-SNP")
    if "tdx_guest" in flags:
        return verdict("tdx", "TDX")
    vendor, isolation = probe.cpuid(_HYPERVISOR), probe.cpuid(_ISOLATION)
    if vendor is not None and isolation is not None and struct.pack("<3I", *vendor[1:]) == _HYPER_V:
        kind = isolation[1] & 0xF
        if kind == _ISOLATED_SNP:
            return verdict("azure", "SEV-SNP behind Azure's paravisor")
        if kind == _ISOLATED_TDX:
            return verdict(
                "", "TDX behind a paravisor", WRONG, "this version collects no evidence there; use SEV-SNP or plain TDX"
            )
    elif (probe.text("sys/class/dmi/id/sys_vendor") or "").strip() == "Microsoft Corporation":
        return verdict(
            "", "Hyper-V; isolation not known", UNKNOWN, "run `modprobe cpuid`, then this command as root again"
        )
    if not flags:
        return verdict("", NOT_KNOWN, UNKNOWN, "/proc/cpuinfo cannot be read; mount /proc")
    if "hypervisor" in flags and "sev_snp" in flags:
        return verdict("", "SEV-SNP is offered; active or not", UNKNOWN, "run `modprobe sev-guest`")
    return verdict(
        "",
        "neither SEV-SNP nor TDX",
        WRONG,
        "start this machine as an SEV-SNP or TDX guest; if it is one, run `modprobe sev-guest`",
    )


# By CPUID family: first model, last model, and the product's name in AMD's key hierarchy.
_AMD = {
    0x19: ((0x00, 0x0F, "Milan"), (0x10, 0x1F, "Genoa"), (0xA0, 0xAF, "Genoa")),
    0x1A: ((0x00, 0x11, "Turin"),),
}


def _cpu_field(probe: Probe, name: str) -> str:
    """A field of the first processor; empty if there is none."""
    found = re.search(rf"^{name}[ \t]*:[ \t]*(.*)$", probe.text("proc/cpuinfo") or "", re.MULTILINE)
    return found[1].strip() if found else ""


def cpu(probe: Probe, vm: Vm) -> Row:
    vendor, model_name = _cpu_field(probe, "vendor_id"), _cpu_field(probe, "model name")
    family, model = (_integer(_cpu_field(probe, name)) for name in ("cpu family", "model"))
    wanted = "AMD EPYC 7003 or later, or Intel Xeon with TDX"
    if not vendor:
        return Row("cpu", "CPU", NOT_KNOWN, wanted, UNKNOWN, "/proc/cpuinfo cannot be read; mount /proc")
    found = f"{model_name or vendor} (family {family}, model {model})"
    product = amd_product(family, model) if vendor == "AuthenticAMD" else None
    if product is not None:
        return Row("cpu", "CPU", f"{model_name}, {product}", wanted, OK)
    # A machine that runs SEV-SNP or TDX is capable of it, whatever model its host shows.
    if vm.kind:
        return Row("cpu", "CPU", found, wanted, OK)
    if vendor not in ("AuthenticAMD", "GenuineIntel") or (vendor == "AuthenticAMD" and (family or 0x19) < 0x19):
        return Row("cpu", "CPU", found, wanted, WRONG, "SEV-SNP needs EPYC Milan, Genoa, Turin or later; TDX, Intel's")
    return Row("cpu", "CPU", found, wanted, UNKNOWN, "this model is not in the table; the evidence will tell")


def amd_product(family: int | None, model: int | None) -> str | None:
    """AMD's name of a processor with SEV-SNP; None for any other."""
    if family is None or model is None:
        return None
    return next((name for first, last, name in _AMD.get(family, ()) if first <= model <= last), None)


def _integer(text: str) -> int | None:
    return int(text) if re.fullmatch(r"[0-9]{1,9}", text) else None


def reports(probe: Probe, vm: Vm) -> Row:
    def row(found: str, verdict: str = OK, advice: str = "") -> Row:
        return Row("reports", "report device", found, "configfs-tsm, /dev/sev-guest or vTPM", verdict, advice)

    if vm.kind == "azure":
        if probe.has("dev/tpmrm0"):
            return row("/dev/tpmrm0")
        return row("none", WRONG, "the virtual TPM is missing: give the machine one, run `modprobe tpm_crb`")
    if probe.has("sys/kernel/config/tsm/report"):
        return row("configfs-tsm")
    if probe.has("dev/sev-guest"):
        return row("/dev/sev-guest")
    return row(
        "none",
        WRONG,
        "in a TDX guest run `modprobe tdx_guest`, in an SEV-SNP guest `modprobe sev-guest`, and mount configfs on "
        "/sys/kernel/config",
    )


def kernel(probe: Probe, vm: Vm) -> Row:
    wanted = "6.7 (configfs-tsm); with SEV-SNP at least 5.19-rc6"
    release = (probe.text("proc/sys/kernel/osrelease") or "").strip()
    parsed = re.match(r"(\d{1,9})\.(\d{1,9})(?!\d)(?:\.\d+)?(?:-rc(\d{1,9}))?", release)
    if parsed is None:
        found, advice = release or NOT_KNOWN, "the kernel's version cannot be read; mount /proc"
        return Row("kernel", "kernel", found, wanted, UNKNOWN, advice)
    version = int(parsed[1]), int(parsed[2])
    early = version == (5, 19) and parsed[3] is not None and int(parsed[3]) < 6
    if version < (5, 19) or early:
        return Row("kernel", "kernel", release, wanted, WRONG, "install Linux 6.7 or later")
    if version < (6, 7) and vm.kind not in ("sev-snp", "azure"):
        advice = "TDX reports need configfs-tsm: install Linux 6.7 or later"
        return Row("kernel", "kernel", release, wanted, WRONG, advice)
    return Row("kernel", "kernel", release, wanted, OK)


def system(probe: Probe) -> Row:
    wanted = "Ubuntu 22.04 or later"
    text = probe.text("etc/os-release") or probe.text("usr/lib/os-release") or ""
    fields = {
        key: value.strip("\"'") for key, equals, value in (line.strip().partition("=") for line in text.splitlines())
    }
    found = fields.get("PRETTY_NAME") or fields.get("ID") or NOT_KNOWN
    version = re.fullmatch(r"(\d{1,9})\.(\d{1,9})", fields.get("VERSION_ID", ""))
    if fields.get("ID") != "ubuntu" or version is None:
        return Row("os", "system", found, wanted, UNKNOWN, "not tested on this system; use Ubuntu 22.04 or later")
    if (int(version[1]), int(version[2])) < (22, 4):
        return Row("os", "system", found, wanted, WRONG, "install Ubuntu 22.04 or later")
    return Row("os", "system", found, wanted, OK)


def swap(probe: Probe) -> Row:
    text = probe.text("proc/swaps")
    lines = [] if text is None else text.splitlines()
    if not lines or not lines[0].startswith("Filename"):
        return Row("swap", "swap", NOT_KNOWN, "off", UNKNOWN, "/proc/swaps cannot be read; mount /proc")
    areas = [line.split()[0] for line in lines[1:] if line.strip()]
    if areas:
        advice = "run `swapoff -a` and remove the swap areas from /etc/fstab: the disk is the host's"
        return Row("swap", "swap", ", ".join(areas), "off", WRONG, advice)
    return Row("swap", "swap", "off", "off", OK)


_DISCARDS = frozenset({"|/bin/false", "|/usr/bin/false", "|/bin/true", "|/usr/bin/true"})


def core_dumps(probe: Probe) -> Row:
    def row(found: str, verdict: str, advice: str = "") -> Row:
        return Row("core-dumps", "core dumps", found, "off", verdict, advice)

    off = "run `sysctl -w kernel.core_pattern='|/bin/false'`, and write it into /etc/sysctl.d"
    pattern = probe.text("proc/sys/kernel/core_pattern")
    if pattern is None:
        return row(NOT_KNOWN, UNKNOWN, "/proc/sys/kernel/core_pattern cannot be read; mount /proc")
    pattern = pattern.strip()
    if pattern in _DISCARDS:
        return row("off", OK)
    # A program or a socket receives every dump, whatever the limits are.
    if pattern.startswith(("|", "@")):
        return row(f"go to {pattern.split()[0][1:] or 'a program'}", WRONG, off)
    limit = re.search(r"^Max core file size +\S+ +(\S+)", probe.text("proc/self/limits") or "", re.MULTILINE)
    if limit is None:
        return row(NOT_KNOWN, UNKNOWN, off)
    if limit[1] != "0":
        return row(f"files named {pattern!a}", WRONG, off)
    return row("off (limit 0)", OK)


def crash_dump(probe: Probe) -> Row:
    def row(found: str, verdict: str, advice: str = "") -> Row:
        return Row("crash-dump", "kernel crash dump", found, "off", verdict, advice)

    loaded = probe.text("sys/kernel/kexec_crash_loaded")
    if loaded is None:
        # A kernel without crash dumps has the folder but not this file.
        return row("the kernel has none", OK) if probe.names("sys/kernel") else row(NOT_KNOWN, UNKNOWN, "mount /sys")
    if loaded.strip() == "0":
        return row("off", OK)
    return row("on", WRONG, "it would write all memory to a disk: remove kdump-tools and `crashkernel=`, restart")
