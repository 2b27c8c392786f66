"""`adytum serve`: the backend."""

import sys
from pathlib import Path

import click

from adytum.inference.cli.files import FILE


@click.command()
@click.option("--config", "path", type=FILE, required=True, help="The backend's TOML file.")
@click.option("--check", is_flag=True, help="Check the file and stop.")
def serve(path: Path, check: bool) -> None:
    """Start the backend: gateway and engines."""
    # Imported here: the client's commands need neither the web framework nor the engines' code.
    from adytum.inference.backend import start
    from adytum.inference.core import config, logs

    try:
        loaded = config.load(path)
    except config.ConfigError as error:
        raise click.ClickException(str(error)) from error
    logs.configure(loaded.server.log)
    if check:
        click.echo(f"{path} is valid; its SHA-256, as evidence shows it: {loaded.sha256.hex()}")
        return
    sys.exit(0 if start.serve(loaded) else 1)
