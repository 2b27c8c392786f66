"""What a folder lies on: memory, dm-verity, or a disk whose owner can change a file after it was checked.

1. The mount of the folder is found in /proc/self/mountinfo, as the kernel's path walk finds it.
2. A block device is followed through /sys/dev/block: a device-mapper device, or all the devices below it, must be
   dm-verity with one root hash. Under a snapshot lies a second device that is not.
3. The kernel is asked for the active table (ioctl DM_TABLE_STATUS, which needs CAP_SYS_ADMIN), because sysfs shows
   neither the root hash nor the options that weaken verity.

Formats: proc_pid_mountinfo(5), the kernel's admin-guide/device-mapper/verity.rst and uapi/linux/dm-ioctl.h.
"""

import errno
import fcntl
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

_CONTROL = "/dev/mapper/control"
# struct dm_ioctl: version, data_size, data_start, target_count, open_count, flags, event_nr, padding, dev, name, uuid.
_DM_IOCTL = struct.Struct("<3IIIIiIIIQ128s129s7x")
_DM_TARGET = struct.Struct("<QQiI16s")
_DM_TABLE_STATUS = 0xC000FD0C | _DM_IOCTL.size << 16
_DM_STATUS_TABLE = 1 << 4
_DM_BUFFER_FULL = 1 << 8
_BUFFER = 16 * 1024

_SWAPPABLE = ("tmpfs", "rootfs")
_VERITY_UUID = "CRYPT-VERITY-"
_WEAK = {
    "ignore_corruption": "reads corrupt blocks",
    "check_at_most_once": "checks a block the first time only",
}
"""Options of dm-verity with which a block that is read could differ from the one that was checked."""


class StorageError(Exception):
    """The kernel gives no answer. The text says why."""


@dataclass(frozen=True)
class Target:
    """One line of a device-mapper table: the target's type, its parameters, and its status ("V": no corruption yet)."""

    type: str
    parameters: str
    status: str


Tables = Callable[[int, int], tuple[Target, ...]]
"""The active table of the device-mapper device with this major and minor number. Raises `StorageError`."""


@dataclass(frozen=True)
class Storage:
    """What a folder lies on. `root_hash` (hexadecimal) is dm-verity's; `reason` says why it is not protected."""

    kind: Literal["memory", "verity", "other"]
    filesystem: str
    device: str
    root_hash: str | None = None
    reason: str = ""

    @property
    def protected(self) -> bool:
        """Whether a second read returns what the first returned, whatever the owner of the disk does."""
        return self.kind != "other"

    @property
    def place(self) -> str:
        """The end of a sentence that begins "the folder is"."""
        device = f"{self.filesystem} on {self.device}"
        if self.kind == "memory":
            return f"in memory ({self.filesystem})"
        if self.kind == "verity":
            return f"on dm-verity ({device}, root hash {self.root_hash})"
        return f"{self.reason or 'on an ordinary disk'} ({device})"

    def says(self) -> str:
        """One or two sentences for the log and for `/readyz`."""
        if self.kind == "memory":
            return f"the folder is {self.place}: what is checked is what the engine reads."
        if self.kind == "verity":
            return f"the folder is {self.place}: the kernel checks every read."
        return (
            f"the folder is {self.place}: the host could change it after the check. "
            "Use the verity image (docs/explanation/weights.md) or memory."
        )


def where(folder: Path, root: Path = Path("/"), tables: Tables | None = None) -> Storage:
    """What `folder` lies on; "other" if that cannot be found out.

    `root` is where proc and sys are found, `tables` reads device-mapper tables: arguments for tests.
    """
    top = folder.resolve()
    try:
        mounts = _mounts((root / "proc/self/mountinfo").read_text(errors="surrogateescape"))
        mount = _mount_of(top, mounts)
        swaps = (root / "proc/swaps").read_text().splitlines()[1:] if mount.filesystem in _SWAPPABLE else []
    except (OSError, ValueError) as error:
        return Storage("other", "unknown", "an unknown device", reason=f"on an unknown mount ({error})")
    inside = [other for other in mounts if top in other.point.parents]
    if inside:
        return _other(mount, f"crossed by another mount ({inside[0].point.name})")
    if mount.filesystem == "ramfs" or (mount.filesystem in _SWAPPABLE and "noswap" in mount.options):
        return Storage("memory", mount.filesystem, mount.source)
    if mount.filesystem in _SWAPPABLE:
        if swaps:
            return _other(mount, f"in memory that may be swapped to {swaps[0].split()[0]}")
        return Storage("memory", mount.filesystem, mount.source)
    try:
        found = _verity_below(root / "sys/dev/block" / mount.number, tables or read_table)
    except PermissionError as error:
        return _other(mount, f"on a device that this process may not look at ({error})")
    except (StorageError, OSError, ValueError, IndexError) as error:
        return _other(mount, f"on dm-verity, but its root hash is unknown ({error})")
    if found is None:
        return _other(mount, "")
    if found.weakness:
        return _other(mount, f"on dm-verity that {found.weakness}")
    return Storage("verity", mount.filesystem, mount.source, found.root_hash)


