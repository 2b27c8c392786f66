"""What QEMU and libvirt are told: word by word, by QEMU's own parser, and by libvirt's schema."""

import itertools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import time
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from click.testing import CliRunner
from lxml import etree

from adytum.deploy.launch import gpu, libvirt, qemu
from adytum.deploy.launch.__main__ import main
from adytum.deploy.launch.config import Config, LaunchError, check_measured, command_line, load
from tests.unit.launch.support import QEMU, SCHEMAS, write_machine

FILE = Path(__file__).parents[3] / "deploy/launch/h100.toml"


def test_the_command_line_word_by_word(tmp_path: Path) -> None:
    at = tmp_path
    config = write_machine(tmp_path)
    assert qemu.arguments(config, command_line(config), 51) == [
        "/usr/bin/qemu-system-x86_64",
        "-no-user-config",
        "-nodefaults",
        *("-display", "none"),
        "-no-reboot",
        *("-name", "test-1,debug-threads=on"),
        *("-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"),
        *("-accel", "kvm"),
        *("-machine", "q35,confidential-guest-support=sev0,memory-backend=ram0,vmport=off,hpet=off"),
        *("-cpu", "EPYC-v4,host-phys-bits=on"),
        *("-smp", "cpus=2,sockets=1,cores=2,threads=1"),
        *("-m", "1G"),
        *("-object", "memory-backend-memfd,id=ram0,size=1G,share=on,prealloc=off"),
        *("-object", "sev-snp-guest,id=sev0,policy=0x30000,cbitpos=51,reduced-phys-bits=1,kernel-hashes=on"),
        *("-bios", f"{at}/OVMF.fd"),
        *("-kernel", f"{at}/vmlinuz"),
        *("-initrd", f"{at}/initrd.img"),
        *("-append", "root=/dev/dm-0 roothash=00 swiotlb=32768"),
        *("-blockdev", f"driver=file,node-name=file0,filename={at}/root.raw,read-only=on"),
        *("-blockdev", "driver=raw,node-name=disk0,file=file0,read-only=on"),
        *("-device", "virtio-blk-pci,drive=disk0,serial=root,disable-legacy=on,iommu_platform=on"),
        *("-blockdev", f"driver=file,node-name=file1,filename={at}/model.img,read-only=on"),
        *("-blockdev", "driver=raw,node-name=disk1,file=file1,read-only=on"),
        *("-device", "virtio-blk-pci,drive=disk1,serial=model,disable-legacy=on,iommu_platform=on"),
        *("-netdev", "user,id=net0,ipv6=off,restrict=off,hostfwd=tcp:127.0.0.1:18443-:8443"),
        *("-device", "virtio-net-pci,netdev=net0,romfile=,disable-legacy=on,iommu_platform=on"),
        *("-fw_cfg", "name=opt/ovmf/X-PciMmio64Mb,string=262144"),
        *("-object", "iommufd,id=iommufd0"),
        *("-device", "pcie-root-port,id=port0,bus=pcie.0,chassis=1"),
        *("-device", "vfio-pci,host=0000:21:00.0,bus=port0,rombar=0,iommufd=iommufd0"),
        *("-serial", "none", "-monitor", "none"),
        *("-qmp", f"unix:{at}/test-1.qmp,server=on,wait=off"),
    ]


def test_the_file_in_the_repository_is_one() -> None:
    config = load(FILE)
    assert config.slabs == 524288
    assert config.gpus is not None


