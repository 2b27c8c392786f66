"""`adytum proxy`: the local client."""

from pathlib import Path

import click

from adytum.inference.cli.files import FILE

FOLDER = click.Path(file_okay=False, path_type=Path)


@click.command()
@click.option(
    "--upstream",
    "upstreams",
    required=True,
    multiple=True,
    metavar="URL",
    help="The backend, for example https://llm.example.org. Several: repeat it; each is verified before it is used.",
)
@click.option("--policy", type=FILE, required=True, help="The appraisal policy that its evidence must meet.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", default=9876, show_default=True, type=click.IntRange(0, 65535), help="Port to listen on.")
@click.option("--api-key", envvar="ADYTUM_API_KEY", help="Sent inside the channel. Default: the caller's own key.")
@click.option("--workspace", type=FOLDER, help="Keeps each accepted evidence document, and a log of them, here.")
@click.option(
    "--kem", type=click.Choice(["mlkem768-x25519", "x25519"]), help="Only this KEM. Default: the best offered."
)
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
    from adytum.inference.client.proxy import run_proxy

    run_proxy(
        upstreams=upstreams, host=host, port=port, policy_path=policy, api_key=api_key, workspace=workspace, kem=kem
    )
