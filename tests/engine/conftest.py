"""What the engine tests share: the engines' interpreter and the demo models, which `make test` provides."""

from collections.abc import Callable
from pathlib import Path

import pytest

from inference.engine.process import EngineSpec

ROOT = Path(__file__).resolve().parent.parent.parent


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
