"""What a backend needs of its machine before it makes anything. Each function raises `StepFailed`."""

import resource
import subprocess

from adytum.inference.core.config import Config
from adytum.inference.core.lifecycle import StepFailed
from adytum.inference.engine.run.process import LAUNCHER

_OTHER_FILES = 512


def check_engine_environment(config: Config) -> None:
    """Looks for the engines' own Python."""
    if not config.engines.python.exists():
        raise StepFailed(f"engines.python: {config.engines.python} is not there; `make engine-env` installs it")


def raise_open_files(config: Config) -> None:
    """Raises the limit of open files to what the configured connections need."""
    needed = config.server.max_connections + sum(model.max_requests for model in config.models) + _OTHER_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise StepFailed(
            f"server.max_connections = {config.server.max_connections} needs {needed} open files, and the limit is "
            f"{hard}: raise it (LimitNOFILE= in the unit, ulimit -n in a shell), or lower max_connections"
        )
    if soft != resource.RLIM_INFINITY and soft < needed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def make_runtime_directory(config: Config) -> None:
    """Makes the folder of sockets and logs, for this user only."""
    folder = config.engines.runtime_directory
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        folder.chmod(0o700)
    except OSError as error:
        raise StepFailed(f"engines.runtime_directory: {folder}: {error.strerror}") from error


def probe_sandbox(config: Config) -> None:
    """Tries the sandbox, so that a kernel that refuses it is known before anything else."""
    if config.engines.sandbox == "none":
        return
    command = [str(config.engines.python), "-P", str(LAUNCHER), "--probe"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, env={}, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise StepFailed(f"{config.engines.python} cannot be run: {error}") from error
    if done.returncode != 0:
        said = done.stderr.strip().splitlines() or ["no reason given"]
        raise StepFailed(f'{said[-1]} Or set engines.sandbox = "none", which the evidence shows')
