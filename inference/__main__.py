"""The command line: `cloister serve | preflight | proxy | policy | models | callers | measure | release`."""

import logging
import sys
from pathlib import Path

import click

from inference.callers_commands import callers
from inference.measure_commands import measure
from inference.models_commands import models
from inference.policy_commands import policy
from inference.release_commands import release

FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
FOLDER = click.Path(file_okay=False, path_type=Path)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="cloister")
def main() -> None:
    """Confidential inference: requests are opened only inside the TEE, answers sealed for the client that asked."""
    logging.basicConfig(
        level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s %(message)s", datefmt="%Y-%m-%dT%H:%M:%S%z"
    )
    logging.getLogger("cloister").setLevel(logging.INFO)


@main.command()
@click.option("--config", "path", type=FILE, required=True, help="The backend's TOML file.")
@click.option("--check", is_flag=True, help="Check the file and stop.")
def serve(path: Path, check: bool) -> None:
    """Start the backend: gateway and engines."""
    # Imported here: the client's commands need neither the web framework nor the engines' code.
    from inference import app, config, logs

    try:
        loaded = config.load(path)
    except config.ConfigError as error:
        raise click.ClickException(str(error)) from error
    logs.configure(loaded.server.log)
    if check:
        click.echo(f"{path} is valid; its SHA-256, as evidence shows it: {loaded.sha256.hex()}")
        return
    sys.exit(0 if app.serve(loaded) else 1)


@main.command()
@click.option(
    "--upstream",
    "upstreams",
    required=True,
    multiple=True,
    metavar="URL",
    help="The backend, for example https://llm.example.org. Several: repeat it; each is verified before it is used.",
)
@click.option("--policy", type=FILE, required=True, help="The appraisal policy that its evidence has to meet.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", default=9876, show_default=True, type=click.IntRange(0, 65535), help="Port to listen on.")
@click.option("--api-key", envvar="CLOISTER_API_KEY", help="Sent inside the channel; else the caller's own key is.")
@click.option("--workspace", type=FOLDER, help="Keeps each accepted evidence document, and a log of them, here.")
@click.option("--kem", type=click.Choice(["mlkem768-x25519", "x25519"]), help="Only this KEM; else the best offered.")
def proxy(
    upstreams: tuple[str, ...],
    policy: Path,
    host: str,
    port: int,
    api_key: str | None,
    workspace: Path | None,
    kem: str | None,
) -> None:
    """Start the local client: an OpenAI-compatible endpoint that verifies the backend before it sends anything."""
    from inference.client.proxy import run_proxy

    run_proxy(
        upstreams=upstreams, host=host, port=port, policy_path=policy, api_key=api_key, workspace=workspace, kem=kem
    )


@main.command()
@click.option("--require", type=click.Choice(["cc-on"]), help="Exit with 1 unless the machine can serve in this mode.")
@click.option("--json", "as_json", is_flag=True, help="For machines.")
def preflight(require: str | None, as_json: bool) -> None:
    """Say what of this machine is as confidential inference needs it, and what to do about the rest."""
    from inference.preflight import Probe, as_text, meets, rows
    from inference.preflight import as_json as to_json

    found = rows(Probe())
    click.echo(to_json(found) if as_json else as_text(found, colour=sys.stdout.isatty()))
    if require is not None and not meets(found, require):
        sys.exit(1)


main.add_command(models)
main.add_command(callers)
main.add_command(measure)
main.add_command(policy)
main.add_command(release)


if __name__ == "__main__":
    main(prog_name="cloister")
