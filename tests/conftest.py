"""What all tests share: the repository's paths and one running backend with its three real engines."""

import json
import os
import socket
import subprocess
import time
import tomllib
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import coverage
import pytest

from adytum.inference.engine.run.process import EngineSpec
from tests.support import Wire, backend_command, config_text

ROOT = Path(__file__).resolve().parent.parent
VECTORS = ROOT.parent / "shared" / "vectors"
API_KEY = "sk-canary-7f3a9d1e5b"
READY_SECONDS = 900
"""For a backend to start on a busy machine; by itself it takes half a minute."""
ENGINE_FIXTURES = {"backend", "engine_python", "models"}
"""Of this file; a test that depends on one needs vLLM or the demonstration's models."""

pytest_plugins = ("tests.skips",)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks what needs vLLM `engine`. A test that gets at it in another way carries the mark in its source."""
    for item in items:
        known = item._fixtureinfo.name2fixturedefs if isinstance(item, pytest.Function) else {}
        # Other fixtures and parameters may have these names too.
        if any(
            definition.func.__module__ == __name__ for name in ENGINE_FIXTURES for definition in known.get(name, ())
        ):
            item.add_marker("engine")
        if item.get_closest_marker("engine") and not item.get_closest_marker("timeout"):
            # Engines start several times more slowly on a machine with other work.
            item.add_marker(pytest.mark.timeout(1200))


@pytest.fixture
def untraced() -> Iterator[None]:
    """For tests that time our code: coverage would make it several times slower, so it does not count here."""
    counting = coverage.Coverage.current()
    if counting is not None:
        counting.stop()
    yield
    if counting is not None:
        counting.start()


@pytest.fixture(scope="session")
def vectors() -> Path:
    """Recorded evidence and wire vectors, kept outside the repository."""
    if not VECTORS.is_dir():
        pytest.skip("the shared vectors are not beside this checkout")
    return VECTORS


@pytest.fixture(scope="session")
def engine_python() -> Path:
    python = ROOT / ".venv-engine" / "bin" / "python"
    assert python.exists(), "no engines' environment: run the tests with `make test`"
    return python


@pytest.fixture(scope="session")
def models() -> Path:
    folder = ROOT / "var" / "models"
    assert (folder / "llama-awq").is_dir(), "no demo models: run the tests with `make test`"
    return folder


@pytest.fixture
def spec(engine_python: Path, models: Path, tmp_path: Path) -> Callable[..., EngineSpec]:
    """Makes specifications of the demo Llama; keyword arguments replace fields."""

    def make(**changes: object) -> EngineSpec:
        fields: dict[str, object] = {
            "id": "demo/llama-awq",
            "model": str(models / "llama-awq"),
            "task": "generate",
            "python": engine_python,
            "socket": tmp_path / "run" / "llama.sock",
            "log": tmp_path / "llama.log",
            "placement": ("--kv-cache-memory-bytes", str(64 * 1024 * 1024), "--max-num-seqs", "64"),
            "tool_parser": "llama3_json",
            "sandbox": False,
        }
        return EngineSpec(**{**fields, **changes})  # type: ignore[arg-type]

    return make


@dataclass(frozen=True)
class RunningBackend:
    """A backend with real engines, started as an operator would."""

    url: str
    api_key: str
    policy_path: Path
    config_path: Path
    log_path: Path
    sockets: dict[str, Path]
    process: subprocess.Popen[bytes]
    wire: Wire
    llama: str = "demo/llama-awq"
    gemma: str = "demo/gemma3"
    e5: str = "demo/e5"


def free_port() -> int:
    """A TCP port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_until_serving(url: str, process: subprocess.Popen[bytes], log: Path, seconds: float = READY_SECONDS) -> None:
    """Returns once `/readyz` says SERVING; fails with the log if the process ends or time runs out."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if process.poll() is not None:
            pytest.fail(f"the backend ended with status {process.returncode}:\n{log.read_text()[-4000:]}")
        try:
            with urllib.request.urlopen(f"{url}/readyz", timeout=5) as answer:
                assert json.load(answer)["step"] == "SERVING"
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    pytest.fail(f"the backend was not serving after {seconds} s:\n{log.read_text()[-4000:]}")


@pytest.fixture(scope="session")
def backend(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningBackend]:
    """One backend for the whole run: the demo's configuration, API keys required, a runtime folder of its own."""
    folder = tmp_path_factory.mktemp("backend")
    port = free_port()
    config_path = folder / "backend.toml"
    config_path.write_text(config_text(port=port, runtime=folder / "run", api_keys=[API_KEY]))
    policy_path = ROOT / "deploy" / "config" / "demo-policy.toml"
    log_path = folder / "backend.log"
    with log_path.open("wb") as log:
        process = subprocess.Popen(
            backend_command(config_path),
            cwd=ROOT,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, "ADYTUM_CANARY": "env-canary-4c1f"},
        )
    try:
        wait_until_serving(f"http://127.0.0.1:{port}", process, log_path)
        ids = [model["id"] for model in tomllib.loads(config_path.read_text())["models"]]
        yield RunningBackend(
            url=f"http://127.0.0.1:{port}",
            api_key=API_KEY,
            policy_path=policy_path,
            config_path=config_path,
            log_path=log_path,
            sockets={name: folder / "run" / name.replace("/", "-") / "engine.sock" for name in ids},
            process=process,
            wire=Wire(port),
        )
    finally:
        process.terminate()
        process.wait(60)