@pytest.mark.parametrize(
    ("line", "replaced", "says"),
    [
        ("vcpus = 16", "vcpus = 0", "vcpus"),
        ("vcpus = 16", "cpus = 16", "cpus"),
        ('name = "adytum-1"', 'name = "a,b"', "name"),
        ('"/srv/adytum/vmlinuz"', '"/srv/a,readonly=off"', "kernel"),
        ('"/srv/adytum/llama.img"', '"/srv/llama.img,cache=unsafe"', "image"),
        ('serial = "llama"', 'serial = "root"', "twice"),
        ('"0000:21:00.0"', '"21:00.0"', "devices"),
        ('"0000:21:00.0"', '"0000:21:00.0", "0000:21:00.0"', "twice"),
        ("outgoing = true", "", "outgoing"),
        ("[snp]", "[snp", "TOML"),
    ],
)
def test_a_bad_file_is_told(tmp_path: Path, line: str, replaced: str, says: str) -> None:
    text = FILE.read_text()
    assert line in text
    (tmp_path / "bad.toml").write_text(text.replace(line, replaced))
    with pytest.raises(LaunchError, match=says):
        load(tmp_path / "bad.toml")
    result = CliRunner().invoke(main, ["qemu", str(tmp_path / "bad.toml")])
    assert result.exit_code == 2
    assert "Traceback" not in result.output


def test_only_what_was_measured_is_launched(tmp_path: Path) -> None:
    config = write_machine(tmp_path)
    measurement = check_measured(config, command_line(config))
    assert measurement.hex() in (tmp_path / "measurements.json").read_text()
    for name, key in (("OVMF.fd", "firmware"), ("vmlinuz", "kernel"), ("initrd.img", "initrd")):
        data = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        with pytest.raises(LaunchError, match=f"boot.{key} is not what"):
            check_measured(config, command_line(config))
        (tmp_path / name).write_bytes(data)
    for changes, says in (
        ({"vcpus": 3}, "vcpus = 3"),
        ({"vcpu_type": "EPYC-Milan"}, "vcpu_type"),
        ({"boot": {**config.boot.model_dump(), "guest_policy": 0x20000}}, "guest_policy"),
        ({"boot": {**config.boot.model_dump(), "initrd": None}}, "initrd"),
        ({"boot": {**config.boot.model_dump(), "measurements": "absent.json"}}, "cannot be read"),
    ):
        with pytest.raises(LaunchError, match=says):
            check_measured(write_machine(tmp_path, **changes), command_line(config))
    with pytest.raises(LaunchError, match="cmdline_file"):
        check_measured(config, command_line(config) + " x")


@pytest.mark.parametrize("text", ["", "quiet", "swiotlb=1", "swiotlb=32768 swiotlb=1", "noswiotlb=32768", "a\nb"])
def test_swiotlb_has_to_be_on_the_measured_command_line(tmp_path: Path, text: str) -> None:
    config = write_machine(tmp_path)
    (tmp_path / "cmdline").write_text(text)
    with pytest.raises(LaunchError, match=r"swiotlb=32768|one line"):
        command_line(config)


@pytest.mark.parametrize("text", ["swiotlb=32768", "a swiotlb=32768,force b\n"])
def test_swiotlb_is_found(tmp_path: Path, text: str) -> None:
    config = write_machine(tmp_path)
    (tmp_path / "cmdline").write_text(text)
    assert command_line(config) == text.strip()


# QEMU itself


def ask(*arguments: str) -> str:
    """What QEMU prints. Skips if QEMU is missing."""
    if QEMU is None:
        pytest.skip("needs QEMU: apt-get install qemu-system-x86")
    done = subprocess.run([QEMU, *arguments], capture_output=True, text=True, timeout=30)
    return done.stdout + done.stderr


def version() -> tuple[int, int]:
    found = re.search(r"version (\d+)\.(\d+)", ask("--version"))
    assert found is not None
    return int(found[1]), int(found[2])


def options(arguments: list[str], option: str) -> list[str]:
    """The values of each `option`."""
    return [value for name, value in itertools.pairwise(arguments) if name == option]


