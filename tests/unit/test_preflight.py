"""The table of supported hardware, on folders that act as machines with what real ones have in /proc, /sys and /etc."""

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from adytum.attestation.core.errors import CollectionError
from adytum.attestation.nvidia.device import GpuInfo, NvidiaGpus
from adytum.inference.preflight import REQUIREMENTS, Probe, Row, as_json, as_text, meets, rows
from tests.unit.attestation.nvidia import nvml
from tests.unit.attestation.nvidia.authority import Authority, FakeGpu

GENOA = """processor\t: 0
vendor_id\t: AuthenticAMD
cpu family\t: 25
model\t\t: 17
model name\t: AMD EPYC 9V84 96-Core Processor
stepping\t: 1
cpu MHz\t\t: 2400.000
flags\t\t: fpu vme de pse tsc msr hypervisor lahf_lm svm sev_snp
bugs\t\t: sysret_ss_attrs

processor\t: 1
vendor_id\t: AuthenticAMD
flags\t\t: fpu
"""
EMERALD = """processor\t: 0
vendor_id\t: GenuineIntel
cpu family\t: 6
model\t\t: 207
model name\t: INTEL(R) XEON(R) PLATINUM 8580
flags\t\t: fpu vme de pse tsc msr hypervisor tdx_guest arch_capabilities
"""
UBUNTU = """PRETTY_NAME="Ubuntu 24.04.1 LTS"
NAME="Ubuntu"
VERSION_ID="24.04"
VERSION="24.04.1 LTS (Noble Numbat)"
ID=ubuntu
ID_LIKE=debian
"""
DEBIAN = 'PRETTY_NAME="Debian GNU/Linux 12 (bookworm)"\nID=debian\nVERSION_ID="12"\n'
NO_SWAP = "Filename\t\t\t\tType\t\tSize\t\tUsed\t\tPriority\n"
SWAP = NO_SWAP + "/swap.img                               file\t\t8388604\t\t0\t\t-2\n"
LIMITS = (
    "Limit                     Soft Limit           Hard Limit           Units     \n"
    "Max stack size            8388608              unlimited            bytes     \n"
    "Max core file size        0                    {hard}            bytes     \n"
)
SNP = {
    "proc/cpuinfo": GENOA,
    "proc/sys/kernel/osrelease": "6.8.0-1021-azure\n",
    "proc/sys/kernel/core_pattern": "|/bin/false\n",
    "proc/self/limits": LIMITS.format(hard="unlimited"),
    "proc/swaps": NO_SWAP,
    "etc/os-release": UBUNTU,
    "sys/kernel/kexec_crash_loaded": "0\n",
    "sys/kernel/config/tsm/report/.keep": "",
    "dev/sev-guest": "",
    "sys/bus/pci/devices/0000:01:00.0/vendor": "0x10de\n",
    "sys/bus/pci/devices/0000:01:00.0/class": "0x030200\n",
    "sys/bus/pci/devices/0000:00:03.0/vendor": "0x1af4\n",
    "sys/bus/pci/devices/0000:00:03.0/class": "0x020000\n",
}
H100 = GpuInfo("NVIDIA H100 80GB HBM3", "hopper", "550.90.07", "96.00.9F.00.01", "on", "none", False, 80 << 20, 0)
B200 = replace(H100, name="NVIDIA B200", architecture="blackwell", driver_version="570.86.15", vbios_version="97.00.1")
HYPERVISOR, ISOLATION = 0x40000000, 0x4000000C

