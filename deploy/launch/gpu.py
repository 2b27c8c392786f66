"""The GPUs' confidential-computing mode. This only calls NVIDIA's own tool (gpu-admin-tools)."""

import re
import subprocess
import sys

from adytum.deploy.launch.config import Config, LaunchError

_SECONDS = 300.0


def query(config: Config) -> dict[str, str]:
    """The mode of each GPU: on, off or devtools. Raises `LaunchError`, also if the tool does not report one."""
    found: dict[str, str] = {}
    for device in _devices(config):
        said = _run(config, device, "--query-cc-mode")
        # "2026-11-23,12:00:00.000 INFO     GPU 0000:21:00.0 H100 0x2331 BAR0 0x... CC mode is on"
        modes = set(re.findall(rf"GPU {re.escape(device)} .*CC mode is (\S+)", said))
        if len(modes) != 1 or not modes <= {"on", "off", "devtools"}:
            raise LaunchError(f"NVIDIA's tool does not report the CC mode of {device}; it said: {_last(said)}")
        found[device] = modes.pop()
    return found


def switch_on(config: Config) -> None:
    """Sets CC mode on, resets each GPU and asks again. Raises `LaunchError`."""
    for device in _devices(config):
        _run(config, device, "--set-cc-mode=on", "--reset-after-cc-mode-switch")
    require_on(config)


def require_on(config: Config) -> None:
    """Raises `LaunchError` unless the mode of each GPU is on."""
    for device, mode in query(config).items():
        if mode != "on":
            raise LaunchError(
                f"the CC mode of {device} is {mode}; run: python -m adytum.deploy.launch cc-mode FILE --set-on"
            )


def _devices(config: Config) -> tuple[str, ...]:
    if config.gpus is None:
        raise LaunchError("the file has no [gpus]")
    return config.gpus.devices


def _run(config: Config, device: str, *arguments: str) -> str:
    assert config.gpus is not None
    # Run with this Python: the tool is a script without dependencies, and need not be executable.
    command = [sys.executable, config.gpus.admin_tool, f"--gpu-bdf={device.removeprefix('0000:')}", *arguments]
    try:
        done = subprocess.run(command, capture_output=True, timeout=_SECONDS, check=False)  # noqa: S603 - NVIDIA's tool
    except (OSError, subprocess.TimeoutExpired) as error:
        raise LaunchError(f"NVIDIA's tool cannot be run: {error}") from error
    # Its log may be on either.
    said = (done.stdout + done.stderr).decode("utf-8", "replace")
    if done.returncode != 0:
        raise LaunchError(f"NVIDIA's tool failed on {device} ({done.returncode}); it said: {_last(said)}")
    return said


def _last(said: str) -> str:
    lines = [line for line in said.splitlines() if line.strip()]
    return "".join(char if char.isprintable() else "?" for char in lines[-1]) if lines else "nothing"