def test_qemu_knows_every_property_of_every_device_and_object(tmp_path: Path) -> None:
    known_devices = ask("-device", "help")
    arguments = qemu.arguments(write_machine(tmp_path), "", 51)
    left_out: list[str] = []
    for option, values in (("-device", options(arguments, "-device")), ("-object", options(arguments, "-object"))):
        for value in values:
            kind, *properties = value.split(",")
            said = ask(option, f"{kind},help")
            if kind in ("sev-snp-guest", "iommufd") and version() < (9, 1):
                left_out.append(kind)
                continue
            if kind == "vfio-pci" and version() < (9, 1):
                properties = [item for item in properties if not item.startswith("iommufd=")]
            assert option == "-object" or f'"{kind}"' in known_devices
            names = {match[1] for match in re.finditer(r"^  ([a-z0-9_-]+)=", said, re.MULTILINE)}
            # Of every device and object, whatever its own list says.
            names |= {"id", "bus"}
            # 10.0's help shows the properties of the class itself: these two are of its parent.
            if kind == "sev-snp-guest":
                names |= {"cbitpos", "reduced-phys-bits"}
            if kind != "iommufd":
                assert {item.split("=")[0] for item in properties} <= names, value
    if left_out:
        pytest.skip(f"the rest is known; QEMU {version()} has no {', '.join(left_out)}: ADYTUM_QEMU names another")


def running(arguments: list[str], socket_path: Path) -> str:
    """Starts QEMU and asks it to end as soon as it answers. What it printed; empty for one that took everything."""
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        deadline = time.monotonic() + 30
        while process.poll() is None and time.monotonic() < deadline:
            try:
                with socket.socket(socket.AF_UNIX) as link:
                    link.settimeout(10)
                    link.connect(str(socket_path))
                    stream = link.makefile("rw")
                    assert "QMP" in json.loads(stream.readline())
                    for command in ("qmp_capabilities", "quit"):
                        stream.write(json.dumps({"execute": command}) + "\n")
                        stream.flush()
                        # Events may come before the answer; QEMU may be gone before it is read.
                        answers = (json.loads(line) for line in stream)
                        assert command == "quit" or any("return" in answer for answer in answers)
                break
            except (FileNotFoundError, ConnectionRefusedError):
                time.sleep(0.05)
        said, _ = process.communicate(timeout=30)
        return said if process.returncode == 0 else said or f"it ended with {process.returncode}"
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            process.wait()


def test_qemu_takes_the_confidential_guest(tmp_path: Path) -> None:
    """The object by itself, without a machine that would start it: every value is parsed and set."""
    if version() < (9, 1):
        pytest.skip(f"QEMU {version()} has no SEV-SNP; ADYTUM_QEMU names another")
    assert QEMU is not None
    guest = qemu.snp_guest(write_machine(tmp_path), 51)
    base = [
        QEMU,
        "-machine",
        "none",
        "-nodefaults",
        "-display",
        "none",
        "-S",
        "-qmp",
        f"unix:{tmp_path}/q,server=on,wait=off",
    ]
    assert running([*base, "-object", guest], tmp_path / "q") == ""
    for wrong in (guest.replace("0x30000", "strict"), guest.replace("hashes=on", "hashes=maybe"), guest + ",secret=1"):
        assert running([*base, "-object", wrong], tmp_path / "q") != ""


def test_qemu_takes_everything_that_it_can_take_without_sev(tmp_path: Path) -> None:
    """The whole command, in software emulation: without the confidential guest, KVM and the GPU, of which there are
    none here. The machine is made and stays stopped."""
    assert version()
    config = write_machine(tmp_path, gpus=None, qemu=QEMU)
    arguments = qemu.arguments(config, command_line(config), 51)
    changed = [
        value.replace("confidential-guest-support=sev0,", "").replace(",host-phys-bits=on", "") for value in arguments
    ]
    changed[changed.index("-accel") + 1] = "tcg"
    if version() < (8, 1):
        # The one thing of the command that 7.2 is too old for; EPYC-v3 has the same signature.
        changed = [value.replace("EPYC-v4", "EPYC-v3") for value in changed]
    at = next(place for place, value in enumerate(changed) if value.startswith("sev-snp-guest"))
    del changed[at - 1 : at + 1]
    assert len(arguments) - len(changed) == 2
    socket_path = Path(config.run_folder) / "test-1.qmp"
    said = running([*changed, "-S"], socket_path)
    # TCG lacks features of the processor, and says so.
    assert [line for line in said.splitlines() if "TCG doesn't support requested feature" not in line] == []
    broken = [value.replace("read-only=on", "read-only=perhaps") for value in changed]
    assert "read-only" in running([*broken, "-S"], socket_path)


