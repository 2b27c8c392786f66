"""configfs-tsm: one report, races, and a kernel that refuses."""

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from attestation.errors import CollectionError
from attestation.limits import LIMITS
from attestation.tsm.device import Tsm

DATA = bytes(range(64))


class Kernel(type(Path())):  # type: ignore[misc]
    """A path under a root that acts as the kernel: its files answer when they are opened."""

    outblob = b"report"
    auxblob: bytes | None = b"certificates"
    provider = "sev_guest"
    generation = "0"
    races = 0
    early_races = 0
    """Writes of others between this process's look at the generation and its own write."""
    takes = True
    """Whether it takes what is written. configfs tells nobody where it does not."""
    fails = 0
    wrote: list[tuple[str, bytes]]

    def mkdir(self, *args: Any, **options: Any) -> None:
        super().mkdir(*args, **options)
        plain = Path(self)
        contents = {
            "provider": self.provider + "\n",
            "generation": self.generation + "\n",
            "inblob": "",
            "privlevel": "",
        }
        for name, content in contents.items():
            (plain / name).write_text(content)

    def open(self, mode: str = "r", *args: Any, **options: Any) -> Any:
        kind, folder = type(self), Path(self).parent
        if self.name == "inblob":
            if kind.takes:
                self._raise_generation(folder)
            if kind.early_races:
                kind.early_races -= 1
                self._raise_generation(folder)
        if self.name == "outblob":
            if kind.fails:
                raise OSError(kind.fails, os.strerror(kind.fails))
            (folder / "outblob").write_bytes(kind.outblob)
            if kind.races:
                kind.races -= 1
                self._raise_generation(folder)
        if self.name == "auxblob":
            if kind.auxblob is None:
                raise OSError(errno.ENOENT, os.strerror(errno.ENOENT))
            (folder / "auxblob").write_bytes(kind.auxblob)
        return super().open(mode, *args, **options)

    @staticmethod
    def _raise_generation(folder: Path) -> None:
        path = folder / "generation"
        path.write_text(f"{int(path.read_text()) + 1}\n")

    def rmdir(self) -> None:
        for file in Path(self).iterdir():
            file.unlink()
        super().rmdir()


def machine(root: Path, **behaviour: Any) -> Tsm:
    return Tsm(type("Machine", (Kernel,), behaviour)(root))


def test_a_report(tmp_path: Path) -> None:
    tsm = machine(tmp_path)
    assert tsm.present
    found = tsm.report(DATA, "sev_guest", privilege=2)
    assert (found.outblob, found.auxblob, found.generation) == (b"report", b"certificates", 1)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("auxblob", [b"", None])
def test_without_certificates(auxblob: bytes | None, tmp_path: Path) -> None:
    assert machine(tmp_path, auxblob=auxblob).report(DATA, "sev_guest").auxblob == b""


@pytest.mark.parametrize(("races", "generation"), [(1, 3), (2, 5)])
def test_a_race_is_tried_again(races: int, generation: int, tmp_path: Path) -> None:
    assert machine(tmp_path, races=races).report(DATA, "sev_guest").generation == generation


def test_a_race_before_the_write_is_tried_again(tmp_path: Path) -> None:
    """Another process wrote last, so the report may be for its data although nothing changed since."""
    assert machine(tmp_path, early_races=1).report(DATA, "sev_guest").generation == 3


@pytest.mark.parametrize(
    ("behaviour", "words"),
    [
        ({"early_races": 3}, "another process keeps writing"),
        ({"takes": False}, "the kernel ignores it"),
        ({"generation": "many"}, "no number"),
        ({"races": 3}, "another process keeps writing"),
        ({"provider": "tdx_guest"}, "tdx_guest"),
        ({"provider": "\x1b[31m"}, "x1b"),
        ({"fails": errno.EBUSY}, "busy"),
        ({"fails": errno.EINVAL}, "Invalid argument"),
        ({"fails": errno.EIO}, "Input/output error"),
        ({"outblob": b""}, "empty report"),
        ({"outblob": bytes(LIMITS.report + 1)}, "more than"),
        ({"auxblob": bytes(LIMITS.auxblob + 1)}, "more than"),
    ],
)
def test_failures_leave_nothing_behind(behaviour: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(CollectionError, match=words):
        machine(tmp_path, **behaviour).report(DATA, "sev_guest")
    assert list(tmp_path.iterdir()) == []


def test_a_kernel_without_it(tmp_path: Path) -> None:
    tsm = Tsm(tmp_path / "absent")
    assert not tsm.present
    with pytest.raises(CollectionError, match="configfs"):
        tsm.report(DATA, "sev_guest")


@pytest.mark.parametrize("size", [0, 63, 65])
def test_64_bytes(size: int, tmp_path: Path) -> None:
    with pytest.raises(CollectionError, match="64 bytes"):
        machine(tmp_path).report(bytes(size), "sev_guest")
