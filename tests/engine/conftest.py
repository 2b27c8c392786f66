"""What the engine tests share."""

from collections.abc import Callable
from pathlib import Path

import pytest

from adytum.inference.engine.run.process import EngineSpec


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
