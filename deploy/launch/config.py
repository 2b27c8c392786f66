"""One TOML file describes the machine; QEMU's command line and libvirt's domain are both made from it (README.md)."""

import hashlib
import re
import tomllib
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from adytum.attestation.core.errors import PolicyFileError
from adytum.attestation.reference.measurements import Input, Measurements

_SLAB = 2048
"""Bytes of one swiotlb slab, the unit of the kernel's parameter."""
# A comma would end QEMU's value and begin another option; white space and quotes are not allowed either.
_PATH = r"^[A-Za-z0-9._/+@:=-]+$"

Name = Annotated[str, StringConstraints(pattern="^[a-z0-9][a-z0-9-]{0,31}$")]
FilePath = Annotated[str, StringConstraints(pattern=_PATH)]
PciAddress = Annotated[str, StringConstraints(pattern="^[0-9a-f]{4}:[0-9a-f]{2}:[01][0-9a-f][.][0-7]$")]
Port = Annotated[int, Field(ge=1, le=65535)]


class LaunchError(Exception):
    """The file, or an input that it names, cannot be launched as it is. The message says what to change."""


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Boot(_Part):
    """The inputs of the launch measurement."""

    firmware: FilePath
    kernel: FilePath
    initrd: FilePath | None = None
    cmdline_file: FilePath
    guest_policy: int = 0x30000
    measurements: FilePath
    """The output of `adytum measure`: nothing else is started."""


class Snp(_Part):
    cbitpos: int | Literal["cpuid"] = Field(default="cpuid")
    """Position of the encryption bit: 51 on Milan and Genoa; `cpuid` asks the processor (CPUID 8000001F, EBX 5:0)."""
    reduced_phys_bits: int = Field(default=1, ge=1, le=63)
    """Bits of the address width that a guest loses: the encryption bit."""


class Disk(_Part):
    """A read-only image with its hash tree; the root hash is on the measured command line or in the manifest."""

    image: FilePath
    serial: Name


class Network(_Part):
    listen: Annotated[str, StringConstraints(pattern=r"^[0-9.]{7,15}$")] = "127.0.0.1"
    port: Port
    guest_port: Port
    outgoing: bool
    """Whether the guest may open connections: it fetches vendors' collateral unless the host supplies it."""


class Gpus(_Part):
    devices: tuple[PciAddress, ...] = Field(min_length=1, max_length=8)
    iommufd: bool = True
    mmio64_mib: int = Field(default=262144, ge=1)
    """Room for the GPUs' memory windows above 4 GiB; an H100 has one of 128 GiB."""
    admin_tool: FilePath
    """NVIDIA's nvidia_gpu_tools.py."""


class Config(_Part):
    """A whole file."""

    name: Name
    qemu: FilePath = "/usr/bin/qemu-system-x86_64"
    vcpus: int = Field(ge=1, le=512)
    vcpu_type: Annotated[str, StringConstraints(pattern="^EPYC[A-Za-z0-9-]*$")] = "EPYC-v4"
    memory_gib: int = Field(ge=1, le=8192)
    swiotlb_mib: int = Field(ge=64, le=65536)
    """Memory that the guest shares with devices. The measured command line must contain it too."""
    run_folder: FilePath = "/run/adytum"
    """For QEMU's control socket."""
    boot: Boot
    snp: Snp = Snp()
    disk: tuple[Disk, ...] = Field(min_length=1, max_length=16)
    network: Network
    gpus: Gpus | None = None

    @model_validator(mode="after")
    def _distinct(self) -> Self:
        for what, values in (
            ("disk.serial", [disk.serial for disk in self.disk]),
            ("gpus.devices", list(self.gpus.devices) if self.gpus else []),
        ):
            if len(set(values)) != len(values):
                raise ValueError(f"{what} has the same value twice")
        return self

    @property
    def slabs(self) -> int:
        """The kernel parameter `swiotlb=` for `swiotlb_mib`."""
        return self.swiotlb_mib * 1024 * 1024 // _SLAB


def load(path: Path) -> Config:
    """Reads a file. Raises `LaunchError`."""
    try:
        return Config(**tomllib.loads(path.read_text("utf-8")))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise LaunchError(f"{path} cannot be read as TOML: {error}") from error
    except ValidationError as error:
        lines = "; ".join(f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors())
        raise LaunchError(f"{path}: {lines}") from error


def command_line(config: Config) -> str:
    """The kernel's command line. Raises `LaunchError` if it cannot be the measured one."""
    path = config.boot.cmdline_file
    try:
        text = Path(path).read_text("ascii").removesuffix("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise LaunchError(f"boot.cmdline_file {path} cannot be read as ASCII text: {error}") from error
    if "\n" in text or not text.isprintable():
        raise LaunchError(f"boot.cmdline_file {path} is not one line")
    found = re.findall(r"(?:^| )swiotlb=([0-9]+)(?= |,|$)", text)
    if found != [str(config.slabs)]:
        raise LaunchError(
            f"swiotlb_mib = {config.swiotlb_mib} needs swiotlb={config.slabs} on the measured command line, which has "
            f"{' '.join(found) or 'none'}: write it into {path} and measure again"
        )
    return text


def check_measured(config: Config, cmdline: str) -> bytes:
    """The measurement of this launch, 48 bytes. Raises `LaunchError` if an input is not the measured one."""
    path = Path(config.boot.measurements)
    try:
        measured = Measurements.load(path)
    except PolicyFileError as error:
        raise LaunchError(str(error)) from error
    again = "run `adytum measure` again, or launch what was measured: clients refuse anything else"
    initrd = None if config.boot.initrd is None else _input(config.boot.initrd)
    for what, found, wanted in (
        ("boot.firmware", _input(config.boot.firmware), measured.firmware),
        ("boot.kernel", _input(config.boot.kernel), measured.kernel),
        ("boot.initrd", initrd, measured.initrd),
        ("boot.cmdline_file", cmdline, measured.cmdline),
        ("vcpu_type", config.vcpu_type, measured.vcpu_type),
        ("boot.guest_policy", config.boot.guest_policy, measured.guest_policy),
    ):
        if found != wanted:
            raise LaunchError(f"{what} is not what {path} measured; {again}")
    if config.vcpus not in measured.by_vcpus:
        listed = ", ".join(map(str, sorted(measured.by_vcpus)))
        raise LaunchError(f"vcpus = {config.vcpus} is not in {path}, which has {listed}; {again}")
    return measured.by_vcpus[config.vcpus]


def _input(name: str) -> Input:
    path = Path(name)
    try:
        with path.open("rb") as file:
            return Input(path.stat().st_size, hashlib.file_digest(file, "sha256").digest())
    except OSError as error:
        raise LaunchError(f"{name} cannot be read: {error.strerror}") from error
