"""Whether a host can start confidential VMs with GPUs: a table with a verdict and advice per row.

This is advice for the operator, not proof: clients rely on the evidence. A fact that cannot be found out is "unknown",
never "ok". The messages are Linux's (arch/x86/virt/svm/sev.c, arch/x86/kvm/svm/sev.c, drivers/crypto/ccp/sev-dev.c,
drivers/iommu/amd/init.c).
"""

import re
from collections.abc import Iterable

from adytum.deploy.launch.config import Config
from adytum.deploy.launch.host import Host, field
from adytum.inference.preflight.gpus import hopper_vbios
from adytum.inference.preflight.machine import amd_product
from adytum.inference.preflight.table import NOT_KNOWN, OK, UNKNOWN, WRONG, Row

_BIOS = "in the BIOS, AMD CBS"


def rows(host: Host, config: Config | None) -> list[Row]:
    """The whole table. Without a configuration the rows about one machine are omitted."""
    log = host.log()
    found = [
        _cpu(host),
        _features(host),
        _kernel(host),
        _parameters(host),
        _memory_encryption(log),
        _rmp(log),
        _snp(host),
        _asids(log),
        _device(host),
        _firmware(log),
        _iommu(host, log),
        _encryption_bit(host),
    ]
    if config is None:
        return found
    found += [_qemu(host, config), _memory(host, config), _memlock(host, config)]
    if config.gpus is not None:
        found.append(_vfio(host, iommufd=config.gpus.iommufd))
        for device in config.gpus.devices:
            found += [_gpu(host, device), _bound(host, device), _group(host, device), _vbios(host, device)]
    return found


def ready(table: Iterable[Row]) -> bool:
    """Whether every row is ok. The GPU's VBIOS may be unknown: only the evidence shows it for certain."""
    return all(row.verdict == OK or (row.key == "vbios" and row.verdict == UNKNOWN) for row in table)


def _cpu(host: Host) -> Row:
    info = host.text("proc/cpuinfo")
    wanted = "AMD EPYC Milan, Genoa or Turin"
    name = field(info, "model name") or NOT_KNOWN
    try:
        family, model = int(field(info, "cpu family") or ""), int(field(info, "model") or "")
    except ValueError:
        return Row("cpu", "CPU", NOT_KNOWN, wanted, UNKNOWN, "/proc/cpuinfo cannot be read; mount /proc")
    product = amd_product(family, model) if field(info, "vendor_id") == "AuthenticAMD" else None
    if product is not None:
        return Row("cpu", "CPU", f"{name}, {product}", wanted, OK)
    return Row("cpu", "CPU", f"{name} (family {family}, model {model})", wanted, WRONG, "this CPU has no SEV-SNP")


def _features(host: Host) -> Row:
    wanted = "sev, sev_es, sev_snp"
    flags = field(host.text("proc/cpuinfo"), "flags")
    if flags is None:
        return Row("features", "CPU features", NOT_KNOWN, wanted, UNKNOWN, "/proc/cpuinfo cannot be read; mount /proc")
    missing = [flag for flag in wanted.split(", ") if flag not in flags.split()]
    if missing:
        advice = f"{_BIOS} > CPU Common Options: SMEE (or SMEE and SEV Control) Enabled; the kernel is 6.11 or later"
        return Row("features", "CPU features", f"without {', '.join(missing)}", wanted, WRONG, advice)
    return Row("features", "CPU features", wanted, wanted, OK)


def _kernel(host: Host) -> Row:
    release = (host.text("proc/sys/kernel/osrelease") or "").strip()
    wanted = "6.11 or later"
    parsed = re.match(r"(\d{1,4})\.(\d{1,4})(?!\d)", release)
    if parsed is None:
        advice = "the kernel's version cannot be read; mount /proc"
        return Row("kernel", "kernel", release or NOT_KNOWN, wanted, UNKNOWN, advice)
    if (int(parsed[1]), int(parsed[2])) < (6, 11):
        advice = "install Linux 6.11 or later, the first with KVM's side of SEV-SNP; or AMD's tree"
        return Row("kernel", "kernel", release, wanted, WRONG, advice)
    return Row("kernel", "kernel", release, wanted, OK)