# libvirt


@pytest.fixture(scope="module")
def schema() -> etree.RelaxNG:
    path = SCHEMAS / "domain.rng"
    if not path.exists():
        pytest.skip("needs libvirt's schemas: apt-get install libvirt-common (Debian 13)")
    if "sev-snp" not in (SCHEMAS / "domaincommon.rng").read_text():
        pytest.skip(f"the schemas in {SCHEMAS} are of a libvirt before 10.5, without SEV-SNP")
    return etree.RelaxNG(etree.parse(path))


@pytest.mark.parametrize("changes", [{}, {"gpus": None}])
def test_libvirts_schema_takes_the_domain(schema: etree.RelaxNG, tmp_path: Path, changes: dict[str, object]) -> None:
    config = write_machine(tmp_path, **changes)
    domain = etree.fromstring(libvirt.domain(config, command_line(config), 51))
    schema.assertValid(domain)
    for path, name in (("launchSecurity", "type"), ("devices/disk", "device"), ("os/loader", "type")):
        changed = etree.fromstring(etree.tostring(domain))
        changed.find(path).set(name, "nothing")
        assert not schema.validate(changed), path


def test_the_domain_says_what_the_command_line_says(tmp_path: Path) -> None:
    config = write_machine(tmp_path)
    domain = ET.fromstring(libvirt.domain(config, command_line(config), 51))

    def text(path: str) -> str | None:
        found = domain.find(path)
        assert found is not None, path
        return found.text

    assert text("os/cmdline") == command_line(config)
    assert text("os/loader") == config.boot.firmware
    assert text("launchSecurity/policy") == "0x30000"
    assert text("launchSecurity/cbitpos") == "51"
    assert text("cpu/model") == "EPYC-v4"
    assert text("vcpu") == "2"
    assert text("sysinfo/entry") == "262144"
    security, disks = domain.find("launchSecurity"), domain.findall("devices/disk")
    assert security is not None
    assert security.attrib == {"type": "sev-snp", "kernelHashes": "yes"}
    assert [disk.find("readonly") is not None for disk in disks] == [True, True]
    assert domain.find("devices/vsock") is None
    assert domain.find("devices/graphics") is None
    address = domain.find("devices/hostdev/source/address")
    assert address is not None
    assert list(address.attrib.values()) == ["0x0000", "0x21", "0x00", "0x0"]
    closed = write_machine(tmp_path, network={**config.network.model_dump(), "outgoing": False})
    with pytest.raises(LaunchError, match="outgoing"):
        libvirt.domain(closed, "", 51)
    assert "restrict=on" in " ".join(qemu.arguments(closed, "", 51))


# NVIDIA's tool: a script that behaves like it, as its output in NVIDIA/gpu-admin-tools issue 13 shows it.

TOOL = """import sys, pathlib
state = pathlib.Path(__file__).with_name("mode")
mode = state.read_text()
print("NVIDIA GPU Tools version v2025.07.21o")
device = next(a for a in sys.argv if a.startswith("--gpu-bdf=")).removeprefix("--gpu-bdf=")
head = f"2025-09-16,12:34:15.925 INFO     GPU 0000:{device} H100 0x2331 BAR0 0x7e042000000"
if mode == "broken":
    sys.exit("gpu.error.FspRpcError")
if "--set-cc-mode=on" in sys.argv:
    assert "--reset-after-cc-mode-switch" in sys.argv
    if mode != "stuck":
        state.write_text("on")
    print(head + " CC mode set to on. It will be active after GPU reset.")
if "--query-cc-mode" in sys.argv:
    said = "off" if mode == "stuck" else "invalid-devtools-only-fix-by-setting-cc-mode" if mode == "invalid" else mode
    if mode != "silent":
        print(head + " CC mode is " + said)
"""


