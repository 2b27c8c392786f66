"""Our own client reads an answer however the network cuts it and wherever padding stands."""

import asyncio
import time

import pytest

from adytum.benchmarks.load import load
from adytum.benchmarks.load.load import Sample

EVENTS = b"".join(
    b'data: {"choices":[{"delta":{"content":"%d"}}],"usage":null}\n\n: %b\n\n' % (i, b"x" * 300) for i in range(20)
)
FILLER = b": " + b"x" * 9000 + b"\n\n"
USAGE = b'data: {"choices":[],"usage":{"prompt_tokens":7,"completion_tokens":20}}\n\n'
STREAM = EVENTS + USAGE + FILLER + b"data: [DONE]\n\n" + FILLER


@pytest.mark.parametrize("size", [1, 13, 512, 2048, 100_000])
def test_usage_and_end_are_found(size: int) -> None:
    sample = Sample()
    events = load._Events(sample, time.perf_counter())
    for at in range(0, len(STREAM), size):
        events.feed(STREAM[at : at + size])
    events.finish()
    assert (sample.tokens, sample.prompt_tokens) == (20, 7)
    if size >= 2048:
        # Cut within the few bytes that mark one, an event would not be counted.
        assert len(sample.arrivals) >= 20 - len(STREAM) // size - 1


@pytest.mark.parametrize("stream", [EVENTS, EVENTS + USAGE, EVENTS + b"data: [DONE]\n\n"])
def test_a_cut_answer_is_none(stream: bytes) -> None:
    events = load._Events(Sample(), time.perf_counter())
    events.feed(stream)
    with pytest.raises(RuntimeError, match="not complete"):
        events.finish()


class _Clock:
    """Answers at once and notes when it was asked."""

    name = "clock"

    def __init__(self) -> None:
        self.asked: list[float] = []

    async def ask(self, body: bytes, sample: Sample) -> None:
        self.asked.append(time.perf_counter())
        if body == b"fails":
            raise RuntimeError("as asked")

    async def close(self) -> None: ...


def test_poisson_takes_the_time_of_its_rate() -> None:
    clock = _Clock()
    for _ in range(20):
        clock.asked.clear()
        samples, wall = asyncio.run(load.poisson(clock, [b"x"] * 40, 100.0, 1))
        assert len(samples) == 40
        assert wall >= 0.4
        # A busy machine is late now and then.
        if wall < 0.7:
            break
    assert wall < 0.7
    gaps = [b - a for a, b in zip(clock.asked, clock.asked[1:], strict=False)]
    assert max(gaps) > 3 * sum(gaps) / len(gaps) > 0, "not evenly spaced"


def test_a_failure_is_kept() -> None:
    samples, _ = asyncio.run(load.closed(_Clock(), [b"x", b"fails", b"x"], 2))
    assert sorted(sample.error for sample in samples) == ["", "", "RuntimeError: as asked"]