def _parameters(host: Host) -> Row:
    wanted = "no iommu=pt, IOMMU not off, all CPUs on"
    text = host.text("proc/cmdline")
    if text is None:
        return Row("cmdline", "kernel parameters", NOT_KNOWN, wanted, UNKNOWN, "/proc/cmdline cannot be read")
    bad = [
        word
        for word in text.split()
        if re.fullmatch(r"iommu=(.*,)?(pt|off)(,.*)?|amd_iommu=off|iommu\.passthrough=1|nosmt(=.*)?|maxcpus=.*", word)
        or re.fullmatch(r"mem_encrypt=off|kvm_amd\.sev(_es|_snp)?=(0|n|N)|amd_iommu=(.*,)?pgtbl_v2(,.*)?", word)
    ]
    if bad:
        advice = f"remove {' '.join(bad)} from the kernel's parameters and reboot the host"
        return Row("cmdline", "kernel parameters", " ".join(bad), wanted, WRONG, advice)
    return Row("cmdline", "kernel parameters", "none of these", wanted, OK)


def _memory_encryption(log: str | None) -> Row:
    name, wanted = "memory encryption", "enabled by the BIOS"
    if log is None:
        return _no_log("smee", name, wanted)
    if "memory encryption not enabled by BIOS" in log:
        advice = f"{_BIOS} > CPU Common Options: SMEE Enabled"
        return Row("smee", name, "not enabled by the BIOS", wanted, WRONG, advice)
    if not re.search(r"SEV(-SNP)? API:", log):
        return Row("smee", name, NOT_KNOWN, wanted, UNKNOWN, "run `modprobe ccp`; the log does not mention SEV")
    return Row("smee", name, wanted, wanted, OK)


def _rmp(log: str | None) -> Row:
    name, wanted = "RMP table", "reserved by the BIOS"
    if log is None:
        return _no_log("rmp", name, wanted)
    advice = f"{_BIOS}: SNP Memory (RMP Table) Coverage Enabled, not Auto; the next boot takes up to half an hour"
    if "Memory for the RMP table has not been reserved by BIOS" in log:
        return Row("rmp", name, "not reserved", wanted, WRONG, advice)
    found = re.search(r"RMP table physical (?:range|address) \[?(0x[0-9a-f]+) - (0x[0-9a-f]+)", log)
    if found is None:
        return Row("rmp", name, NOT_KNOWN, wanted, UNKNOWN, f"the log does not say; {advice}")
    return Row("rmp", name, f"{found[1]} to {found[2]}", wanted, OK)


def _snp(host: Host) -> Row:
    name, wanted = "KVM's SEV-SNP", "kvm_amd.sev_snp is Y"
    value = (host.text("sys/module/kvm_amd/parameters/sev_snp") or "").strip()
    if value in ("Y", "1"):
        return Row("snp", name, value, wanted, OK)
    if value:
        return Row(
            "snp", name, value, wanted, WRONG, "the other rows say why; then `modprobe -r kvm_amd; modprobe kvm_amd`"
        )
    if host.has("sys/module/kvm_amd"):
        return Row(
            "snp", name, "no such parameter", wanted, WRONG, "this kernel's KVM has no SEV-SNP; install 6.11 or later"
        )
    return Row("snp", name, "kvm_amd is not loaded", wanted, WRONG, f"`modprobe kvm_amd`; {_BIOS}: SVM Enabled")


def _asids(log: str | None) -> Row:
    name, wanted = "SEV-SNP ASIDs", "at least one"
    advice = f"{_BIOS} > CPU Common Options: SEV-ES ASID Space Limit Control Manual, SEV-ES ASID Space Limit 100"
    if log is None:
        return _no_log("asids", name, wanted)
    found = re.findall(r"SEV-SNP (enabled|disabled|unusable) \(ASIDs (\d+) - (\d+)\)", log)
    if not found:
        return Row(
            "asids", name, NOT_KNOWN, wanted, UNKNOWN, f"the log does not say; `modprobe kvm_amd`, then {advice}"
        )
    state, first, last = found[-1]
    if state != "enabled" or int(last) < int(first) or int(last) == 0:
        reason = advice if int(last) == 0 else "the rows about RMP table, IOMMU and firmware say why"
        return Row("asids", name, f"{state} ({first} to {last})", wanted, WRONG, reason)
    return Row("asids", name, f"{first} to {last}", wanted, OK)


