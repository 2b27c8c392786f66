"""`python -m adytum.benchmarks.gpu.memory CONFIG`: the memory that the plan predicts and what the driver reports."""

import json
import sys
from pathlib import Path

import click
import pynvml  # type: ignore[import-untyped]  # NVIDIA ships no types.

from adytum.inference.core.config import load
from adytum.inference.engine.placement import placement, shapes


def main() -> None:
    """Prints JSON: bytes predicted for the engine, and bytes that the processes on the GPU hold together."""
    config = load(Path(sys.argv[1]))
    pynvml.nvmlInit()
    handle = pynvml.nvmlDeviceGetHandleByIndex(config.engines.gpu_index)
    total = int(pynvml.nvmlDeviceGetMemoryInfo(handle).total)
    found = {model.id: shapes.read(Path(model.source)) for model in config.models}
    planned = placement.plan(config, found, total)
    held = sum(int(process.usedGpuMemory or 0) for process in pynvml.nvmlDeviceGetComputeRunningProcesses(handle))
    if held == 0:
        raise click.ClickException("the driver names no process on the GPU with memory: nothing was measured")
    predicted = sum(engine.total for engine in planned.engines)
    click.echo(json.dumps({"predicted": predicted, "measured": held, "ratio": held / predicted, "gpu": total}))


if __name__ == "__main__":
    main()
