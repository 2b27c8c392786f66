"""The host as the preflight sees it: files below a folder, the kernel's log, versions of programs. Changes nothing."""

import os
import re
import struct
import subprocess
from dataclasses import dataclass
from pathlib import Path

_READ_LIMIT = 4 * 1024 * 1024
_SECONDS = 20.0
_ENCRYPTION_LEAF = 0x8000001F
"""AMD's manual, volume 3, appendix E.4.17: encrypted memory capabilities."""


@dataclass(frozen=True)
class Host:
    """The source of the facts. A recorded host is a folder with the same files, and in it `log` (dmesg),
    `run/<program>` (its output for --version) and `cpuid/8000001f` (four hexadecimal words)."""

    root: Path = Path("/")

    @property
    def recorded(self) -> bool:
        """Whether this is a recorded host instead of the running one."""
        return self.root != Path("/")

    def text(self, path: str) -> str | None:
        """The beginning of a text file (4 MiB); None if it cannot be read."""
        try:
            with (self.root / path).open("rb") as file:
                return file.read(_READ_LIMIT).decode("utf-8", "replace")
        except OSError:
            return None

    def has(self, path: str) -> bool:
        """Whether the file or folder exists."""
        return (self.root / path).exists()

    def names(self, path: str) -> list[str] | None:
        """The names in a folder; None if it cannot be read."""
        try:
            return sorted(os.listdir(self.root / path))
        except OSError:
            return None

    def link(self, path: str) -> str | None:
        """The last part of a symbolic link's target; None if there is no link."""
        try:
            return Path(os.readlink(self.root / path)).name
        except OSError:
            return None

    def log(self) -> str | None:
        """The kernel's log since the start; None if it cannot be read."""
        return self.text("log") if self.recorded else _output(["dmesg"])

    def version(self, program: str) -> str | None:
        """The program's output for --version; None if it cannot be run."""
        return self.text(f"run/{Path(program).name}") if self.recorded else _output([program, "--version"])

    def cbitpos(self) -> int | None:
        """The encryption bit's position, from the processor; needs the module `cpuid` and root."""
        if self.recorded:
            return _bit(self.text("cpuid/8000001f"))
        try:
            with (self.root / "dev/cpu/0/cpuid").open("rb", buffering=0) as file:
                found = os.pread(file.fileno(), 16, _ENCRYPTION_LEAF)
        except OSError:
            return None
        return _position(struct.unpack("<4I", found)[1]) if len(found) == 16 else None


def _position(ebx: int) -> int | None:
    return ebx & 0x3F or None


def _bit(recorded: str | None) -> int | None:
    """From eax, ebx, ecx and edx as hexadecimal words."""
    words = (recorded or "").split()
    if len(words) != 4 or not all(re.fullmatch("[0-9a-f]{8}", word) for word in words):
        return None
    return _position(int(words[1], 16))


def _output(command: list[str]) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, timeout=_SECONDS, check=False)  # noqa: S603 - ours
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.decode("utf-8", "replace") if done.returncode == 0 else None


def field(text: str | None, name: str) -> str | None:
    """A field of the first entry of a file like /proc/cpuinfo."""
    found = re.search(rf"^{re.escape(name)}[ \t]*:[ \t]*(.*)$", text or "", re.MULTILINE)
    return found[1].strip() if found else None
