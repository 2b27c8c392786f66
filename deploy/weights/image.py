"""`python -m adytum.deploy.weights.image make FOLDER IMAGE`: a model folder as one dm-verity file, and its manifest.

The same files make the same image and the same root hash, on any machine and at any time:
1. The files are listed in a manifest. If FOLDER has one already, its files must be these.
2. An EROFS image of exactly these files is written (`erofs.py`). They are hashed again meanwhile.
3. veritysetup appends superblock and hash tree. Salt and UUID derive from the manifest's `files_root`.
4. A manifest with the root hash is written beside the image: IMAGE.manifest.json. The backend's configuration names it.
5. If FOLDER has golden answers (`adytum models canary`) for these very files, a copy that names this manifest is
   written: IMAGE.canary.json.

`verify` computes the root hash of an image without veritysetup and compares it with the manifest's.
"""

import hashlib
import os
import shutil
import subprocess
import uuid
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

import click

from adytum.deploy.weights import erofs
from adytum.inference.engine.supervise.canary import CanaryFailed, Golden
from adytum.inference.engine.weights.progress import ProgressLine
from adytum.inference.engine.weights.verity import SUPERBLOCK_SIZE, Superblock, Verity, VerityError, root_hash
from adytum.inference.engine.weights.weights import CANARY, NAME, Manifest, Source, WeightsError, lock

_SALT = b"adytum image salt v1\x00"
_UUID = b"adytum image uuid v1\x00"
_COPY = 1024 * 1024
_SBIN = "/usr/sbin:/sbin"  # Not in every user's PATH; veritysetup format needs no root.


@click.group()
def main() -> None:
    """Images of model folders for dm-verity."""


