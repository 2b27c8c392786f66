"""The demo's processes as context managers: they end with the context, and also if this process is killed."""

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import time
import tomllib
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "deploy" / "config" / "demo.toml"
POLICY = ROOT / "deploy" / "config" / "demo-policy.toml"
_PR_SET_PDEATHSIG = 1
_STOP_SECONDS = 45


class Failed(Exception):
    """A process ended or did not start to serve. The message names its log."""


@contextlib.contextmanager
def backend(port: int) -> Iterator[int]:
    """The demo backend on `port`, once it serves. Yields its process id. Raises `Failed`."""
    runtime = ROOT / "var" / "run"
    runtime.mkdir(parents=True, exist_ok=True, mode=0o700)
    config = _with_port(port, runtime)
    log = runtime / "backend.log"
    command = [sys.executable, "-m", "adytum.inference", "serve", "--config", str(config)]
    with _process(command, log, "the backend") as process:
        started = time.monotonic()
        step = ""
        while step != "SERVING":
            if process.poll() is not None:
                raise Failed(f"the backend ended while starting; its log is {log}:\n{_last_lines(log)}")
            state = _json(f"http://127.0.0.1:{port}/readyz")
            if state and state["step"] != step:
                step = state["step"]
                waits_for = "" if step == "SERVING" else f": {state['waits_for']}"
                print(f"[{time.monotonic() - started:5.1f} s] {step}{waits_for}", flush=True)
            time.sleep(0.2)
        yield process.pid


@contextlib.contextmanager
def proxy(upstream_port: int, port: int) -> Iterator[None]:
    """The client proxy on `port`. Raises `Failed`."""
    log = ROOT / "var" / "run" / "proxy.log"
    command = [sys.executable, "-m", "adytum.inference", "proxy", "--upstream", f"http://127.0.0.1:{upstream_port}"]
    command += ["--port", str(port), "--policy", str(POLICY), "--workspace", str(ROOT / "var" / "evidence")]
    with _process(command, log, "the proxy") as process:
        while _json(f"http://127.0.0.1:{port}/healthz") is None:
            if process.poll() is not None:
                raise Failed(f"the proxy ended while starting; its log is {log}:\n{_last_lines(log)}")
            time.sleep(0.1)
        yield


@contextlib.contextmanager
def _process(command: list[str], log: Path, name: str) -> Iterator[subprocess.Popen[bytes]]:
    parent = os.getpid()

    def bound_to_parent() -> None:
        # In a session of its own: Ctrl-C reaches this script only, which then stops the processes in order. If this
        # script is killed, the kernel ends them.
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:
            os._exit(1)

    with log.open("wb") as out:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=bound_to_parent,
        )
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            print(f"{name} did not stop in {_STOP_SECONDS} s and is killed", file=sys.stderr)
            process.kill()
            process.wait()


def _with_port(port: int, runtime: Path) -> Path:
    """The demo's configuration, or a copy with another port."""
    text = CONFIG.read_text()
    if tomllib.loads(text)["server"]["port"] == port:
        return CONFIG
    lines = [f"port = {port}" if line.startswith("port = ") else line for line in text.splitlines()]
    changed = runtime / "demo.toml"
    changed.write_text("\n".join(lines) + "\n")
    return changed


def _json(url: str) -> dict[str, Any] | None:
    try:
        with urllib.request.urlopen(url, timeout=2) as answer:  # noqa: S310 (a loopback URL built here)
            value: dict[str, Any] = json.load(answer)
            return value
    except urllib.error.HTTPError as error:
        # /readyz answers 503 with the step until the backend serves.
        with contextlib.suppress(ValueError):
            value = json.loads(error.read())
            return value if "step" in value else None
        return None
    except (OSError, ValueError):
        return None


def _last_lines(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-15:])
