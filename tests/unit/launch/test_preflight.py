"""The host's preflight against composed hosts (tests/deploy/hosts/README.md), and against one change at a time."""

import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner

from adytum.deploy.launch import preflight
from adytum.deploy.launch.__main__ import main
from adytum.deploy.launch.config import load
from adytum.deploy.launch.host import Host
from adytum.inference.preflight.table import OK, UNKNOWN, WRONG

HOSTS = Path(__file__).parents[2] / "deploy" / "hosts"
FILE = Path(__file__).parents[3] / "deploy/launch/h100.toml"
GPU = "sys/bus/pci/devices/0000:21:00.0"
LOG = (HOSTS / "genoa-h100/log").read_text()


def verdicts(root: Path) -> dict[str, str]:
    return {row.key: row.verdict for row in preflight.rows(Host(root), load(FILE))}


def test_the_good_host_is_ready() -> None:
    found = preflight.rows(Host(HOSTS / "genoa-h100"), load(FILE))
    assert {row.key: row.verdict for row in found if row.verdict != OK} == {"vbios": UNKNOWN}
    assert preflight.ready(found)
    assert {row.found for row in found} >= {"51", "API 1.55 build 24", "1 to 99", "vfio-pci", "10.0.13"}


def test_a_host_as_delivered_is_told_everything_that_it_lacks() -> None:
    found = preflight.rows(Host(HOSTS / "genoa-as-delivered"), load(FILE))
    assert not preflight.ready(found)
    assert {row.key for row in found if row.verdict == WRONG} == {
        *("features", "kernel", "cmdline", "rmp", "snp", "asids", "sev", "iommu", "qemu", "memory", "memlock"),
        *("vfio", "binding", "group", "vbios"),
    }
    assert {row.key for row in found if row.verdict == UNKNOWN} == {"firmware", "cbitpos"}
    assert all(row.advice for row in found if row.verdict != OK)


def test_another_processor_is_refused() -> None:
    found = preflight.rows(Host(HOSTS / "xeon"), load(FILE))
    assert verdicts(HOSTS / "xeon")["cpu"] == WRONG
    assert not preflight.ready(found)


def test_of_an_empty_folder_nothing_is_ok(tmp_path: Path) -> None:
    found = preflight.rows(Host(tmp_path), load(FILE))
    assert [row.key for row in found if row.verdict == OK] == []
    assert not preflight.ready(found)