def read_table(major: int, minor: int) -> tuple[Target, ...]:
    """The active table of a device-mapper device, from the kernel. Raises `StorageError`."""
    try:
        with open(_CONTROL, "r+b", buffering=0) as control:
            tables = _table_status(control.fileno(), major, minor, _DM_STATUS_TABLE)
            states = _table_status(control.fileno(), major, minor, 0)
    except OSError as error:
        why = "it needs CAP_SYS_ADMIN" if error.errno in (errno.EACCES, errno.EPERM) else error.strerror
        raise StorageError(f"{_CONTROL}: {why}") from error
    return tuple(Target(kind, text, state) for (kind, text), (_, state) in zip(tables, states, strict=True))


@dataclass(frozen=True)
class _Mount:
    id: str
    parent: str
    number: str
    point: Path
    filesystem: str
    source: str
    options: frozenset[str]


@dataclass(frozen=True)
class _Verity:
    root_hash: str
    weakness: str


def _other(mount: _Mount, reason: str) -> Storage:
    return Storage("other", mount.filesystem, mount.source, reason=reason)


def _mounts(text: str) -> list[_Mount]:
    mounts = []
    for line in text.splitlines():
        before, _, after = line.partition(" - ")
        number, parent, device, _, point, options, *_ = before.split(" ")
        filesystem, source, more = after.split(" ", 2)
        every = frozenset(options.split(",")) | frozenset(more.split(","))
        mounts.append(_Mount(number, parent, device, Path(_plain(point)), filesystem, _plain(source), every))
    return mounts


def _plain(text: str) -> str:
    """Decodes the octal escapes for space, tab, newline and backslash."""
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), text)


def _mount_of(path: Path, mounts: list[_Mount]) -> _Mount:
    """The mount in which a path walk ends: a later mount on the same place, or over a parent, hides others."""
    ids = {mount.id for mount in mounts}
    below = {(mount.parent, mount.point): mount for mount in mounts}
    # An initramfs is its own parent.
    tops = [mount for mount in mounts if mount.point == Path("/") and mount.parent not in ids - {mount.id}]
    if not tops:
        raise ValueError("no root mount")
    current = tops[0]
    for place in [*reversed(path.parents), path]:
        while (upper := below.get((current.id, place))) is not None and upper is not current:
            current = upper
    return current


def _verity_below(device: Path, tables: Tables) -> _Verity | None:
    """The verity that protects a block device, or None."""
    if not (device / "dm").is_dir():
        return None
    uuid = (device / "dm/uuid").read_text().strip()
    if not uuid.startswith(_VERITY_UUID):
        found = {_verity_below(device.parent / _number(slave), tables) for slave in (device / "slaves").iterdir()}
        return found.pop() if len(found) == 1 else None
    major, minor = _number(device).split(":")
    targets = tables(int(major), int(minor))
    if len(targets) != 1 or targets[0].type != "verity":
        return None
    # <version> <dev> <hash_dev> <data block> <hash block> <blocks> <start> <algorithm> <digest> <salt> [<n> <options>]
    words = targets[0].parameters.split()
    weak = [text for option, text in _WEAK.items() if option in words[10:]]
    if targets[0].status[:1] != "V":
        weak.append("has met a corrupt block")
    return _Verity(words[8].lower(), ", ".join(weak))


def _number(device: Path) -> str:
    return (device / "dev").read_text().strip()


def _table_status(control: int, major: int, minor: int, flags: int) -> list[tuple[str, str]]:
    device = minor & 0xFF | major << 8 | (minor & ~0xFF) << 12
    head = _DM_IOCTL.pack(4, 0, 0, _BUFFER, _DM_IOCTL.size, 0, 0, flags, 0, 0, device, b"", b"")
    buffer = bytearray(head.ljust(_BUFFER, b"\x00"))
    fcntl.ioctl(control, _DM_TABLE_STATUS, buffer)
    _, _, _, _, start, count, _, answered, *_ = _DM_IOCTL.unpack_from(buffer)
    if answered & _DM_BUFFER_FULL:
        raise StorageError("the table is too long")
    found, place = [], start
    for _ in range(count):
        _, _, _, following, kind = _DM_TARGET.unpack_from(buffer, place)
        text = buffer[place + _DM_TARGET.size :].split(b"\x00", 1)[0]
        found.append((kind.rstrip(b"\x00").decode("ascii"), text.decode("ascii")))
        place = start + following
    return found