def _device(host: Host) -> Row:
    if host.has("dev/sev"):
        return Row("sev", "/dev/sev", "there", "there", OK)
    return Row(
        "sev", "/dev/sev", "not there", "there", WRONG, "`modprobe ccp`; the rows about the BIOS say what it lacks"
    )


def _firmware(log: str | None) -> Row:
    # Linux does not initialise SNP with older firmware (SNP_MIN_API_MAJOR and SNP_MIN_API_MINOR in sev-dev.c).
    name, wanted = "SNP firmware", "API 1.51 or later"
    if log is None:
        return _no_log("firmware", name, wanted)
    found = re.findall(r"SEV-SNP API:(\d+)\.(\d+) build:(\d+)", log)
    if not found:
        advice = "the firmware did not start SNP: update the BIOS, or amd_sev_fam19h_model*.sbin in /lib/firmware/amd"
        return Row("firmware", name, NOT_KNOWN, wanted, UNKNOWN, advice)
    major, minor, build = map(int, found[-1])
    if (major, minor) < (1, 51):
        return Row("firmware", name, f"API {major}.{minor} build {build}", wanted, WRONG, "update the BIOS")
    return Row("firmware", name, f"API {major}.{minor} build {build}", wanted, OK)


def _iommu(host: Host, log: str | None) -> Row:
    name, wanted = "IOMMU", "on, with SNP"
    if log is None:
        return _no_log("iommu", name, wanted)
    if "IOMMU disabled or configured in passthrough mode" in log:
        return Row(
            "iommu", name, "off or in passthrough mode", wanted, WRONG, f"no iommu=pt; {_BIOS} > NBIO: IOMMU Enabled"
        )
    if "SNP: IOMMU SNP feature not enabled" in log:
        advice = f"{_BIOS} > NBIO Common Options: SEV-SNP Support Enabled, not Auto"
        return Row("iommu", name, "without SNP", wanted, WRONG, advice)
    if "V2 page table mode, SNP cannot be supported" in log:
        return Row("iommu", name, "with page tables of version 2", wanted, WRONG, "remove amd_iommu=pgtbl_v2")
    if not host.names("sys/class/iommu"):
        return Row("iommu", name, "none", wanted, WRONG, f"{_BIOS} > NBIO Common Options: IOMMU Enabled")
    if "IOMMU SNP support enabled" not in log:
        advice = f"the log does not say; {_BIOS} > NBIO Common Options: SEV-SNP Support Enabled"
        return Row("iommu", name, NOT_KNOWN, wanted, UNKNOWN, advice)
    return Row("iommu", name, wanted, wanted, OK)


def _encryption_bit(host: Host) -> Row:
    position = host.cbitpos()
    wanted = "can be read"
    if position is None:
        advice = "`modprobe cpuid`, and run this as root; or write snp.cbitpos = 51, Milan's and Genoa's"
        return Row("cbitpos", "encryption bit", NOT_KNOWN, wanted, UNKNOWN, advice)
    return Row("cbitpos", "encryption bit", str(position), wanted, OK)


def _qemu(host: Host, config: Config) -> Row:
    wanted = "9.2 or later"
    said = host.version(config.qemu)
    found = re.search(r"version (\d+)\.(\d+)\.(\d+)", said or "")
    if found is None:
        return Row("qemu", "QEMU", NOT_KNOWN, wanted, UNKNOWN, f"{config.qemu} cannot be run; install qemu-system-x86")
    version = ".".join(found.groups())
    if (int(found[1]), int(found[2])) < (9, 2):
        advice = "9.1 is the first with SEV-SNP, but refuses VFIO devices in such guests; Debian 13 has 10.0"
        return Row("qemu", "QEMU", version, wanted, WRONG, advice)
    return Row("qemu", "QEMU", version, wanted, OK)


def _memory(host: Host, config: Config) -> Row:
    # Private and shared memory are allocated separately, so the guest can use its size plus its shared part.
    needed = config.memory_gib * 1024 + config.swiotlb_mib
    wanted = f"{needed} MiB"
    found = re.match(r"(\d+) kB", field(host.text("proc/meminfo"), "MemAvailable") or "")
    if found is None:
        return Row("memory", "free memory", NOT_KNOWN, wanted, UNKNOWN, "/proc/meminfo cannot be read; mount /proc")
    free = int(found[1]) // 1024
    if free < needed:
        return Row("memory", "free memory", f"{free} MiB", wanted, WRONG, "stop other machines, or lower memory_gib")
    return Row("memory", "free memory", f"{free} MiB", wanted, OK)


