"""`adytum callers`: keys for callers, and the lists of callers that a backend accepts.

Only the commands that need the lists' module import it: it belongs to the server.
"""

import hashlib
import os
import secrets
from pathlib import Path

import click

from adytum.inference.cli.files import FILE, make_key, read_key


@click.group()
def callers() -> None:
    """API keys, and signed lists of callers."""


@callers.command()
def key() -> None:
    """Make an API key. It is shown once; the list has its hash."""
    made = "ck-" + secrets.token_urlsafe(32)
    click.echo(f"give to the caller   {made}")
    click.echo(f'put into the list    key_sha256 = "{hashlib.sha256(made.encode()).hexdigest()}"')


@callers.command("signing-key")
@click.argument("path", type=click.Path(dir_okay=False, path_type=Path))
def signing_key(path: Path) -> None:
    """Make the key that signs lists, in a new file PATH. Keep it away from the backend."""
    try:
        made = make_key(path)
    except FileExistsError:
        raise click.ClickException(f"{path} exists, and is not overwritten") from None
    public = made.public_key().public_bytes_raw().hex()
    click.echo(f'put into the configuration, under [callers]   signed_by = "{public}"')


@callers.command()
@click.argument("path", type=FILE)
@click.option("--key", "key_path", type=FILE, required=True, help="From `adytum callers signing-key`.")
def sign(path: Path, key_path: Path) -> None:
    """Check the list PATH and sign it into PATH.sig."""
    from adytum.inference.gateway.callers.callers import SIGNED, CallerList, CallersError

    data = path.read_bytes()
    try:
        found = CallerList.parse(data)
        held = read_key(key_path, "adytum callers signing-key")
    except CallersError as error:
        raise click.ClickException(f"{path}: {error}") from error
    except ValueError as error:
        raise click.ClickException(str(error)) from error
    signature = path.with_name(path.name + ".sig")
    # Replaced whole: a backend may read it at any moment.
    made = signature.with_name(signature.name + ".new")
    made.write_text(held.sign(SIGNED + data).hex() + "\n")
    made.replace(signature)
    click.echo(f"{signature}: serial {found.serial}, {len(found.caller)} callers")


@callers.command()
@click.argument("path", type=FILE)
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), required=True, help="The disk's image.")
def disk(path: Path, out: Path) -> None:
    """Put the signed list PATH on a raw disk, for the virtual machine's image.

    An existing image is written in place, so that a running machine sees the change.
    """
    from adytum.inference.gateway.callers.disk import pack

    try:
        made = pack(path.read_bytes(), path.with_name(path.name + ".sig").read_text().strip())
    except (OSError, ValueError) as error:
        raise click.ClickException(f"{path}: {error}; `adytum callers sign` comes first") from error
    descriptor = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
    with os.fdopen(descriptor, "wb") as file:
        file.write(made)
        file.flush()
        os.fsync(descriptor)
    click.echo(f"{out}: {len(made):,} bytes; attach it read-only, as the disk with serial number callers")


@callers.command()
@click.argument("path", type=FILE)
@click.option("--signed-by", required=True, metavar="HEX", help="callers.signed_by of the configuration.")
def check(path: Path, signed_by: str) -> None:
    """Show how a backend would read the list PATH."""
    from adytum.inference.gateway.callers.callers import CallerList, CallersError, expires_text

    try:
        found = CallerList.load(path, bytes.fromhex(signed_by))
    except ValueError as error:
        raise click.ClickException("--signed-by is 64 hexadecimal digits") from error
    except CallersError as error:
        raise click.ClickException(f"{path}: {error}") from error
    click.echo(f"serial {found.serial}")
    for caller in found.caller:
        limits = [
            f"{value:,} {name.replace('_', ' ')}"
            for name in ("requests_per_minute", "tokens_per_minute", "concurrent")
            if (value := getattr(caller, name)) is not None
        ]
        models = ", ".join(sorted(caller.models)) if caller.models else "all models"
        click.echo(f"{caller.name}: {models}; {', '.join(limits) or 'no limits'}; expires {expires_text(caller)}")
