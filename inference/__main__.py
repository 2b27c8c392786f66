"""The command line: `cloister serve | preflight | proxy | policy | models | callers`."""

import logging
import sys
from pathlib import Path

import click

from inference.callers_commands import callers
from inference.models_commands import models

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


@main.group()
def policy() -> None:
    """The appraisal policy of a client."""


@policy.command()
@click.option("--upstream", required=True, metavar="URL", help="The running backend.")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="Default: standard output.")
def init(upstream: str, out: Path | None) -> None:
    """Write a commented policy that accepts what a backend shows today. Compare it before you trust it."""
    import datetime
    import os

    from attestation.binding import NONCE_SIZE
    from attestation.checks import Checks
    from attestation.commands import NotFetched, Unusable, download
    from attestation.errors import AttestationError
    from attestation.policy_init import policy_from
    from attestation.trust import TrustRoots

    nonce, checks, now = os.urandom(NONCE_SIZE), Checks(), datetime.datetime.now(datetime.UTC)
    try:
        document = download(upstream, nonce)
        found, verified = policy_from(document, nonce=nonce, trust=TrustRoots(), now=now, checks=checks)
    except (AttestationError, NotFetched, Unusable) as error:
        raise click.ClickException(str(error)) from error
    for check in checks.not_given:
        click.echo(f"not checked: {check.says}", err=True)
    if verified.provider == "simulated":
        click.echo("The evidence is simulated: this policy protects against the network only.", err=True)
    text = f"# From the evidence of {upstream} at {now:%Y-%m-%dT%H:%M:%SZ}.\n{found.to_toml()}"
    if out is None:
        click.echo(text, nl=False)
    else:
        out.write_text(text)


main.add_command(models)
main.add_command(callers)


if __name__ == "__main__":
    main(prog_name="cloister")
