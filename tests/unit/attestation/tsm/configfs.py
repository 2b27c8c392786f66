"""A directory that acts as configfs-tsm: a directory made in it has files that answer, as the kernel's do.

Linux, drivers/virt/coco/guest/report.c. A path under the fake root is a `Kernel`; its class attributes are what the
machine does.
"""

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Kernel(type(Path())):  # type: ignore[misc]
    """A path under a root that acts as the kernel: its files answer when they are opened."""

    make: Callable[[bytes, int], bytes] = staticmethod(lambda inblob, level: b"report")
    """The report for 64 bytes at a privilege level."""
    auxblob: bytes | None = b"certificates"
    provider = "sev_guest"
    floor: str | None = "0"
    """The most privileged level that may be asked for; None if the platform has no levels."""
    generation = "0"
    races = 0
    """Times that another process writes after the report was made."""
    early_races = 0
    """Times that another process writes between this process's look at the generation and its own write."""
    takes = True
    """Whether it takes what is written. configfs tells nobody where it does not."""
    fails = 0

    def mkdir(self, *args: Any, **options: Any) -> None:
        super().mkdir(*args, **options)
        contents = {"provider": f"{self.provider}\n", "generation": f"{self.generation}\n", "inblob": "", "outblob": ""}
        if self.floor is not None:
            contents |= {"privlevel_floor": f"{self.floor}\n", "privlevel": ""}
        if self.auxblob is not None:
            contents["auxblob"] = ""
        for name, content in contents.items():
            (Path(self) / name).write_text(content)

    def open(self, mode: str = "r", *args: Any, **options: Any) -> Any:
        kind, folder = type(self), Path(self).parent
        if "w" in mode and not Path(self).exists():
            # A process makes entries here, never files.
            raise OSError(errno.EPERM, os.strerror(errno.EPERM))
        if self.name in ("inblob", "privlevel"):
            self._written(folder, kind.takes)
        if self.name == "inblob" and kind.early_races:
            kind.early_races -= 1
            self._written(folder)
        if self.name == "outblob":
            if kind.fails:
                raise OSError(kind.fails, os.strerror(kind.fails))
            (folder / "outblob").write_bytes(self._report(folder))
            if kind.races:
                kind.races -= 1
                self._written(folder)
        if self.name == "auxblob" and kind.auxblob is not None:
            (folder / "auxblob").write_bytes(kind.auxblob)
        return super().open(mode, *args, **options)

    @classmethod
    def _report(cls, folder: Path) -> bytes:
        inblob = (folder / "inblob").read_bytes()
        level = 0 if cls.floor is None else int((folder / "privlevel").read_text() or "0")
        if len(inblob) != 64 or level < int(cls.floor or 0):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return cls.make(inblob, level)

    @staticmethod
    def _written(folder: Path, takes: bool = True) -> None:
        path = folder / "generation"
        if takes and path.read_text().strip().isdecimal():
            path.write_text(f"{int(path.read_text()) + 1}\n")

    def rmdir(self) -> None:
        for file in Path(self).iterdir():
            file.unlink()
        super().rmdir()


def configfs(root: Path, make: Callable[[bytes, int], bytes] | None = None, **behaviour: Any) -> Path:
    """The directory `root` as a kernel with that behaviour: `make` and the attributes of `Kernel`."""
    if make is not None:
        behaviour["make"] = staticmethod(make)
    return type("Machine", (Kernel,), behaviour)(root)  # type: ignore[no-any-return]