Files = dict[str, str | None]
Machine = Callable[..., Probe]


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    """A good SEV-SNP machine with one H100, but for the given files (None takes one away) and GPUs."""

    def make(files: Files | None = None, gpus: Sequence[GpuInfo] | CollectionError = (H100,)) -> Probe:
        for name, text in {**SNP, **(files or {})}.items():
            if text is not None:
                (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
                (tmp_path / name).write_text(text)

        def ask() -> Sequence[GpuInfo]:
            if isinstance(gpus, CollectionError):
                raise gpus
            return gpus

        return Probe(ask, tmp_path)

    return make


def cpuid(root: Path, isolation: int, vendor: bytes = b"Microsoft Hv") -> None:
    """The cpuid device: 16 bytes (eax, ebx, ecx, edx) at the leaf's number.

    A file's bytes overlap where the device's do not: here the second leaf's eax is the first one's edx.
    """
    path = root / "dev/cpu/0/cpuid"
    path.parent.mkdir(parents=True)
    with path.open("wb") as file:
        os.pwrite(file.fileno(), bytes(4) + isolation.to_bytes(4, "little") + bytes(8), ISOLATION)
        os.pwrite(file.fileno(), ISOLATION.to_bytes(4, "little") + vendor, HYPERVISOR)


def one(probe: Probe, key: str) -> Row:
    (found,) = [row for row in rows(probe) if row.key == key]
    return found


def check_advice(table: Sequence[Row]) -> None:
    for row in table:
        assert row.verdict in ("ok", "wrong", "unknown")
        assert not (row.verdict == "ok" and row.advice)
        assert not (row.verdict == "wrong" and not row.advice)


def test_a_good_machine(machine: Machine) -> None:
    table = rows(machine())
    assert [(row.key, row.verdict, row.advice) for row in table if row.verdict != "ok"] == []
    assert meets(table, "cc-on")
    assert {row.key for row in table} == REQUIREMENTS["cc-on"]


def test_tdx(machine: Machine) -> None:
    table = rows(machine({"proc/cpuinfo": EMERALD, "dev/sev-guest": None}))
    assert meets(table, "cc-on")
    assert {row.found for row in table if row.key == "confidential-vm"} == {"TDX"}


def test_behind_the_paravisor(machine: Machine, tmp_path: Path) -> None:
    azure: Files = {"dev/sev-guest": None, "sys/kernel/config/tsm/report/.keep": None, "dev/tpmrm0": ""}
    cpuid(tmp_path, 2)
    table = rows(machine(azure))
    assert meets(table, "cc-on")
    assert "paravisor" in one(machine(azure), "confidential-vm").found
    assert one(machine(azure), "reports").found == "/dev/tpmrm0"
    assert meets(rows(machine({**azure, "proc/sys/kernel/osrelease": "6.5.0-1025-azure\n"})), "cc-on")
    (tmp_path / "dev/tpmrm0").unlink()
    assert one(machine({**azure, "dev/tpmrm0": None}), "reports").verdict == "wrong"


@pytest.mark.parametrize(
    ("isolation", "vendor", "verdict"),
    [
        (2, b"Microsoft Hv", "ok"),
        (0x12, b"Microsoft Hv", "ok"),
        (3, b"Microsoft Hv", "wrong"),
        (1, b"Microsoft Hv", "wrong"),
        (0, b"Microsoft Hv", "wrong"),
        (2, b"KVMKVMKVM\0\0\0", "wrong"),
    ],
)
def test_isolation_of_hyper_v(machine: Machine, tmp_path: Path, isolation: int, vendor: bytes, verdict: str) -> None:
    cpuid(tmp_path, isolation, vendor)
    plain = GENOA.replace(" sev_snp", "")
    probe = machine({"dev/sev-guest": None, "dev/tpmrm0": "", "proc/cpuinfo": plain})
    assert one(probe, "confidential-vm").verdict == verdict


HYPER_V: Files = {"dev/sev-guest": None, "sys/class/dmi/id/sys_vendor": "Microsoft Corporation\n"}
WITHOUT_TSM: Files = {"sys/kernel/config/tsm/report/.keep": None}
CASES: list[tuple[str, Files, str, str]] = [
    # key, files, verdict, in the text of what was found or advised
    ("cpu", {"proc/cpuinfo": GENOA}, "ok", "Genoa"),
    ("cpu", {"proc/cpuinfo": GENOA.replace(": 17", ": 1")}, "ok", "Milan"),
    ("cpu", {"proc/cpuinfo": GENOA.replace(": 17", ": 160")}, "ok", "Genoa"),
    ("cpu", {"proc/cpuinfo": GENOA.replace(": 25", ": 26").replace(": 17", ": 2")}, "ok", "Turin"),
    ("cpu", {"proc/cpuinfo": GENOA.replace(": 17", ": 80")}, "ok", "model 80"),
    ("cpu", {"proc/cpuinfo": GENOA.replace(": 17", ": 80"), "dev/sev-guest": None}, "unknown", "not in the table"),
    ("cpu", {"proc/cpuinfo": GENOA.replace(": 25", ": 23"), "dev/sev-guest": None}, "wrong", "Milan"),
    ("cpu", {"proc/cpuinfo": EMERALD.replace("tdx_guest", ""), "dev/sev-guest": None}, "unknown", "XEON"),
    ("cpu", {"proc/cpuinfo": GENOA.replace("AuthenticAMD", "HygonGenuine"), "dev/sev-guest": None}, "wrong", "EPYC"),
    ("cpu", {"proc/cpuinfo": None}, "unknown", "/proc"),
    ("confidential-vm", {"dev/sev-guest": None}, "unknown", "modprobe sev-guest"),
    ("confidential-vm", {"dev/sev-guest": None, "sys/devices/system/cpu/sev/vmpl": "0\n"}, "ok", "SEV-SNP"),
    # A host has the flag as well, but is not a guest.
    ("confidential-vm", {"dev/sev-guest": None, "proc/cpuinfo": GENOA.replace(" hypervisor", "")}, "wrong", "neither"),
    ("confidential-vm", {"dev/sev-guest": None, "proc/cpuinfo": GENOA.replace("sev_snp", "sev")}, "wrong", "neither"),
    ("confidential-vm", {"dev/sev-guest": None, "proc/cpuinfo": GENOA.replace("sev_snp", "my_tdx_guest")}, "wrong", ""),
    ("confidential-vm", {"dev/sev-guest": None, "proc/cpuinfo": None}, "unknown", "/proc"),
    ("confidential-vm", HYPER_V, "unknown", "modprobe cpuid"),
    ("reports", {}, "ok", "configfs-tsm"),
    ("reports", WITHOUT_TSM, "ok", "/dev/sev-guest"),
    ("reports", {**WITHOUT_TSM, "dev/sev-guest": None}, "wrong", "modprobe"),
    ("kernel", {"proc/sys/kernel/osrelease": "6.7.0-rc1\n"}, "ok", ""),
    ("kernel", {"proc/sys/kernel/osrelease": "7.0.0\n"}, "ok", ""),
    ("kernel", {"proc/sys/kernel/osrelease": "5.19.0-rc6-snp-guest-c4daeffce56e\n"}, "ok", ""),
    ("kernel", {"proc/sys/kernel/osrelease": "5.19.17\n"}, "ok", ""),
    ("kernel", {"proc/sys/kernel/osrelease": "6.5.0-1\n", "dev/sev-guest": None}, "wrong", "configfs-tsm"),
    (
        "kernel",
        {"proc/sys/kernel/osrelease": "6.5\n", "dev/sev-guest": None, "proc/cpuinfo": EMERALD},
        "wrong",
        "TDX",
    ),
    ("kernel", {"proc/sys/kernel/osrelease": "5.19.0-rc5\n"}, "wrong", "6.7"),
    ("kernel", {"proc/sys/kernel/osrelease": "5.15.0-1064-azure\n"}, "wrong", "6.7"),
    ("kernel", {"proc/sys/kernel/osrelease": "4.20.0\n"}, "wrong", "6.7"),
    ("kernel", {"proc/sys/kernel/osrelease": "mine\n"}, "unknown", "/proc"),
    ("kernel", {"proc/sys/kernel/osrelease": "6." + "9" * 5000}, "unknown", "/proc"),
    ("kernel", {"proc/sys/kernel/osrelease": None}, "unknown", "/proc"),
    ("os", {"etc/os-release": UBUNTU.replace("24.04", "22.04")}, "ok", "22.04"),
    ("os", {"etc/os-release": UBUNTU.replace("24.04", "20.04")}, "wrong", "22.04"),
    ("os", {"etc/os-release": UBUNTU.replace('"24.04"', '"rolling"')}, "unknown", "Ubuntu"),
    ("os", {"etc/os-release": None, "usr/lib/os-release": UBUNTU}, "ok", "24.04"),
    ("os", {"etc/os-release": DEBIAN}, "unknown", "Debian"),
    ("os", {"etc/os-release": None}, "unknown", "not known"),
    ("swap", {"proc/swaps": SWAP}, "wrong", "/swap.img"),
    ("swap", {"proc/swaps": None}, "unknown", "/proc"),
    ("swap", {"proc/swaps": ""}, "unknown", "/proc"),
    ("core-dumps", {"proc/sys/kernel/core_pattern": "|/usr/share/apport/apport -p%p\n"}, "wrong", "apport"),
    ("core-dumps", {"proc/sys/kernel/core_pattern": "|\n"}, "wrong", "a program"),
    ("core-dumps", {"proc/sys/kernel/core_pattern": "|/bin/false; cp\n"}, "wrong", "sysctl"),
    ("core-dumps", {"proc/sys/kernel/core_pattern": "@@/run/systemd/coredump\n"}, "wrong", "sysctl"),
    ("core-dumps", {"proc/sys/kernel/core_pattern": "core\n"}, "wrong", "'core'"),
    (
        "core-dumps",
        {"proc/sys/kernel/core_pattern": "core\n", "proc/self/limits": LIMITS.format(hard="0")},
        "ok",
        "limit 0",
    ),
    # A limit holds for files only.
    (
        "core-dumps",
        {
            "proc/sys/kernel/core_pattern": "|/usr/lib/systemd/systemd-coredump\n",
            "proc/self/limits": LIMITS.format(hard="0"),
        },
        "wrong",
        "sysctl",
    ),
    ("core-dumps", {"proc/sys/kernel/core_pattern": "core\n", "proc/self/limits": None}, "unknown", "sysctl"),
    ("core-dumps", {"proc/sys/kernel/core_pattern": None}, "unknown", "/proc"),
    ("crash-dump", {"sys/kernel/kexec_crash_loaded": "1\n"}, "wrong", "kdump-tools"),
    ("crash-dump", {"sys/kernel/kexec_crash_loaded": None}, "ok", "none"),
    ("crash-dump", {"sys/kernel/kexec_crash_loaded": None, **WITHOUT_TSM}, "unknown", "mount /sys"),
]


@pytest.mark.parametrize(("key", "files", "verdict", "says"), CASES, ids=[f"{c[0]}-{n}" for n, c in enumerate(CASES)])
def test_machine(machine: Machine, key: str, files: Files, verdict: str, says: str) -> None:
    probe = machine(files)
    table = rows(probe)
    check_advice(table)
    row = one(probe, key)
    assert row.verdict == verdict
    assert says in f"{row.found} {row.advice}"
    assert meets(table, "cc-on") == all(row.verdict == "ok" for row in table)


GPUS: list[tuple[str, GpuInfo, str, str]] = [
    ("gpu", H100, "ok", "80 GiB protected"),
    ("gpu", replace(H100, protected_kib=None), "ok", "(hopper)"),
    ("gpu", replace(H100, name="NVIDIA H100 PCIe"), "ok", "PCIe"),
    ("gpu", replace(H100, name="NVIDIA H100 NVL"), "ok", "NVL"),
    ("gpu", replace(H100, name="NVIDIA H200"), "ok", "H200"),
    ("gpu", B200, "ok", "B200"),
    ("gpu", replace(B200, name="NVIDIA RTX PRO 6000 Blackwell Server Edition"), "ok", "Server"),
    ("gpu", replace(B200, name="NVIDIA GeForce RTX 5090"), "unknown", "not in the table"),
    ("gpu", replace(H100, name="NVIDIA H20"), "unknown", "not in the table"),
    ("gpu", replace(H100, name="NVIDIA A100-SXM4-80GB", architecture="7"), "wrong", "listed"),
    ("gpu", replace(H100, name="NVIDIA H100 80GB HBM3", architecture="7"), "wrong", "listed"),
    ("driver", replace(H100, driver_version="535.86"), "ok", ""),
    ("driver", replace(H100, driver_version="535.86.10"), "ok", ""),
    ("driver", replace(H100, driver_version="535.104.05"), "ok", ""),
    ("driver", replace(H100, driver_version="535.85.99"), "wrong", "535.86"),
    ("driver", replace(H100, driver_version="535.54.03"), "wrong", "535.86"),
    ("driver", replace(H100, driver_version="530.154.05"), "wrong", "535.86"),
    ("driver", replace(H100, driver_version="550.90.07-open"), "unknown", "535.86"),
    ("driver", replace(H100, driver_version=""), "unknown", "not known"),
    ("vbios", replace(H100, vbios_version="96.00.5E.00.01"), "ok", ""),
    ("vbios", replace(H100, vbios_version="96.00.5E.00.00"), "wrong", "update the GPU"),
    ("vbios", replace(H100, vbios_version="96.00.30.00.01"), "wrong", "update the GPU"),
    # Fields are hexadecimal: A5 is more than 5E, and 9 as a digit is less than A.
    ("vbios", replace(H100, vbios_version="96.00.A5.00.01"), "ok", ""),
    ("vbios", replace(H100, vbios_version="96.01.00.00.00"), "ok", ""),
    ("vbios", replace(H100, vbios_version="97.00.5E.00.01"), "unknown", "Hopper"),
    ("vbios", replace(H100, vbios_version="96.00.5E.00"), "unknown", "Hopper"),
    ("vbios", replace(H100, vbios_version=""), "unknown", "not known"),
    ("vbios", B200, "ok", ""),
    ("cc-mode", replace(H100, cc_mode="off"), "wrong", "--set-cc-mode=on"),
    ("cc-mode", replace(H100, cc_mode="devtools"), "wrong", "debugging"),
    ("devtools", replace(H100, cc_mode="devtools"), "wrong", "DevTools"),
    ("switches", replace(H100, multi_gpu="protected-pcie"), "unknown", "NVSwitches"),
    ("switches", replace(B200, multi_gpu="nvlink"), "ok", "nvlink"),
    ("ready", replace(H100, ready=True), "ok", "ready"),
    ("ready", H100, "ok", "not ready yet"),
    ("ready", replace(H100, ready=None), "unknown", "root"),
]


@pytest.mark.parametrize(("key", "gpu", "verdict", "says"), GPUS, ids=[f"{c[0]}-{n}" for n, c in enumerate(GPUS)])
def test_gpu(machine: Machine, key: str, gpu: GpuInfo, verdict: str, says: str) -> None:
    probe = machine(gpus=[gpu])
    table = rows(probe)
    check_advice(table)
    row = one(probe, key)
    assert row.verdict == verdict
    assert says in f"{row.found} {row.advice}"
    assert meets(table, "cc-on") == all(row.verdict == "ok" for row in table)


def test_one_wrong_gpu_of_several_is_enough(machine: Machine) -> None:
    old = replace(H100, vbios_version="96.00.30.00.01")
    assert meets(rows(machine(gpus=[H100] * 4)), "cc-on")
    table = rows(machine(gpus=[H100, H100, old, H100]))
    assert [row.name for row in table if row.verdict == "wrong"] == ["VBIOS 2"]
    assert not meets(table, "cc-on")
    # The driver gives one state for all; were they to differ, none is hidden behind the first.
    for changed in (replace(H100, cc_mode="off"), replace(H100, driver_version="470.1"), replace(H100, ready=None)):
        assert not meets(rows(machine(gpus=[H100, changed])), "cc-on")


@pytest.mark.parametrize("gpus", [[], CollectionError("libnvidia-ml.so.1 is not there; install the driver")])
def test_a_gpu_without_a_driver(machine: Machine, gpus: list[GpuInfo] | CollectionError) -> None:
    table = rows(machine(gpus=gpus))
    (gpu,) = [row for row in table if row.key == "gpu"]
    assert (gpu.found, gpu.verdict) == ("1 NVIDIA device on the PCI bus", "unknown")
    assert "driver" in gpu.advice
    about = {"gpu", "driver", "vbios", "cc-mode", "devtools", "switches", "ready"}
    assert {row.key for row in table if row.verdict == "unknown"} == about
    assert not meets(table, "cc-on")


def test_no_gpu_at_all(machine: Machine, tmp_path: Path) -> None:
    missing = CollectionError("no library")
    none: Files = {name: None for name in SNP if "0000:01" in name}
    assert one(machine(none, missing), "gpu").verdict == "wrong"
    # A GPU's audio device (class 04) does not count, and neither does NVIDIA's NVSwitch (class 06).
    audio = {"sys/bus/pci/devices/0000:01:00.1/vendor": "0x10de\n", "sys/bus/pci/devices/0000:01:00.1/class": "0x0403"}
    assert one(machine({**none, **audio}, missing), "gpu").verdict == "wrong"


def test_no_machine_to_look_at(tmp_path: Path) -> None:
    def ask() -> Sequence[GpuInfo]:
        raise CollectionError("no library")

    table = rows(Probe(ask, tmp_path / "nothing"))
    check_advice(table)
    assert {row.key for row in table if row.verdict != "unknown"} == {"reports"}
    assert not any(row.verdict == "ok" for row in table)


def test_a_table_that_lacks_a_row_meets_nothing(machine: Machine) -> None:
    table = rows(machine())
    assert not meets([], "cc-on")
    for row in table:
        assert not meets([other for other in table if other is not row], "cc-on")
        for verdict in ("wrong", "unknown"):
            assert not meets([replace(other, verdict=verdict) if other is row else other for other in table], "cc-on")
    with pytest.raises(KeyError):
        meets(table, "cc-off")


def test_text(machine: Machine) -> None:
    table = rows(machine({"proc/swaps": SWAP}, [replace(H100, name="NVIDIA \x1b[2J H100")]))
    text = as_text(table)
    assert "\x1b" not in text
    lines = text.splitlines()
    assert len({line.index(row.wanted, 40) for row, line in zip(table, _rows_of(lines), strict=True)}) == 1
    place = next(n for n, line in enumerate(lines) if line.startswith("wrong"))
    assert "/swap.img" in lines[place]
    assert lines[place + 1].split()[:2] == ["->", "run"]
    coloured = as_text(table, colour=True)
    assert "\x1b[31mwrong  \x1b[0m" in coloured
    assert "\x1b[2J" not in coloured
    assert as_text([]) == ""


def _rows_of(lines: list[str]) -> list[str]:
    return [line for line in lines if not line.startswith(" ")]


def test_json(machine: Machine) -> None:
    table = rows(machine({"proc/swaps": SWAP}))
    said = json.loads(as_json(table))
    assert said["meets"] == {"cc-on": False}
    assert [Row(**row) for row in said["rows"]] == table
    assert json.loads(as_json(rows(machine({"proc/swaps": NO_SWAP}))))["meets"] == {"cc-on": True}


def test_with_the_real_library(machine: Machine) -> None:
    """GPUs through nvidia-ml-py and the stand-in for the driver's library."""
    nvml.load()
    probe = replace(machine(), gpus=lambda: NvidiaGpus().facts())
    authority = Authority()
    with nvml.Driver([FakeGpu(authority)]):
        assert meets(rows(probe), "cc-on")
    with nvml.Driver([FakeGpu(authority)], cc=0):
        assert one(probe, "cc-mode").verdict == "wrong"
    with nvml.Driver([FakeGpu(authority)], codes={"init": 9}):
        assert "dmesg" in one(probe, "gpu").advice


FILES = [*SNP, "usr/lib/os-release", "dev/cpu/0/cpuid", "sys/class/dmi/id/sys_vendor"]
STARTS = ["", "flags: ", "vendor_id: AuthenticAMD\ncpu family: ", "ID=ubuntu\nVERSION_ID=", "6."]


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    name=st.sampled_from(FILES),
    data=st.binary(max_size=400),
    key=st.sampled_from(["", "flags: ", "ID=ubuntu\nVERSION_ID="]),
)
def test_any_file_gives_a_table(machine: Machine, tmp_path: Path, name: str, data: bytes, key: str) -> None:
    """Whatever is in a file, there is a whole table that prints, and unsteered."""
    probe = machine({"dev/sev-guest": None})
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    before = path.read_bytes() if path.exists() else None
    path.write_bytes(key.encode() + data)
    try:
        table = rows(probe)
    finally:
        path.unlink()
        if before is not None:
            path.write_bytes(before)
    assert {row.key for row in table} == REQUIREMENTS["cc-on"]
    check_advice(table)
    assert as_text(table).replace("\n", "").isprintable()
    json.loads(as_json(table))
