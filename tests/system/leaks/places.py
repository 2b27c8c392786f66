"""Where is searched. A place that holds nothing is an error, never a pass: it was not looked at where it should be."""

import ctypes
import os
import struct
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from tests.system.leaks.search import Hit, Searcher, tree

SKIPPED = frozenset(("proc", "sys", "dev"))


class NothingThere(Exception):
    """The place is empty, so that it proves nothing."""


class Place(Protocol):
    """One kind of place."""

    name: str

    def search(self, searcher: Searcher) -> set[Hit]: ...


@dataclass
class Bytes:
    """What was recorded: traffic, an answer, an output."""

    name: str
    read: Callable[[], bytes]

    def search(self, searcher: Searcher) -> set[Hit]:
        data = self.read()
        if not data:
            raise NothingThere(self.name)
        return searcher.data(self.name, data)


@dataclass
class Files:
    """Files that have to be there."""

    name: str
    paths: Callable[[], Sequence[Path]]

    def search(self, searcher: Searcher) -> set[Hit]:
        paths = self.paths()
        if not paths or not any(path.stat().st_size for path in paths):
            raise NothingThere(self.name)
        return set().union(*(searcher.path(path) for path in paths))


@dataclass
class WholeTree:
    """Every file of the machine that was changed since a moment, but what the test itself writes."""

    since: float
    but: Sequence[Path] = ()
    roots: Sequence[Path] = ()
    name: str = "every file that was written"

    def search(self, searcher: Searcher) -> set[Hit]:
        everywhere = [path for path in Path("/").iterdir() if path.is_dir() and path.name not in SKIPPED]
        roots = self.roots or [*everywhere, Path("/dev/shm")]
        hits: set[Hit] = set()
        count = 0
        # A chroot that something else has open holds another /proc; processes are a place of their own.
        kernels = [mount for mount in _mounts("proc", "sysfs") if mount not in (Path("/proc"), Path("/sys"))]
        for path in tree([root for root in roots if not root.is_symlink()], self.since):
            if any(path.is_relative_to(other) for other in (*self.but, *kernels)):
                continue
            count += 1
            try:
                hits |= searcher.path(path)
            except FileNotFoundError:
                continue
            if path.name == "core" or path.name.startswith("core."):
                hits.add(Hit(str(path), "a core dump"))
        if not count:
            raise NothingThere(self.name)
        return hits


def _mounts(*kinds: str) -> list[Path]:
    """Where file systems of these kinds are mounted (proc(5), mountinfo)."""
    found = []
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        before, _, after = line.partition(" - ")
        if after.split()[0] in kinds:
            found.append(Path(before.split()[4]))
    return found


@dataclass
class Processes:
    """Environment, command line and open files (deleted ones too) of all processes but some."""

    but: frozenset[int]
    name: str = "processes"

    def search(self, searcher: Searcher) -> set[Hit]:
        hits: set[Hit] = set()
        count = 0
        for folder in Path("/proc").iterdir():
            if not folder.name.isdigit() or int(folder.name) in self.but:
                continue
            for name in ("environ", "cmdline", "comm"):
                try:
                    data = (folder / name).read_bytes()
                except OSError:
                    continue
                count += 1
                hits |= searcher.data(f"/proc/{folder.name}/{name}", data)
            hits |= self._open_files(folder, searcher)
        if not count:
            raise NothingThere(self.name)
        return hits

    def _open_files(self, folder: Path, searcher: Searcher) -> set[Hit]:
        hits: set[Hit] = set()
        try:
            entries = list((folder / "fd").iterdir())
        except OSError:
            return hits
        for entry in entries:
            try:
                about = entry.stat()
                # Files that are still written to, or have no name any more. Those of the tree are searched there.
                if about.st_mode & 0o170000 != 0o100000 or about.st_nlink or about.st_size > 1 << 28:
                    continue
                with entry.open("rb") as file:
                    hits |= searcher.file(f"{entry} ({os.readlink(entry)})", file)
            except OSError:
                continue
        return hits


@dataclass
class Written:
    """What was written to any file of the machine's file systems when it was closed: also one that is gone since.

    fanotify(7); needs root, and raises `PermissionError` if that is not enough. `start`, then `stop`.
    """

    searcher: Searcher
    but: frozenset[int]
    roots: Sequence[Path] = (Path("/"),)
    name: str = "files as they were closed"
    hits: set[Hit] = field(default_factory=set)
    closed: int = 0

    def start(self) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        # FAN_CLOEXEC | FAN_CLASS_NOTIF | FAN_UNLIMITED_QUEUE; O_RDONLY | O_LARGEFILE
        self._queue = libc.fanotify_init(0x1 | 0x10, os.O_RDONLY | 0o100000)
        if self._queue < 0:
            raise PermissionError(ctypes.get_errno(), "fanotify_init")
        for root in self.roots:
            # FAN_MARK_ADD | FAN_MARK_FILESYSTEM; FAN_CLOSE_WRITE
            marked = libc.fanotify_mark(self._queue, 0x1 | 0x100, ctypes.c_uint64(0x8), -100, os.fsencode(root))
            if marked < 0:
                raise PermissionError(ctypes.get_errno(), "fanotify_mark")
        self._stop, self._stopped = os.pipe()
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        os.close(self._stopped)
        self._thread.join(30)
        os.close(self._queue)

    def _work(self) -> None:
        import select

        while True:
            ready, _, _ = select.select([self._queue, self._stop], [], [])
            if self._queue in ready:
                self._events(os.read(self._queue, 1 << 16))
            elif ready:
                return

    def _events(self, data: bytes) -> None:
        at = 0
        while at < len(data):
            length, _, _, _, _, descriptor, pid = struct.unpack_from("=IBBHQii", data, at)
            at += length
            if descriptor < 0:
                continue
            with os.fdopen(descriptor, "rb") as file:
                if pid in self.but:
                    continue
                self.closed += 1
                try:
                    self.hits |= self.searcher.file(os.readlink(f"/proc/self/fd/{descriptor}"), file)
                except OSError:
                    continue

    def search(self, searcher: Searcher) -> set[Hit]:
        if not self.closed:
            raise NothingThere(self.name)
        return self.hits


def hunt(places: Iterable[Place], searcher: Searcher) -> set[Hit]:
    """All leaks in all places. Raises `NothingThere`."""
    return set().union(*(place.search(searcher) for place in places))
