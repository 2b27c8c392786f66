"""configfs-tsm: one report, races, and a kernel that refuses."""

import errno
from pathlib import Path
from typing import Any

import pytest

from adytum.attestation.core.errors import CollectionError
from adytum.attestation.core.limits import LIMITS
from adytum.attestation.tsm.device import Tsm
from tests.unit.attestation.tsm.configfs import configfs

DATA = bytes(range(64))


def machine(root: Path, **behaviour: Any) -> Tsm:
    return Tsm(configfs(root, **behaviour))


def test_a_report(tmp_path: Path) -> None:
    tsm = machine(tmp_path)
    assert tsm.present
    found = tsm.report(DATA, "sev_guest")
    assert (found.outblob, found.auxblob, found.generation) == (b"report", b"certificates", 1)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("auxblob", [b"", None])
def test_without_certificates(auxblob: bytes | None, tmp_path: Path) -> None:
    assert machine(tmp_path, auxblob=auxblob).report(DATA, "sev_guest").auxblob == b""


@pytest.mark.parametrize(("floor", "asked"), [("0", 0), ("2", 2), ("3", 3), (None, 0)])
def test_the_level_is_the_most_privileged_that_may_ask(floor: str | None, asked: int, tmp_path: Path) -> None:
    """Below a service module or paravisor a guest is not at level 0, and the firmware refuses what is above it."""
    seen: list[tuple[bytes, int]] = []

    def make(inblob: bytes, level: int) -> bytes:
        seen.append((inblob, level))
        return b"report"

    found = machine(tmp_path, make=make, floor=floor).report(DATA, "sev_guest")
    # Telling the level is a write of its own, before the one that counts.
    assert (seen, found.generation) == ([(DATA, asked)], 2 if asked else 1)


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
        ({"generation": "many"}, "generation is not a number"),
        ({"floor": "low"}, "privlevel_floor is not a number"),
        ({"races": 3}, "another process keeps writing"),
        ({"provider": "tdx_guest"}, "tdx_guest"),
        ({"provider": "\x1b[31m"}, "x1b"),
        ({"fails": errno.EBUSY}, "busy"),
        ({"fails": errno.ETIMEDOUT}, "limits how often"),
        ({"fails": errno.EINVAL}, "refuses the request"),
        ({"fails": errno.ENOTTY}, "restarted"),
        ({"fails": errno.ENXIO}, "module is not loaded"),
        ({"fails": errno.EIO}, "Input/output error"),
        ({"make": lambda inblob, level: b""}, "empty report"),
        ({"make": lambda inblob, level: bytes(LIMITS.report + 1)}, "more than"),
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
