"""`adytum preflight`: whether this machine can serve confidentially."""

import sys

import click


@click.command()
@click.option("--require", type=click.Choice(["cc-on"]), help="Exit with 1 unless the machine can serve in this mode.")
@click.option("--json", "as_json", is_flag=True, help="For machines.")
def preflight(require: str | None, as_json: bool) -> None:
    """Show what of this machine is ready for confidential inference, and what to do about the rest."""
    from adytum.inference.preflight import Probe, as_text, meets, rows
    from adytum.inference.preflight import as_json as to_json

    found = rows(Probe())
    click.echo(to_json(found) if as_json else as_text(found, colour=sys.stdout.isatty()))
    if require is not None and not meets(found, require):
        sys.exit(1)
