"""The signed list on a raw disk: written in place, verified, and read past the kernel's own copy of it."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from adytum.inference.__main__ import main
from adytum.inference.gateway.callers import disk
from adytum.inference.gateway.callers.callers import CallerList, Callers, CallersError, SignedFile
from tests.unit.gateway.callers.test_callers import SIGNED_BY, Clock, digest, entry, listed, put


def written(folder: Path, text: str) -> Path:
    """`adytum callers disk`, as its user calls it."""
    source, out = folder / "callers.toml", folder / "callers.img"
    put(source, text)
    done = CliRunner().invoke(main, ["callers", "disk", str(source), "--out", str(out)])
    assert done.exit_code == 0, done.output
    return out


def test_a_list_comes_back_verified(tmp_path: Path) -> None:
    image = written(tmp_path, listed(3, entry("a", "ka")))
    assert image.stat().st_size == disk.HEADER + disk.LARGEST
    found = CallerList.load(image, SIGNED_BY)
    assert (found.serial, found.caller[0].key_sha256) == (3, digest("ka"))
    with pytest.raises(CallersError, match="not signed"):
        CallerList.load(image, bytes(32))


def test_it_is_written_in_place_and_leaves_nothing_of_the_longer_list(tmp_path: Path) -> None:
    image = written(tmp_path, listed(1, *(entry(f"a{i}", f"k{i}") for i in range(100))))
    node = image.stat().st_ino
    written(tmp_path, listed(2, entry("b", "kb")))
    assert image.stat().st_ino == node
    assert digest("k99").encode() not in image.read_bytes()
    assert CallerList.load(image, SIGNED_BY).serial == 2


@pytest.mark.parametrize("place", [0, 30, 160, disk.HEADER - 1, disk.HEADER, disk.HEADER + 40])
def test_a_changed_byte_is_no_list(tmp_path: Path, place: int) -> None:
    image = written(tmp_path, listed(1, entry("a", "ka")))
    data = bytearray(image.read_bytes())
    data[place] ^= 1
    image.write_bytes(data)
    with pytest.raises(CallersError):
        CallerList.load(image, SIGNED_BY)


def test_half_of_another_list_is_no_list(tmp_path: Path) -> None:
    """As a machine may read it while its host writes."""
    old = written(tmp_path, listed(1, entry("a", "ka"))).read_bytes()
    image = written(tmp_path, listed(2, entry("b", "kb")))
    image.write_bytes(image.read_bytes()[: disk.HEADER] + old[disk.HEADER :])
    with pytest.raises(CallersError, match="not signed"):
        CallerList.load(image, SIGNED_BY)


@pytest.mark.parametrize("kept", [0, 100, disk.HEADER, disk.HEADER + 20])
def test_a_short_disk_is_no_list(tmp_path: Path, kept: int) -> None:
    image = written(tmp_path, listed(1, entry("a", "ka")))
    os.truncate(image, kept)
    with pytest.raises(CallersError):
        CallerList.load(image, SIGNED_BY)


@given(st.binary(max_size=300))
def test_whatever_a_host_writes_there_is_a_callers_error(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    image = tmp_path_factory.getbasetemp() / "garbage.img"
    image.write_bytes(b"adytum callers v1 " + data)
    with pytest.raises(CallersError):
        CallerList.load(image, SIGNED_BY)


@pytest.mark.parametrize(("data", "signature"), [(b"", "0" * 128), (b"x", "0" * 127), (b"x", "g" * 128)])
def test_what_cannot_be_read_again_is_not_written(data: bytes, signature: str) -> None:
    with pytest.raises(ValueError, match="signature"):
        disk.pack(data, signature)
    with pytest.raises(ValueError, match="too long"):
        disk.pack(bytes(disk.LARGEST + 1), "0" * 128)


def test_an_unsigned_list_is_not_put_on_a_disk(tmp_path: Path) -> None:
    (tmp_path / "callers.toml").write_text("serial = 1\ncaller = []\n")
    command = ["callers", "disk", str(tmp_path / "callers.toml"), "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(main, command)
    assert done.exit_code == 1
    assert "callers sign" in done.output
    assert not (tmp_path / "out").exists()


@pytest.fixture
def device(tmp_path: Path) -> Iterator[tuple[Path, Path]]:
    """A real block device over an image, and the image."""
    image = written(tmp_path, listed(1, entry("a", "ka")))
    if os.geteuid() or shutil.which("losetup") is None:
        pytest.skip("needs root and losetup")
    made = subprocess.run(["losetup", "--find", "--show", str(image)], capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"no loop device is available here: {made.stderr.strip()}")
    try:
        yield Path(made.stdout.strip()), image
    finally:
        subprocess.run(["losetup", "--detach", made.stdout.strip()], check=True)


@pytest.mark.root
def test_a_block_device_is_read_again_when_its_list_changes(device: tuple[Path, Path], tmp_path: Path) -> None:
    path, _ = device
    file = SignedFile(path, SIGNED_BY)
    clock = Clock()
    first = file.load()
    held = Callers(first.caller, clock=clock, monotonic=clock, serial=first.serial)
    written(tmp_path, listed(2, entry("b", "kb")))
    file.refresh(held)
    assert held.serial == 2
    written(tmp_path, listed(1, entry("a", "ka")))
    file.refresh(held)
    assert held.serial == 2, "an older list was taken"


@pytest.mark.root
def test_an_empty_disk_is_told(device: tuple[Path, Path]) -> None:
    path, image = device
    image.write_bytes(bytes(image.stat().st_size))
    with pytest.raises(CallersError, match="callers disk"):
        CallerList.load(path, SIGNED_BY)
