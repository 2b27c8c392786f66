"""A machine to launch: small files that QEMU takes for firmware, kernel and disks, measured for real."""

import os
import shutil
import struct
from pathlib import Path

import pytest

from adytum.attestation.reference.measurements import Measurements
from adytum.deploy.launch.config import Config
from tests.unit.attestation.reference.launch import firmware

QEMU = os.environ.get("ADYTUM_QEMU") or shutil.which("qemu-system-x86_64")
"""ADYTUM_QEMU and ADYTUM_LIBVIRT_SCHEMAS name newer ones than the system's."""
SCHEMAS = Path(os.environ.get("ADYTUM_LIBVIRT_SCHEMAS") or "/usr/share/libvirt/schemas")


def kernel() -> bytes:
    """The header of a Linux bzImage (Documentation/arch/x86/boot.rst), protocol 2.12, and nothing to run."""
    data = bytearray(16 * 512)
    data[0x1F1] = 4
    data[0x1FE:0x200] = b"\x55\xaa"
    data[0x200:0x206] = b"\xeb\x66HdrS"
    struct.pack_into("<H", data, 0x206, 0x20C)
    data[0x211] = 1
    struct.pack_into("<I", data, 0x22C, 0x7FFFFFFF)
    struct.pack_into("<H", data, 0x236, 0x3)
    struct.pack_into("<I", data, 0x238, 2047)
    return bytes(data)


def write_machine(folder: Path, **changes: object) -> Config:
    """Files in `folder`, and the configuration for them. `changes` replace top-level keys."""
    cmdline = "root=/dev/dm-0 roothash=00 swiotlb=32768"
    for name, data in (
        ("OVMF.fd", firmware.end(size=65536)),
        ("vmlinuz", kernel()),
        ("initrd.img", b"initrd" * 100),
        ("cmdline", cmdline.encode() + b"\n"),
        ("root.raw", bytes(1 << 20)),
        ("model.img", bytes(1 << 20)),
    ):
        (folder / name).write_bytes(data)
    (folder / "measurements.json").write_bytes(measured(folder, cmdline).encode())
    at = {name: str(folder / name) for name in ("OVMF.fd", "vmlinuz", "initrd.img", "cmdline", "measurements.json")}
    values: dict[str, object] = {
        "name": "test-1",
        "vcpus": 2,
        "memory_gib": 1,
        "swiotlb_mib": 64,
        "run_folder": str(folder),
        "boot": {
            "firmware": at["OVMF.fd"],
            "kernel": at["vmlinuz"],
            "initrd": at["initrd.img"],
            "cmdline_file": at["cmdline"],
            "measurements": at["measurements.json"],
        },
        "snp": {"cbitpos": 51},
        "disk": [
            {"image": str(folder / "root.raw"), "serial": "root"},
            {"image": str(folder / "model.img"), "serial": "model"},
        ],
        "network": {"port": 18443, "guest_port": 8443, "outgoing": True},
        "gpus": {"devices": ["0000:21:00.0"], "admin_tool": str(folder / "nvidia_gpu_tools.py")},
    }
    return Config(**(values | changes))


def measured(folder: Path, cmdline: str) -> Measurements:
    pytest.importorskip("sevsnpmeasure", reason="needs sev-snp-measure: pip install 'adytum[deploy]'")
    from adytum.attestation.reference.launch import Launch, measure

    launch = Launch(folder / "OVMF.fd", folder / "vmlinuz", folder / "initrd.img", cmdline, "EPYC-v4")
    return measure(launch, [2, 4])
