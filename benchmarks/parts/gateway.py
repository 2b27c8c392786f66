"""What the gateway adds if nothing else competes for the cores: a synthetic engine emits events at a set rate.

    python -m adytum.benchmarks.parts.gateway [--concurrency 1 32] [--repetitions 10]

The engine stamps each event with the machine's monotonic clock, so the way of each event to the client is measured. Two
arms alternate: the engine's socket in the clear, and sealed through the gateway (X-Wing, padding on).
"""

import argparse
import asyncio
import json
import re
import tempfile
import time
from pathlib import Path

from aiohttp import web

from adytum.benchmarks.channel.gateway import gateway_process
from adytum.benchmarks.load import load
from adytum.benchmarks.load.load import Arm, Sample
from adytum.benchmarks.processes import cpu_ticks, python
from adytum.benchmarks.runfile import stats

EVENTS = 50
GAP_S = 0.02
_STAMP = re.compile(rb'"content":"(\d+)"')


async def _chat(request: web.Request) -> web.StreamResponse:
    await request.read()
    answer = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await answer.prepare(request)
    loop = asyncio.get_running_loop()
    due = loop.time()
    for _ in range(EVENTS):
        # The size of vLLM's own events.
        event = {
            "id": "chatcmpl-9f0123456789abcdef",
            "object": "chat.completion.chunk",
            "created": 1763859000,
            "model": "synthetic",
            "choices": [{"index": 0, "delta": {"content": "@"}, "logprobs": None, "finish_reason": None}],
        }
        data = json.dumps(event, separators=(",", ":")).encode().replace(b"@", b"%d" % time.monotonic_ns())
        await answer.write(b"data: " + data + b"\n\n")
        due += GAP_S
        await asyncio.sleep(max(0.0, due - loop.time()))
    await answer.write(b'data: {"choices":[],"usage":{"completion_tokens":%d}}\n\ndata: [DONE]\n\n' % EVENTS)
    return answer


def _engine(path: str) -> None:
    app = web.Application()
    app.router.add_post(load.PATH, _chat)
    web.run_app(app, path=path, print=None)


async def _measure(options: argparse.Namespace, path: Path, pid: int) -> None:
    url = f"http://127.0.0.1:{options.port}"
    plaintext: Arm = load.Plaintext(path)
    sealed: Arm = await connect(url)
    body = json.dumps(
        {"model": "latest", "stream": True, "messages": [], "stream_options": {"include_usage": True}}
    ).encode()
    print(
        f"{'streams':>7} {'events/s':>8} {'TTFT ms p50 plain/added':>24} {'p99 added':>9} "
        f"{'event ms p50 plain/added':>25} {'p99 added':>9} {'gateway us/event':>17}"
    )
    for concurrency in options.concurrency:
        ttft: dict[str, list[float]] = {"plaintext": [], "sealed": []}
        ways: dict[str, list[float]] = {"plaintext": [], "sealed": []}
        cpu = seconds = 0.0
        for repetition in range(options.repetitions + 1):
            for arm in (plaintext, sealed) if repetition % 2 == 0 else (sealed, plaintext):
                samples = [Sample(pieces=[]) for _ in range(concurrency)]
                before, start = cpu_ticks(pid), time.perf_counter()
                await asyncio.gather(*(_spread(arm, body, i, sample) for i, sample in enumerate(samples)))
                if repetition == 0:  # warm-up
                    continue
                if arm is sealed:
                    cpu += cpu_ticks(pid) - before
                seconds += time.perf_counter() - start
                ttft[arm.name] += [sample.ttft * 1000 for sample in samples]
                for sample in samples:
                    for arrived, data in sample.pieces or ():
                        ways[arm.name] += [(arrived - int(stamp)) / 1e6 for stamp in _STAMP.findall(data)]
        events = len(ways["sealed"])
        print(
            f"{concurrency:>7} {2 * events / seconds:>8.0f} {_added(ttft, 0.5):>24} {_difference(ttft, 0.99):>+9.2f} "
            f"{_added(ways, 0.5):>25} {_difference(ways, 0.99):>+9.2f} {cpu / events * 1e6:>17.0f}",
            flush=True,
        )
    await plaintext.close()
    await sealed.close()


async def _spread(arm: Arm, body: bytes, i: int, sample: Sample) -> None:
    # Starts are spread over one gap, because the cost of a request matters here, not the queueing of a burst.
    await asyncio.sleep(i * GAP_S / 8)
    await arm.ask(body, sample)


async def connect(url: str) -> Arm:
    for _ in range(100):
        try:
            return await load.Sealed.connect(url)
        except OSError:
            await asyncio.sleep(0.1)
    raise SystemExit("the gateway did not start")


def _difference(arms: dict[str, list[float]], share: float) -> float:
    return stats.percentile(arms["sealed"], share) - stats.percentile(arms["plaintext"], share)


def _added(arms: dict[str, list[float]], share: float) -> str:
    return f"{stats.percentile(arms['plaintext'], share):.2f}/{_difference(arms, share):+.2f}"


def main() -> None:
    """Starts engine and gateway as processes, measures, and ends them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--repetitions", type=int, default=10)
    parser.add_argument("--port", type=int, default=18080)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "engine.sock"
        with python(_engine, str(path)), python(gateway_process, str(path), options.port) as gateway:
            asyncio.run(_measure(options, path, gateway))


if __name__ == "__main__":
    main()
