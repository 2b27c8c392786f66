"""`adytum release`: signed statements of the launches and configurations that are valid (docs/how-to/updates.md)."""

import datetime
import hashlib
from pathlib import Path

import click
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from adytum.attestation.core.errors import AttestationError, PolicyFileError
from adytum.attestation.reference import release as releases
from adytum.attestation.reference.measurements import Measurements
from adytum.inference.cli.files import FILE, make_key, read_key

NEW = click.Path(dir_okay=False, path_type=Path)


@click.group()
def release() -> None:
    """Signed releases, which clients' policies can require."""


@release.command()
@click.argument("path", type=NEW)
def key(path: Path) -> None:
    """Make the key that signs releases, in a new file PATH. Keep it away from hosts and backends."""
    try:
        made = make_key(path)
    except FileExistsError:
        raise click.UsageError(f"{path} exists, and is not overwritten") from None
    except OSError as error:
        raise click.UsageError(f"{path} cannot be written: {error.strerror}") from error
    click.echo(made.public_key().public_bytes_raw().hex())


@release.command()
@click.option("--name", required=True, help="The version, like 0.2.0.")
@click.option(
    "--sequence", type=click.IntRange(min=1), required=True, help="Higher than that of every earlier release."
)
@click.option("--date", "day", help="Like 2026-11-23; default: today (UTC).")
@click.option("--measurements", type=FILE, multiple=True, required=True, help="From `adytum measure`.")
@click.option("--config", "configs", type=FILE, multiple=True, required=True, help="The backend's configuration.")
@click.option("--image", "images", type=FILE, multiple=True, help="A published image; the release states its SHA-256.")
@click.option("--draining", type=FILE, multiple=True, help="A release whose current version stays valid for now.")
@click.option("--key", "keys", type=FILE, multiple=True, required=True, help="From `adytum release key`.")
@click.option("--out", type=NEW, required=True, help="The release; its signature goes into OUT.sig.")
def make(
    name: str,
    sequence: int,
    day: str | None,
    measurements: tuple[Path, ...],
    configs: tuple[Path, ...],
    images: tuple[Path, ...],
    draining: tuple[Path, ...],
    keys: tuple[Path, ...],
    out: Path,
) -> None:
    """State and sign the launches and configurations that are valid from now on."""
    held = [_private(path) for path in keys]
    try:
        stated = [Measurements.load(path) for path in measurements]
        machines = {
            releases.Machine(vcpus, one.vcpu_type, found) for one in stated for vcpus, found in one.by_vcpus.items()
        }
        version = releases.Version(
            name,
            tuple((path.name, _sha256(path)) for path in images),
            tuple(sorted(machines, key=lambda machine: (machine.vcpus, machine.vcpu_type, machine.measurement))),
            tuple(dict.fromkeys(_sha256(path) for path in configs)),
        )
        public = [one.public_key().public_bytes_raw() for one in held]
        before = [
            releases.verify(path.read_bytes(), releases.signature_path(path).read_bytes(), public) for path in draining
        ]
        for path, one in zip(draining, before, strict=True):
            if one.sequence >= sequence:
                raise click.UsageError(f"{path} has the sequence {one.sequence}: the new one must be higher")
        today = datetime.datetime.now(datetime.UTC).date().isoformat()
        data = releases.encode(sequence, day or today, (version, *(one.versions[0] for one in before)))
        signatures = releases.sign(data, held)
        _write(out, data)
        _write(releases.signature_path(out), signatures)
    except AttestationError as error:
        raise click.UsageError(str(error)) from error
    except OSError as error:
        raise click.UsageError(f"{error.filename} cannot be read or written: {error.strerror}") from error
    _tell(releases.verify(data, signatures, public))


@release.command()
@click.argument("path", type=FILE)
@click.option("--key", "keys", metavar="HEX", multiple=True, required=True, help="The publisher's; may be given again.")
@click.option("--minimum", type=click.IntRange(min=0), default=0, help="Refuse a lower sequence.")
@click.option("--measurements", type=FILE, multiple=True, help="Check that each of these is in it.")
@click.option("--image", "images", type=FILE, multiple=True, help="Check that this file is one of its images.")
def verify(
    path: Path, keys: tuple[str, ...], minimum: int, measurements: tuple[Path, ...], images: tuple[Path, ...]
) -> None:
    """Check the release PATH with PATH.sig, and show what is valid."""
    try:
        known = frozenset(bytes.fromhex(key) for key in keys)
    except ValueError:
        raise click.UsageError("--key is 64 hexadecimal digits") from None
    try:
        found = releases.load(path, path.name, known, minimum).release
        stated = [(file, Measurements.load(file)) for file in measurements]
    except PolicyFileError as error:
        raise click.ClickException(str(error)) from error
    in_it = {machine.measurement for version in found.versions for machine in version.machines}
    for file, one in stated:
        if missing := [vcpus for vcpus, value in one.by_vcpus.items() if value not in in_it]:
            raise click.ClickException(f"{file}: the measurement for {missing[0]} virtual CPUs is not in the release")
    published = {sha256 for version in found.versions for _, sha256 in version.images}
    for file in images:
        if _sha256(file) not in published:
            raise click.ClickException(f"{file} is not one of the release's images")
    _tell(found)


def _tell(found: releases.Release) -> None:
    click.echo(f"sequence {found.sequence} of {found.date}, SHA-256 {found.sha256.hex()}")
    for place, version in enumerate(found.versions):
        click.echo(f"{'draining' if place else 'current'}  {version.name}")
        for machine in version.machines:
            click.echo(f"  {machine.vcpus} x {machine.vcpu_type}  {machine.measurement.hex()}")
        for configuration in version.configurations:
            click.echo(f"  configuration  {configuration.hex()}")
        for name, sha256 in version.images:
            click.echo(f"  image  {sha256.hex()}  {name}")


def _private(path: Path) -> Ed25519PrivateKey:
    try:
        return read_key(path, "adytum release key")
    except ValueError as error:
        raise click.UsageError(str(error)) from error


def _sha256(path: Path) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def _write(path: Path, data: bytes) -> None:
    made = path.with_name(path.name + ".new")
    made.write_bytes(data)
    made.replace(path)
