"""The manifest of a model folder: what its files are, and one hash for all of them.

`lock` makes it where the weights are prepared; its root goes into the measured configuration and into the claims;
`check` compares the folder with it before an engine may start. A manifest describes regular files only. Symbolic links
are followed as long as they stay inside the folder (a Hugging Face snapshot links to its own blobs only if both are
inside).
"""

import hashlib
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

NAME = "cloister-manifest.json"
"""The manifest's own file name at the top of a model folder; never an entry of a manifest."""
FORMAT = "cloister weights v1"
_READ = 8 * 1024 * 1024
_MAX_MANIFEST = 16 * 1024 * 1024


class WeightsError(Exception):
    """The folder is not what its manifest says, or one cannot be read. The text names the first such file."""


@dataclass(frozen=True, order=True)
class WeightsFile:
    """`path` relative to the folder with forward slashes, `size` in bytes, `sha256` as 64 lower-case hex digits."""

    path: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """All files of a model folder, sorted by path."""

    files: tuple[WeightsFile, ...]

    def __post_init__(self) -> None:
        paths = [file.path for file in self.files]
        if not paths:
            raise WeightsError("a manifest without files")
        if paths != sorted(set(paths)):
            raise WeightsError("the manifest's paths are not sorted, or one is there twice")

    @property
    def root(self) -> bytes:
        """32 bytes that stand for every file: SHA-256 over `FORMAT`, a zero byte and the entries as canonical JSON.

        Canonical JSON: [[path, size, sha256], ...], ASCII, no spaces.
        """
        entries = [[file.path, file.size, file.sha256] for file in self.files]
        text = json.dumps(entries, ensure_ascii=True, separators=(",", ":"))
        return hashlib.sha256(FORMAT.encode() + b"\x00" + text.encode("ascii")).digest()

    @property
    def size(self) -> int:
        """Bytes of all files together."""
        return sum(file.size for file in self.files)

    @classmethod
    def load(cls, path: Path) -> "Manifest":
        """Reads what `save` wrote. Raises `WeightsError` for all else, also if the root is not that of the entries."""
        try:
            with path.open("rb") as stream:
                text = stream.read(_MAX_MANIFEST + 1)
        except OSError as error:
            raise WeightsError(f"cannot read the manifest {path.name}: {error.strerror}") from error
        if len(text) > _MAX_MANIFEST:
            raise WeightsError("the manifest is too large")
        try:
            document = json.loads(text)
            if document["format"] != FORMAT or set(document) != {"format", "root", "files"}:
                raise ValueError("unknown format")
            manifest = cls(tuple(_entry(item) for item in document["files"]))
            root = document["root"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise WeightsError(f"malformed manifest {path.name}: {error}") from error
        if root != manifest.root.hex():
            raise WeightsError(f"the root in {path.name} is not that of its entries")
        return manifest

    def save(self, path: Path) -> None:
        """Writes the manifest as JSON, all of it or nothing."""
        files = [{"path": file.path, "size": file.size, "sha256": file.sha256} for file in self.files]
        text = json.dumps({"format": FORMAT, "root": self.root.hex(), "files": files}, indent=1) + "\n"
        partial = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            partial.write_text(text, encoding="ascii")
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)


def lock(folder: Path) -> Manifest:
    """The manifest of `folder` as it is now. Hashes with as many threads as there are cores.

    Raises `WeightsError` if the folder is empty or unreadable, or has a link that leads out of it or a file of another
    kind.
    """
    paths = _walk(folder)
    return Manifest(tuple(_hash_all(folder, paths)))


def check(folder: Path, manifest: Manifest) -> None:
    """Returns only if `folder` holds exactly the manifest's files; else `WeightsError` names the first that differs.

    Missing and extra files and sizes are looked at first: hashing 40 GB takes a while. The caller must make sure that
    nobody else can write to the folder between this and the engine's own reading (a read-only file system, dm-verity).
    """
    here = set(_walk(folder))
    wanted = {file.path: file for file in manifest.files}
    for path in sorted(here | set(wanted)):
        if path not in here:
            raise WeightsError(f"missing file: {path}")
        if path not in wanted:
            raise WeightsError(f"file that is not in the manifest: {path}")
        if _size(folder, path) != wanted[path].size:
            raise WeightsError(f"wrong size: {path}")
    for file in _hash_all(folder, sorted(here)):
        if file != wanted[file.path]:
            raise WeightsError(f"wrong content: {file.path}")


def _entry(item: dict[str, object]) -> WeightsFile:
    path, size, digest = item["path"], item["size"], item["sha256"]
    if len(item) != 3 or not isinstance(path, str) or not isinstance(digest, str):
        raise ValueError("an entry has other fields than path, size and sha256")
    if type(size) is not int or size < 0:
        raise ValueError(f"size of {path!r}")
    if len(digest) != 64 or not set(digest) <= set("0123456789abcdef"):
        raise ValueError(f"sha256 of {path!r}")
    if not path or path.startswith("/") or any(part in ("", ".", "..") for part in path.split("/")):
        raise ValueError(f"path {path!r}")
    return WeightsFile(path, size, digest)


def _walk(folder: Path) -> list[str]:
    """Relative paths of all files, sorted, but for the manifest's own."""
    top = folder.resolve()
    if not top.is_dir():
        raise WeightsError(f"not a folder: {folder.name}")

    def refuse(error: OSError) -> None:
        raise WeightsError(f"cannot list {error.filename}: {error.strerror}") from error

    found = []
    for parent, folders, files in os.walk(top, onerror=refuse):
        for name in folders + files:
            path = Path(parent, name)
            relative = path.relative_to(top).as_posix()
            if relative == NAME:
                continue
            if path.is_symlink() and not _inside(top, path):
                raise WeightsError(f"link that leads out of the folder: {relative}")
            if name in folders:
                if path.is_symlink():
                    raise WeightsError(f"link to a folder: {relative}")
            elif not path.is_file():
                raise WeightsError(f"not a regular file: {relative}")
            else:
                found.append(relative)
    return sorted(found)


def _inside(top: Path, path: Path) -> bool:
    try:
        return path.resolve(strict=True).is_relative_to(top)
    except (OSError, RuntimeError):  # dangling, or a loop
        return False


def _size(folder: Path, path: str) -> int:
    try:
        return (folder / path).stat().st_size
    except OSError as error:
        raise WeightsError(f"cannot read {path}: {error.strerror}") from error


def _hash_all(folder: Path, paths: list[str]) -> Iterator[WeightsFile]:
    # hashlib releases the GIL, so threads hash in parallel.
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        yield from pool.map(lambda path: _hash(folder, path), paths)


def _hash(folder: Path, path: str) -> WeightsFile:
    digest = hashlib.sha256()
    size = 0
    try:
        with (folder / path).open("rb", buffering=0) as stream:
            while block := stream.read(_READ):
                digest.update(block)
                size += len(block)
    except OSError as error:
        raise WeightsError(f"cannot read {path}: {error.strerror}") from error
    return WeightsFile(path, size, digest.hexdigest())