@pytest.fixture
def nvidia(tmp_path: Path) -> Config:
    config = write_machine(tmp_path)
    (tmp_path / "nvidia_gpu_tools.py").write_text(TOOL)
    (tmp_path / "mode").write_text("off")
    return config


def test_cc_mode(nvidia: Config, tmp_path: Path) -> None:
    assert gpu.query(nvidia) == {"0000:21:00.0": "off"}
    with pytest.raises(LaunchError, match="is off"):
        gpu.require_on(nvidia)
    gpu.switch_on(nvidia)
    assert gpu.query(nvidia) == {"0000:21:00.0": "on"}
    for mode, says in (
        ("devtools", "is devtools"),
        ("invalid", "does not report"),
        ("silent", "does not report"),
        ("broken", "FspRpcError"),
    ):
        (tmp_path / "mode").write_text(mode)
        with pytest.raises(LaunchError, match=says):
            gpu.require_on(nvidia)
    (tmp_path / "mode").write_text("stuck")
    with pytest.raises(LaunchError, match="is off"):
        gpu.switch_on(nvidia)
    with pytest.raises(LaunchError, match="no \\[gpus\\]"):
        gpu.query(write_machine(tmp_path, gpus=None))


def toml(config: Config, path: Path) -> Path:
    """`config` as a file, like the one in the repository."""
    boot, gpus = config.boot, config.gpus
    assert gpus is not None
    disks = "".join(f'[[disk]]\nimage = "{disk.image}"\nserial = "{disk.serial}"\n' for disk in config.disk)
    path.write_text(f"""
name = "{config.name}"
qemu = "{config.qemu}"
vcpus = {config.vcpus}
memory_gib = {config.memory_gib}
swiotlb_mib = {config.swiotlb_mib}
run_folder = "{config.run_folder}"
[boot]
firmware = "{boot.firmware}"
kernel = "{boot.kernel}"
initrd = "{boot.initrd}"
cmdline_file = "{boot.cmdline_file}"
measurements = "{boot.measurements}"
[snp]
cbitpos = 51
{disks}
[network]
port = {config.network.port}
guest_port = 8443
outgoing = true
[gpus]
devices = ["{gpus.devices[0]}"]
admin_tool = "{gpus.admin_tool}"
""")
    return path


def test_the_commands(nvidia: Config, tmp_path: Path) -> None:
    file = toml(nvidia, tmp_path / "vm.toml")
    assert load(file) == nvidia

    def run(*arguments: str) -> tuple[int, str]:
        result = CliRunner().invoke(main, [*arguments[:1], str(file), *arguments[1:]])
        assert result.exception is None or isinstance(result.exception, SystemExit)
        return result.exit_code, result.output

    assert run("cc-mode") == (0, "0000:21:00.0  off\n")
    assert run("cc-mode", "--set-on") == (0, "0000:21:00.0  on\n")
    code, said = run("qemu")
    assert code == 0
    assert "sev-snp-guest,id=sev0" in said
    code, said = run("libvirt")
    assert code == 0
    assert said.startswith("<domain")
    # No SEV-SNP here: the preflight stops it, and QEMU is never reached.
    code, said = run("start")
    assert code == 1
    assert "this host cannot start the machine" in said
    shutil.rmtree(tmp_path / "nowhere", ignore_errors=True)
    (tmp_path / "vmlinuz").write_bytes(b"another")
    for command in ("qemu", "libvirt", "start"):
        code, said = run(command)
        assert code == 2
        assert "boot.kernel is not what" in said


@pytest.mark.skipif(not os.access("/dev/sev", os.R_OK), reason="needs an SEV-SNP host (/dev/sev)")
def test_a_host_with_snp_is_ready() -> None:
    result = CliRunner().invoke(main, ["preflight"])
    assert result.exit_code == 0, result.output
