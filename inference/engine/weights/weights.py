"""The manifest of a model folder: what its files are, where they come from, and one hash for all of it.

`lock` makes the manifest on the machine that prepares the weights. Its root goes into the measured configuration and
into the claims. `check` compares the folder with it before an engine may start. A manifest describes regular files
only. Symbolic links are followed as long as they stay inside the folder, so a Hugging Face snapshot needs its blobs
inside too.

An engine reads the files again after the check. Whether they can change in between depends on what they lie on:
`check` returns that (`storage.py`), and accepts a manifest with a dm-verity root hash on that device only.
"""

import hashlib
import json
import os
import re
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adytum.inference.engine.weights.storage import Storage, where
from adytum.inference.engine.weights.verity import Verity, VerityError

NAME = "adytum-manifest.json"
"""The manifest's own file name at the top of a model folder; never an entry of a manifest."""
CANARY = "adytum-canary.json"
"""The file name of the golden answers, beside `NAME`. Like it, it is ours and not part of the model."""
FORMAT = "adytum weights v1"
"""The format of a manifest with files only, and of the hash over the files."""
FORMAT_2 = "adytum weights v2"
"""The format of a manifest with a source or a verity root hash."""

Progress = Callable[[int, int], None]
"""Called with the number of bytes hashed so far and the total, by one thread at a time."""

_REPORT = 16 * 1024 * 1024
_READ = 256 * 1024  # The fastest here of 256 KiB to 8 MiB: it stays in the core's cache (docs/explanation/weights.md).
_MAX_MANIFEST = 16 * 1024 * 1024
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[\w.-]{1,96}", re.ASCII)


class WeightsError(Exception):
    """The folder is not what its manifest says, or a file cannot be read. The text names the file."""


@dataclass(frozen=True, order=True)
class WeightsFile:
    """`path` relative to the folder with forward slashes, `size` in bytes, `sha256` as 64 lower-case hex digits."""

    path: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Source:
    """Where the files come from: `repository` is a hub id, `revision` its commit (40 lower-case hex digits).

    It is a statement of the person who locked the files; only a comparison with the hub proves it.
    """

    repository: str
    revision: str

    def __post_init__(self) -> None:
        if not _REPOSITORY.fullmatch(self.repository):
            raise WeightsError("the source's repository is not a hub id")
        if not _is_hex(self.revision, 40):
            raise WeightsError("the source's revision is not a commit of 40 lower-case hexadecimal digits")


@dataclass(frozen=True)
class Manifest:
    """All files of a model folder, sorted by path, where they come from, and the image that holds them."""

    files: tuple[WeightsFile, ...]
    source: Source | None = None
    verity: Verity | None = None

    def __post_init__(self) -> None:
        paths = [file.path for file in self.files]
        if not paths:
            raise WeightsError("a manifest without files")
        if paths != sorted(set(paths)):
            raise WeightsError("the manifest's paths are not sorted, or one occurs twice")

    @property
    def files_root(self) -> bytes:
        """32 bytes that stand for every file: SHA-256 over `FORMAT`, a zero byte and the entries as canonical JSON.

        Canonical JSON: [[path, size, sha256], ...], ASCII, no spaces.
        """
        return _digest(FORMAT, [[file.path, file.size, file.sha256] for file in self.files])

    @property
    def root(self) -> bytes:
        """32 bytes that stand for the whole manifest; the evidence shows them.

        With files only it is `files_root`. Else SHA-256 over `FORMAT_2`, a zero byte and {"files", "source", "verity"}
        as canonical JSON (ASCII, no spaces, sorted keys): "files" is `files_root` in hexadecimal, and a part that the
        manifest lacks is null.
        """
        if self.source is None and self.verity is None:
            return self.files_root
        return _digest(FORMAT_2, {"files": self.files_root.hex(), "source": None, "verity": None, **self._more()})

    @property
    def size(self) -> int:
        """Bytes of all files together."""
        return sum(file.size for file in self.files)

    @classmethod
    def load(cls, path: Path) -> "Manifest":
        """Reads what `save` wrote. Raises `WeightsError` for anything else, and if the root is not that of the rest."""
        try:
            with path.open("rb") as stream:
                text = stream.read(_MAX_MANIFEST + 1)
        except OSError as error:
            raise WeightsError(f"cannot read the manifest {path.name}: {error.strerror}") from error
        if len(text) > _MAX_MANIFEST:
            raise WeightsError("the manifest is too large")
        try:
            document = json.loads(text)
            manifest = cls._parse(document)
            root = document["root"]
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError, VerityError) as error:
            raise WeightsError(f"malformed manifest {path.name}: {error}") from error
        if root != manifest.root.hex():
            raise WeightsError(f"the root in {path.name} is not that of its entries")
        return manifest

    @classmethod
    def _parse(cls, document: dict[str, Any]) -> "Manifest":
        files = tuple(_entry(item) for item in document["files"])
        more = set(document) - {"format", "root", "files"}
        if document["format"] != (FORMAT_2 if more else FORMAT) or not more <= {"source", "verity"}:
            raise ValueError("unknown format")
        return cls(
            files,
            Source(**document["source"]) if "source" in more else None,
            Verity.from_json(document["verity"]) if "verity" in more else None,
        )

    def save(self, path: Path) -> None:
        """Writes the manifest as JSON, all of it or nothing."""
        files = [{"path": file.path, "size": file.size, "sha256": file.sha256} for file in self.files]
        more = self._more()
        document = {"format": FORMAT_2 if more else FORMAT, "root": self.root.hex(), **more, "files": files}
        partial = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            partial.write_text(json.dumps(document, indent=1) + "\n", encoding="ascii")
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)

    def _more(self) -> dict[str, dict[str, str | int]]:
        more: dict[str, dict[str, str | int]] = {}
        if self.source is not None:
            more["source"] = {"repository": self.source.repository, "revision": self.source.revision}
        if self.verity is not None:
            more["verity"] = self.verity.to_json()
        return more