@pytest.mark.parametrize(
    ("path", "text", "key", "verdict", "says"),
    [
        ("proc/cpuinfo", "vendor_id: AuthenticAMD\ncpu family: 23\nmodel: 49\nflags: sev\n", "cpu", WRONG, "no SEV"),
        ("proc/cpuinfo", "vendor_id: AuthenticAMD\ncpu family: 25\nmodel: 1\nflags: sev\n", "features", WRONG, "SMEE"),
        ("proc/cpuinfo", None, "features", UNKNOWN, "/proc"),
        ("proc/sys/kernel/osrelease", "6.10.14\n", "kernel", WRONG, "6.11"),
        ("proc/sys/kernel/osrelease", "6.11.0\n", "kernel", OK, ""),
        ("proc/sys/kernel/osrelease", "5.19.0-rc6-snp-host\n", "kernel", WRONG, "6.11"),
        ("proc/sys/kernel/osrelease", "7.0.1\n", "kernel", OK, ""),
        ("proc/cmdline", "ro iommu=pt\n", "cmdline", WRONG, "iommu=pt"),
        ("proc/cmdline", "ro amd_iommu=off\n", "cmdline", WRONG, "amd_iommu=off"),
        ("proc/cmdline", "ro iommu.passthrough=1\n", "cmdline", WRONG, "passthrough"),
        ("proc/cmdline", "ro nosmt maxcpus=4\n", "cmdline", WRONG, "nosmt maxcpus=4"),
        ("proc/cmdline", "ro kvm_amd.sev_snp=0\n", "cmdline", WRONG, "sev_snp=0"),
        ("proc/cmdline", "ro iommu=nopt kvm_amd.sev=1\n", "cmdline", OK, ""),
        ("sys/module/kvm_amd/parameters/sev_snp", "N\n", "snp", WRONG, "rows"),
        ("sys/module/kvm_amd/parameters/sev_snp", None, "snp", WRONG, "6.11"),
        ("dev/sev", None, "sev", WRONG, "modprobe ccp"),
        ("dev/iommu", None, "vfio", WRONG, "modprobe iommufd"),
        ("cpuid/8000001f", None, "cbitpos", UNKNOWN, "modprobe cpuid"),
        ("cpuid/8000001f", "0 0 0 0\n", "cbitpos", UNKNOWN, "modprobe cpuid"),
        ("run/qemu-system-x86_64", "QEMU emulator version 9.1.5\n", "qemu", WRONG, "VFIO"),
        ("run/qemu-system-x86_64", "QEMU emulator version 9.2.0\n", "qemu", OK, ""),
        ("run/qemu-system-x86_64", None, "qemu", UNKNOWN, "install"),
        ("proc/meminfo", "MemAvailable:   1000000 kB\n", "memory", WRONG, "memory_gib"),
        ("proc/self/limits", "Max locked memory         65536    65536    bytes\n", "memlock", WRONG, "ulimit"),
        (f"{GPU}/vendor", None, "gpu", WRONG, "lspci"),
        (f"{GPU}/vendor", "0x1002\n", "gpu", WRONG, "lspci"),
        (f"{GPU}/class", "0x068000\n", "gpu", WRONG, "lspci"),
        (f"{GPU}/driver", None, "binding", WRONG, "vfio-pci"),
        (f"{GPU}/iommu_group/devices/0000:21:00.0", None, "group", UNKNOWN, "IOMMU"),
        ("log", None, "rmp", UNKNOWN, "root"),
        ("log", "\n", "iommu", UNKNOWN, "SEV-SNP Support"),
        ("log", "ccp 0000:46:00.5: SEV: memory encryption not enabled by BIOS\n", "smee", WRONG, "SMEE Enabled"),
        ("log", LOG.replace("API:1.55", "API:1.50"), "firmware", WRONG, "BIOS"),
        ("log", LOG.replace("API:1.55", "API:1.51"), "firmware", OK, ""),
        ("log", LOG + "AMD-Vi: SNP: IOMMU SNP feature not enabled, SNP cannot be supported.\n", "iommu", WRONG, "Auto"),
        ("log", LOG + "AMD-Vi: SNP: IOMMU is configured with V2 page table mode, SNP cannot be supported.\n", "iommu", WRONG, "pgtbl_v2"),  # noqa: E501
        ("log", LOG + "kvm_amd: SEV-SNP enabled (ASIDs 1 - 0)\n", "asids", WRONG, "ASID Space Limit"),
        ("log", LOG + "kvm_amd: SEV-SNP disabled (ASIDs 1 - 99)\n", "asids", WRONG, "RMP"),
    ],
)  # fmt: skip
def test_one_change(tmp_path: Path, path: str, text: str | None, key: str, verdict: str, says: str) -> None:
    root = tmp_path / "host"
    shutil.copytree(HOSTS / "genoa-h100", root, symlinks=True)
    if text is None:
        (root / path).unlink()
    else:
        (root / path).write_text(text)
    row = next(row for row in preflight.rows(Host(root), load(FILE)) if row.key == key)
    assert row.verdict == verdict
    assert says in row.advice + row.found
    assert preflight.ready(preflight.rows(Host(root), load(FILE))) == (verdict == OK)


def test_the_command(tmp_path: Path) -> None:
    def run(*arguments: str) -> tuple[int, str]:
        result = CliRunner().invoke(main, ["preflight", *arguments])
        return result.exit_code, result.output

    code, said = run(str(FILE), "--root", str(HOSTS / "genoa-h100"))
    assert (code, "ok" in said) == (0, True)
    code, said = run(str(FILE), "--root", str(HOSTS / "genoa-as-delivered"))
    assert code == 1
    assert "SNP Memory (RMP Table) Coverage Enabled" in said
    code, said = run("--root", str(HOSTS / "genoa-h100"))
    assert code == 0
    assert "QEMU" not in said
    # This machine, whatever it is: an answer, and no traceback.
    code, said = run(str(FILE))
    assert code in (0, 1)
    assert "kernel" in said
