"""The source of the facts: files below a folder, and the NVIDIA driver. Reads, and changes nothing."""

import os
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from adytum.attestation.nvidia.device import GpuInfo, NvidiaGpus

_READ_LIMIT = 64 * 1024


def nvidia() -> tuple[GpuInfo, ...]:
    """What the NVIDIA driver reports of each GPU. Raises `CollectionError`."""
    return NvidiaGpus().facts()


@dataclass(frozen=True)
class Probe:
    """The source of the facts."""

    gpus: Callable[[], Sequence[GpuInfo]] = nvidia
    """Raises `CollectionError`."""
    root: Path = Path("/")
    """Holds /proc, /sys, /dev and /etc. Tests use it to pose as another machine."""

    def text(self, path: str) -> str | None:
        """The beginning of a text file (64 KiB); None if it cannot be read."""
        try:
            with (self.root / path).open("rb") as file:
                return file.read(_READ_LIMIT).decode("utf-8", "replace")
        except OSError:
            return None

    def has(self, path: str) -> bool:
        """Whether the file or folder exists."""
        try:
            return (self.root / path).exists()
        except OSError:
            return False

    def names(self, path: str) -> list[str] | None:
        """The names in a folder; None if it cannot be read."""
        try:
            return sorted(os.listdir(self.root / path))
        except OSError:
            return None

    def cpuid(self, leaf: int) -> tuple[int, int, int, int] | None:
        """(eax, ebx, ecx, edx) from the kernel's cpuid device, which needs root; None if it cannot be read."""
        try:
            with (self.root / "dev/cpu/0/cpuid").open("rb", buffering=0) as file:
                found = os.pread(file.fileno(), 16, leaf)
        except OSError:
            return None
        if len(found) != 16:
            return None
        eax, ebx, ecx, edx = struct.unpack("<4I", found)
        return eax, ebx, ecx, edx
