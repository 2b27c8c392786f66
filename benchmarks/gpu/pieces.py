"""Wheels for a machine without a network, in pieces small enough for a narrow channel.

`pack` runs on a machine with a package index, and `join`, which checks every byte, on the other one. Standard library
only.
"""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

PIECE = 60_000_000
"""Bytes."""
INDEX = "pieces.json"
_PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in range(5, 40)]
# pip compares the names literally, so every name that a wheel may have is listed.
PLATFORMS = [*_PLATFORMS, "manylinux1_x86_64", "manylinux2010_x86_64", "manylinux2014_x86_64", "linux_x86_64"]


class PiecesError(Exception):
    """A piece is missing or is not what was packed. The message says which."""


def download(requirements: Path, folder: Path, python: str) -> None:
    """Downloads all wheels of a pinned list for that Python ("3.12") on Linux x86-64. Raises `PiecesError`."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    command += ["--python-version", python, "--implementation", "cp", "--dest", str(folder), "-r", str(requirements)]
    for abi in ("cp" + python.replace(".", ""), "abi3", "none"):
        command += ["--abi", abi]
    for platform in PLATFORMS:
        command += ["--platform", platform]
    if subprocess.run(command).returncode != 0:
        raise PiecesError(f"pip could not download all of {requirements}: its message is above")


def cut(wheels: Path, out: Path, size: int = PIECE) -> int:
    """Writes each wheel of `wheels` as pieces of at most `size` bytes, and the index. Returns the number of pieces."""
    out.mkdir(parents=True, exist_ok=True)
    index = {}
    for wheel in sorted(wheels.glob("*.whl")):
        names: list[str] = []
        with wheel.open("rb") as file:
            while block := file.read(size):
                names.append(f"{wheel.name}.{len(names):03}")
                (out / names[-1]).write_bytes(block)
        index[wheel.name] = {"sha256": _digest(wheel), "pieces": names}
    if not index:
        raise PiecesError(f"there is no wheel in {wheels}")
    (out / INDEX).write_text(json.dumps(index, indent=1) + "\n")
    return sum(len(entry["pieces"]) for entry in index.values())


def join(pieces: Path, wheels: Path) -> int:
    """Joins the pieces of wheels that are not in `wheels` yet. Returns the number of wheels. Raises `PiecesError`."""
    try:
        index = json.loads((pieces / INDEX).read_text())
    except (OSError, ValueError) as error:
        raise PiecesError(f"{pieces / INDEX} cannot be read: copy the index too ({error})") from error
    missing = [name for entry in index.values() for name in entry["pieces"] if not (pieces / name).exists()]
    if missing:
        raise PiecesError(f"{len(missing)} pieces are missing in {pieces}, the first is {missing[0]}")
    wheels.mkdir(parents=True, exist_ok=True)
    for name, entry in index.items():
        target = wheels / name
        if not target.exists() or _digest(target) != entry["sha256"]:
            with target.open("wb") as file:
                for piece in entry["pieces"]:
                    file.write((pieces / piece).read_bytes())
            if _digest(target) != entry["sha256"]:
                target.unlink()
                raise PiecesError(
                    f"{name} is not what was packed: copy {entry['pieces'][0]} and its later pieces again"
                )
    return len(index)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