def lock(
    folder: Path, source: Source | None = None, verity: Verity | None = None, progress: Progress | None = None
) -> Manifest:
    """The manifest of `folder` as it is now. Hashes with as many threads as there are cores.

    Raises `WeightsError` if the folder is empty or unreadable, or contains a link that leads out of it, or anything but
    a regular file. `verity` is not verified here: `check` compares it with the device that the folder lies on.
    """
    sizes = {path: _size(folder, path) for path in _walk(folder)}
    return Manifest(tuple(sorted(_hash_all(folder, sizes, progress))), source, verity)


def check(
    folder: Path,
    manifest: Manifest,
    progress: Progress | None = None,
    storage: Callable[[Path], Storage] = where,
) -> Storage:
    """Returns what the folder lies on. Raises `WeightsError` unless it holds exactly the manifest's files.

    1. If the manifest has a verity root hash, the folder must lie on a dm-verity device with that root hash.
    2. Missing files, extra files and sizes come first, because hashing 40 GB takes a while.
    3. The content of every file, largest first. The error names the first one found to differ.

    The caller shows the returned `Storage` to the operator: unless it is `protected`, the owner of the disk can change
    a file between this check and the engine's own reading.
    """
    found = storage(folder)
    if manifest.verity is not None and not (found.kind == "verity" and found.root_hash == manifest.verity.root_hash):
        raise WeightsError(
            f"the manifest names the dm-verity root hash {manifest.verity.root_hash}, but the folder is {found.place}. "
            "Open the image with that root hash (docs/explanation/weights.md)"
        )
    here = set(_walk(folder))
    wanted = {file.path: file for file in manifest.files}
    for path in sorted(here | set(wanted)):
        if path not in here:
            raise WeightsError(f"missing file: {path}")
        if path not in wanted:
            raise WeightsError(f"file that is not in the manifest: {path}")
        if _size(folder, path) != wanted[path].size:
            raise WeightsError(f"wrong size: {path}")
    for file in _hash_all(folder, {path: file.size for path, file in wanted.items()}, progress):
        if file != wanted[file.path]:
            raise WeightsError(f"wrong content: {file.path}")
    return found


def _digest(name: str, value: object) -> bytes:
    text = json.dumps(value, ensure_ascii=True, separators=(",", ":"), sort_keys=True)
    return hashlib.sha256(name.encode() + b"\x00" + text.encode("ascii")).digest()


def _is_hex(text: object, digits: int) -> bool:
    return isinstance(text, str) and len(text) == digits and set(text) <= set("0123456789abcdef")


def _entry(item: dict[str, object]) -> WeightsFile:
    path, size, digest = item["path"], item["size"], item["sha256"]
    if len(item) != 3 or not isinstance(path, str) or not isinstance(digest, str):
        raise ValueError("an entry has other fields than path, size and sha256")
    if type(size) is not int or size < 0:
        raise ValueError(f"size of {path!r}")
    if not _is_hex(digest, 64):
        raise ValueError(f"sha256 of {path!r}")
    if not path or path.startswith("/") or any(part in ("", ".", "..") for part in path.split("/")):
        raise ValueError(f"path {path!r}")
    return WeightsFile(path, size, digest)


def _walk(folder: Path) -> list[str]:
    """Relative paths of all files, sorted, without ours at the top."""
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
            if relative in (NAME, CANARY):
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


def _hash_all(folder: Path, sizes: dict[str, int], progress: Progress | None) -> Iterator[WeightsFile]:
    """Yields every file as soon as it is hashed. If the caller stops early, the threads end soon."""
    total, done = sum(sizes.values()), 0
    turn, stop = threading.Lock(), threading.Event()

    def advance(count: int) -> bool:
        nonlocal done
        if progress is not None:
            with turn:
                done += count
                progress(done, total)
        return stop.is_set()

    # hashlib releases the GIL, so threads hash in parallel. One stream cannot be split: the largest file goes first.
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        paths = sorted(sizes, key=lambda path: (-sizes[path], path))
        tasks = [pool.submit(_hash, folder, path, advance) for path in paths]
        try:
            for task in as_completed(tasks):
                yield task.result()
        finally:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)


def _hash(folder: Path, path: str, advance: Callable[[int], bool]) -> WeightsFile:
    digest = hashlib.sha256()
    size = told = 0
    block = bytearray(_READ)
    view = memoryview(block)
    try:
        with (folder / path).open("rb", buffering=0) as stream:
            while count := stream.readinto(block):
                digest.update(view[:count])
                size += count
                if size - told >= _REPORT:
                    news, told = size - told, size
                    if advance(news):
                        break
    except OSError as error:
        raise WeightsError(f"cannot read {path}: {error.strerror}") from error
    if size > told:
        advance(size - told)
    return WeightsFile(path, size, digest.hexdigest())