def _memlock(host: Host, config: Config) -> Row:
    wanted = "unlimited, or more than the guest's memory"
    text = host.text("proc/self/limits") or ""
    found = re.search(r"^Max locked memory +(\S+) ", text, re.MULTILINE)
    if found is None:
        return Row("memlock", "locked memory", NOT_KNOWN, wanted, UNKNOWN, "/proc/self/limits cannot be read")
    if found[1] != "unlimited" and int(found[1]) < (config.memory_gib + 1) * 1024**3:
        advice = "VFIO pins memory that devices reach: `ulimit -l unlimited`, or LimitMEMLOCK=infinity in the unit"
        return Row("memlock", "locked memory", f"{int(found[1]) // 1024} KiB", wanted, WRONG, advice)
    return Row("memlock", "locked memory", found[1], wanted, OK)


def _vfio(host: Host, *, iommufd: bool) -> Row:
    path = "dev/iommu" if iommufd else "dev/vfio/vfio"
    module = "iommufd" if iommufd else "vfio-pci"
    if host.has(path):
        return Row("vfio", "VFIO", f"/{path}", f"/{path}", OK)
    return Row("vfio", "VFIO", "not there", f"/{path}", WRONG, f"`modprobe {module}`")


def _gpu(host: Host, device: str) -> Row:
    wanted = "an NVIDIA GPU (vendor 10de, class 0302 or 0300)"
    folder = f"sys/bus/pci/devices/{device}"
    vendor, kind = ((host.text(f"{folder}/{name}") or "").strip() for name in ("vendor", "class"))
    found = f"{device}: {vendor} {(host.text(f'{folder}/device') or '').strip()}"
    if not vendor:
        return Row("gpu", "GPU", f"{device}: none", wanted, WRONG, "`lspci -Dnn -d 10de:` lists the addresses")
    if vendor != "0x10de" or not kind.startswith(("0x0302", "0x0300")):
        return Row("gpu", "GPU", found, wanted, WRONG, "`lspci -Dnn -d 10de:` lists the addresses")
    return Row("gpu", "GPU", found, wanted, OK)


def _bound(host: Host, device: str) -> Row:
    driver = host.link(f"sys/bus/pci/devices/{device}/driver")
    if driver == "vfio-pci":
        return Row("binding", "GPU's driver", driver, "vfio-pci", OK)
    advice = f"deploy/launch/README.md has the commands that bind {device} to vfio-pci; keep nvidia and nouveau off it"
    return Row("binding", "GPU's driver", driver or "none", "vfio-pci", WRONG, advice)


def _group(host: Host, device: str) -> Row:
    name, wanted = "IOMMU group", "the GPU alone, or with devices of vfio-pci and bridges"
    names = host.names(f"sys/bus/pci/devices/{device}/iommu_group/devices")
    if not names:
        return Row("group", name, NOT_KNOWN, wanted, UNKNOWN, "the GPU has no IOMMU group: turn the IOMMU on")
    strange = [
        other
        for other in names
        if host.link(f"sys/bus/pci/devices/{other}/driver") not in ("vfio-pci", None)
        and not (host.text(f"sys/bus/pci/devices/{other}/class") or "").startswith("0x0604")
    ]
    if strange:
        return Row(
            "group", name, ", ".join(strange), wanted, WRONG, "bind these to vfio-pci too, or turn on ACS in the BIOS"
        )
    return Row("group", name, f"{len(names)} device{'s' * (len(names) > 1)}", wanted, OK)


def _vbios(host: Host, device: str) -> Row:
    name, wanted = "VBIOS", "96.00.5E.00.01 or later (H100)"
    version = field(host.text(f"proc/driver/nvidia/gpus/{device}/information"), "Video BIOS")
    if version is None:
        # vfio-pci cannot ask for it.
        advice = "not readable under vfio-pci; `adytum preflight` in the guest and the evidence show it"
        return Row("vbios", name, NOT_KNOWN, wanted, UNKNOWN, advice)
    return Row("vbios", name, version, wanted, *hopper_vbios(version))


def _no_log(key: str, name: str, wanted: str) -> Row:
    return Row(key, name, NOT_KNOWN, wanted, UNKNOWN, "the kernel's log cannot be read: run this as root")
