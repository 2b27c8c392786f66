"""`adytum models ...`: manifests, the plan of a GPU's memory, golden answers."""

import asyncio
from pathlib import Path

import click

CONFIG = click.Path(exists=True, dir_okay=False, path_type=Path)
FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)


@click.group()
def models() -> None:
    """The models' files, their memory on a GPU, their golden answers."""


@models.command()
@click.argument("folder", type=FOLDER)
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="Default: FOLDER/adytum-manifest.json.")
@click.option("--repository", help="The hub id that the files come from; with --revision.")
@click.option("--revision", help="Its commit, 40 hexadecimal digits.")
def lock(folder: Path, out: Path | None, repository: str | None, revision: str | None) -> None:
    """Write a manifest of FOLDER's files and print its root, which evidence shows."""
    from adytum.inference.engine.weights import weights
    from adytum.inference.engine.weights.progress import ProgressLine

    if (repository is None) != (revision is None):
        raise click.UsageError("--repository and --revision go together")
    try:
        source = weights.Source(repository, revision) if repository is not None and revision is not None else None
        progress = ProgressLine("hashing", lambda line: click.echo(line, err=True))
        manifest = weights.lock(folder, source, progress=progress)
        manifest.save(out or folder / weights.NAME)
    except (weights.WeightsError, OSError) as error:
        raise click.ClickException(str(error)) from error
    click.echo(manifest.root.hex())


@models.command()
@click.option("--config", "path", required=True, type=CONFIG, help="The backend's configuration.")
@click.option("--gpu-memory", help='Default: engines.gpu_memory. A card\'s size ("80GB") or exact ("81559MiB").')
@click.option("--length", type=click.IntRange(min=1), help="Tokens per sequence to count with.")
def plan(path: Path, gpu_memory: str | None, length: int | None) -> None:
    """Show how the models share one GPU's memory, without loading any weights."""
    from adytum.inference.core import config as configuration
    from adytum.inference.engine.placement.placement import PlacementError, plan_command

    try:
        config = configuration.load(path)
        memory = gpu_memory or config.engines.gpu_memory
        if memory is None:
            raise click.UsageError('the GPU\'s memory is missing: give --gpu-memory "80GB", or set engines.gpu_memory')
        click.echo(plan_command(config, memory, length or config.engines.plan_length))
    except (configuration.ConfigError, PlacementError) as error:
        raise click.ClickException(str(error)) from error


@models.command()
@click.option("--config", "path", required=True, type=CONFIG, help="The backend's configuration.")
@click.option("--model", "chosen", multiple=True, metavar="ID", help="Only this one; may be given several times.")
@click.option("--missing", is_flag=True, help="Only for models that have none for their weights.")
def canary(path: Path, chosen: tuple[str, ...], missing: bool) -> None:
    """Start the engines, ask them the fixed questions, and keep their answers as the golden ones.

    Do it where you trust the weights and the machine: later answers must equal these.
    """
    from adytum.inference.backend.golden import make_golden
    from adytum.inference.core import config as configuration
    from adytum.inference.core.lifecycle import StepFailed
    from adytum.inference.engine.run.process import EngineError
    from adytum.inference.engine.supervise.canary import CanaryFailed

    try:
        config = configuration.load(path)
        unknown = set(chosen) - {model.id for model in config.models}
        if unknown:
            raise click.UsageError(f"the configuration has no model {', '.join(sorted(unknown))}")
        for made in asyncio.run(make_golden(config, frozenset(chosen), missing=missing)):
            click.echo(made)
    except (configuration.ConfigError, StepFailed, EngineError, CanaryFailed, OSError) as error:
        raise click.ClickException(str(error)) from error
