"""`adytum`: the group of all commands, and what to install if a command needs an extra that is missing."""

import logging

import click

from adytum.inference.cli.callers import callers
from adytum.inference.cli.measure import measure
from adytum.inference.cli.models import models
from adytum.inference.cli.policy import policy
from adytum.inference.cli.preflight import preflight
from adytum.inference.cli.proxy import proxy
from adytum.inference.cli.release import release
from adytum.inference.cli.serve import serve

EXTRAS = {
    **dict.fromkeys(
        ("fastapi", "httptools", "prometheus_client", "pydantic", "pynvml", "starlette", "uvicorn", "uvloop"), "server"
    ),
    "dcap_qvl": "tdx",
    "sevsnpmeasure": "measure",
}
"""Modules that a client's installation does not have, and the extra of adytum that brings each."""


class _Commands(click.Group):
    def invoke(self, ctx: click.Context) -> object:
        """Runs the command. Its module imports what only it needs when it runs, so that a client installs little."""
        try:
            return super().invoke(ctx)
        except ModuleNotFoundError as error:
            extra = EXTRAS.get((error.name or "").partition(".")[0])
            if extra is None:
                raise
            raise click.ClickException(
                f"this command needs the package {error.name}; run: pip install 'adytum[{extra}]'"
            ) from error


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="adytum")
def main() -> None:
    """Confidential inference: requests are opened only inside the TEE, answers sealed for the client that asked."""
    logging.basicConfig(
        level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s %(message)s", datefmt="%Y-%m-%dT%H:%M:%S%z"
    )
    logging.getLogger("adytum").setLevel(logging.INFO)


for command in (serve, preflight, proxy, policy, models, callers, measure, release):
    main.add_command(command)
