"""`python -m adytum.deploy.launch`: preflight | cc-mode | qemu | libvirt | start."""

import os
import shlex
import sys
from pathlib import Path

import click

from adytum.deploy.launch import gpu, libvirt, preflight, qemu
from adytum.deploy.launch.config import Config, LaunchError, check_measured, command_line, load
from adytum.deploy.launch.host import Host
from adytum.inference.preflight.table import as_text

FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Start confidential VMs on this host."""


@main.command("preflight")
@click.argument("path", type=FILE, required=False)
@click.option("--root", type=FOLDER, default=Path("/"), help="Judge a recorded host instead: a folder with its files.")
def preflight_(path: Path | None, root: Path) -> None:
    """Say what this host lacks, for the machine in the file PATH. Exit status 1 if it lacks something."""
    config = None if path is None else _load(path)
    found = preflight.rows(Host(root), config)
    click.echo(as_text(found, colour=sys.stdout.isatty()))
    sys.exit(0 if preflight.ready(found) else 1)


@main.command("cc-mode")
@click.argument("path", type=FILE)
@click.option("--set-on", is_flag=True, help="Set it to on and reset the GPUs. Nothing else may use them.")
def cc_mode(path: Path, set_on: bool) -> None:
    """Show the GPUs' confidential-computing mode, or set it, with NVIDIA's tool."""
    config = _load(path)
    try:
        if set_on:
            gpu.switch_on(config)
        for device, mode in gpu.query(config).items():
            click.echo(f"{device}  {mode}")
    except LaunchError as error:
        raise click.ClickException(str(error)) from error


@main.command("qemu")
@click.argument("path", type=FILE)
def qemu_(path: Path) -> None:
    """Print QEMU's command line."""
    _, arguments = _prepare(_load(path))
    click.echo(shlex.join(arguments))


@main.command("libvirt")
@click.argument("path", type=FILE)
def libvirt_(path: Path) -> None:
    """Print the libvirt domain."""
    config = _load(path)
    try:
        cmdline = command_line(config)
        check_measured(config, cmdline)
        click.echo(libvirt.domain(config, cmdline, _cbitpos(config)), nl=False)
    except LaunchError as error:
        raise click.UsageError(str(error)) from error


@main.command()
@click.argument("path", type=FILE)
def start(path: Path) -> None:
    """Check the host, the GPUs and the measurement, then become QEMU."""
    config = _load(path)
    measurement, arguments = _prepare(config)
    found = preflight.rows(Host(), config)
    if not preflight.ready(found):
        click.echo(as_text(found, colour=sys.stdout.isatty()))
        raise click.ClickException("this host cannot start the machine: see the rows that are not ok")
    try:
        if config.gpus is not None:
            gpu.require_on(config)
        Path(config.run_folder).mkdir(mode=0o700, parents=True, exist_ok=True)
        click.echo(f"{config.name} will measure {measurement.hex()}", err=True)
        os.execv(arguments[0], arguments)  # noqa: S606 - the program that the operator's file names
    except LaunchError as error:
        raise click.ClickException(str(error)) from error
    except OSError as error:
        raise click.ClickException(f"{config.qemu} cannot be started: {error.strerror}") from error


def _load(path: Path) -> Config:
    try:
        return load(path)
    except LaunchError as error:
        raise click.UsageError(str(error)) from error


def _prepare(config: Config) -> tuple[bytes, list[str]]:
    try:
        cmdline = command_line(config)
        measurement = check_measured(config, cmdline)
        return measurement, qemu.arguments(config, cmdline, _cbitpos(config))
    except LaunchError as error:
        raise click.UsageError(str(error)) from error


def _cbitpos(config: Config) -> int:
    if config.snp.cbitpos != "cpuid":
        return config.snp.cbitpos
    found = Host().cbitpos()
    if found is None:
        raise LaunchError("the processor cannot be asked: `modprobe cpuid` and run as root, or write snp.cbitpos = 51")
    return found


if __name__ == "__main__":
    main(prog_name="python -m adytum.deploy.launch")
