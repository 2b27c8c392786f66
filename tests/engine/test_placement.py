"""The plan's numbers given to a real engine: it starts with what the plan says, and not with less."""

import asyncio
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from adytum.inference.engine.placement.placement import Blocks
from adytum.inference.engine.placement.shapes import read
from adytum.inference.engine.run.process import Engine, EngineError, EngineSpec


def test_vllm_starts_with_what_is_needed_and_not_with_a_block_less(
    models: Path, spec: Callable[..., EngineSpec]
) -> None:
    """A real engine with a window: its first sequence needs more than it will keep. A CPU has one step in flight."""
    blocks = Blocks.of(read(models / "gemma3"), 2, 256, tokens=128)
    needed = blocks.needed(1, 2048)
    assert needed == (1 + blocks.first(2048)) * blocks.block_bytes
    assert blocks.sequence(2048) < blocks.first(2048)

    async def start(size: int) -> None:
        limits = ("--max-model-len", "2048", "--max-num-batched-tokens", "256", "--max-num-seqs", "64")
        placement = ("--kv-cache-memory-bytes", str(size), *limits)
        engine = Engine(spec(model=str(models / "gemma3"), tool_parser=None, placement=placement))
        await engine.start()
        try:
            await engine.wait_ready(240)
        finally:
            await engine.stop()

    asyncio.run(start(needed))
    log = spec().log.read_text()
    printed = re.search(r"Maximum concurrency for 2,048 tokens per request: ([0-9.]+)x", log)
    assert printed is not None
    assert float(printed[1]) == pytest.approx((1 + blocks.first(2048)) / blocks.first(2048), abs=0.005)
    with pytest.raises(EngineError, match="while starting"):
        asyncio.run(start(needed - blocks.block_bytes))
    assert "to serve at least one request" in spec().log.read_text().removeprefix(log).lower()