@main.command()
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("image", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--repository", help="The hub id that the files come from.")
@click.option("--revision", help="Its commit, 40 hexadecimal digits.")
def make(folder: Path, image: Path, repository: str | None, revision: str | None) -> None:
    """Write IMAGE and IMAGE.manifest.json from FOLDER; print the manifest's root and the root hash."""
    try:
        source = Source(repository, revision) if repository and revision else None
        if source is None and (repository or revision):
            raise click.UsageError("--repository and --revision go together")
        manifest = build(folder, image, source)
        manifest.save(manifest_path(image))
        _copy_golden(folder, manifest, canary_path(image))
    except (WeightsError, VerityError, CanaryFailed, erofs.ImageError, OSError) as error:
        raise click.ClickException(str(error)) from error
    assert manifest.verity is not None
    click.echo(f"root      {manifest.root.hex()}\nroot hash {manifest.verity.root_hash}")


@main.command()
@click.argument("image", type=click.Path(exists=True, dir_okay=False, path_type=Path))
def verify(image: Path) -> None:
    """Compute the root hash of IMAGE and compare it with IMAGE.manifest.json. Needs no tool and no root."""
    try:
        manifest = Manifest.load(manifest_path(image))
        if manifest.verity is None:
            raise VerityError("the manifest names no dm-verity root hash")
        measured = measure(image, manifest.verity.data_size)
        if measured != manifest.verity:
            raise VerityError(f"the image is not the manifest's: its root hash is {measured.root_hash}")
    except (WeightsError, VerityError, OSError) as error:
        raise click.ClickException(str(error)) from error
    click.echo(f"root hash {measured.root_hash}")


def manifest_path(image: Path) -> Path:
    """The path of an image's manifest."""
    return image.with_name(image.name + ".manifest.json")


def canary_path(image: Path) -> Path:
    """The path of the golden answers of an image's model, if it has any."""
    return image.with_name(image.name + ".canary.json")


def build(folder: Path, image: Path, source: Source | None = None) -> Manifest:
    """Writes `image`, all of it or nothing. Returns the manifest that names it.

    Raises `WeightsError`, `erofs.ImageError` or `VerityError`.
    """
    veritysetup = shutil.which("veritysetup", path=f"{os.environ.get('PATH', '')}:{_SBIN}")
    if veritysetup is None:
        raise VerityError("veritysetup is missing: apt-get install cryptsetup-bin")
    files = lock(folder, source, progress=ProgressLine("hashing", _say))
    if (folder / NAME).exists():
        known = Manifest.load(folder / NAME)
        if known.files != files.files:
            raise WeightsError(f"the files of {folder.name} are not those of its {NAME}")
        files = Manifest(files.files, source or known.source)
    partial = image.with_name(f".{image.name}.{os.getpid()}")
    try:
        size = _write_image(folder, files, partial)
        verity = _format(veritysetup, partial, size, files.files_root)
        partial.replace(image)
    finally:
        partial.unlink(missing_ok=True)
    return Manifest(files.files, files.source, verity)


def measure(image: Path, data_size: int) -> Verity:
    """The verity of an image, computed from its data; its hash tree is not read. Raises `VerityError`."""
    with image.open("rb") as stream:
        stream.seek(data_size)
        superblock = Superblock.parse(stream.read(SUPERBLOCK_SIZE))
        if superblock.data_blocks * superblock.data_block_size != data_size:
            raise VerityError("the superblock describes data of another size")
        stream.seek(0)
        digest = root_hash(stream, superblock, ProgressLine("hashing", _say))
    return Verity(
        digest.hex(), superblock.salt.hex(), superblock.data_block_size, superblock.hash_block_size, data_size
    )


def _copy_golden(folder: Path, manifest: Manifest, path: Path) -> None:
    """Copies the folder's golden answers with the root of the image's manifest instead of the folder's.

    Raises `CanaryFailed` if they belong to other files, `WeightsError` for an invalid manifest.
    """
    path.unlink(missing_ok=True)
    if not (folder / CANARY).exists():
        return
    known = Manifest.load(folder / NAME)
    if known.files != manifest.files:
        raise WeightsError(f"the files of {folder.name} are not those of its {NAME}")
    replace(Golden.load(folder / CANARY, known.root), weights_root=manifest.root).save(path)


def _write_image(folder: Path, manifest: Manifest, image: Path) -> int:
    digests = {file.path: file.sha256 for file in manifest.files}
    progress, done = ProgressLine("writing", _say), 0

    def copy(path: str, out: BinaryIO) -> int:
        nonlocal done
        digest, size = hashlib.sha256(), 0
        with (folder / path).open("rb") as stream:
            while block := stream.read(_COPY):
                digest.update(block)
                size += out.write(block)
                progress(done + size, manifest.size)
        if digest.hexdigest() != digests[path]:
            raise WeightsError(f"{path} changed while the image was written")
        done += size
        return size

    with image.open("wb") as out:
        return erofs.write(
            out, [(file.path, file.size) for file in manifest.files], copy, _derived(_UUID, manifest.files_root)[:16]
        )


def _format(veritysetup: str, image: Path, size: int, files_root: bytes) -> Verity:
    salt = _derived(_SALT, files_root).hex()
    command = [veritysetup, "format", str(image), str(image), f"--hash-offset={size}", f"--salt={salt}"]
    command += ["--hash=sha256", "--format=1", "--data-block-size=4096", "--hash-block-size=4096"]
    command += [f"--data-blocks={size // erofs.BLOCK}", f"--uuid={uuid.UUID(bytes=_derived(_UUID, files_root)[:16])}"]
    try:
        ended = subprocess.run(command, capture_output=True, text=True, check=True)  # noqa: S603 - ours, no shell
    except subprocess.CalledProcessError as error:
        raise VerityError(f"veritysetup format failed: {error.stderr.strip()}") from error
    found = [line.split(":", 1)[1].strip() for line in ended.stdout.splitlines() if line.startswith("Root hash:")]
    if len(found) != 1:
        raise VerityError("veritysetup format printed no root hash")
    return Verity(found[0], salt, 4096, 4096, size)


def _derived(label: bytes, files_root: bytes) -> bytes:
    return hashlib.sha256(label + files_root).digest()


def _say(text: str) -> None:
    click.echo(text, err=True)


if __name__ == "__main__":
    main()
