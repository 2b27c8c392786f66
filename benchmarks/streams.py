"""Two thousand sealed streams at once through one gateway: what each takes of its memory, and whether any is lost.

    python -m benchmarks.streams [--streams 2000] [--events 20]

A synthetic engine emits an event a second per stream. Gateway, engine and clients are processes of their own on this
machine. A stream counts only where every event came and its end authenticated.
"""

import argparse
import asyncio
import json
import multiprocessing
import os
import resource
import tempfile
import time
from pathlib import Path

from aiohttp import web

from benchmarks import load
from benchmarks.gateway import connect, gateway_process
from benchmarks.load import Sample

_EVENT = (
    b'data: {"id":"chatcmpl-9f0123456789abcdef","object":"chat.completion.chunk","created":1763859000,'
    b'"model":"synthetic","choices":[{"index":0,"delta":{"content":"word"},"logprobs":null,"finish_reason":null}]}\n\n'
)
_PAGE = os.sysconf("SC_PAGE_SIZE")


async def _chat(request: web.Request) -> web.StreamResponse:
    events = int((await request.json())["max_tokens"])
    answer = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await answer.prepare(request)
    for _ in range(events):
        await answer.write(_EVENT)
        await asyncio.sleep(1)
    usage = {"prompt_tokens": 1, "completion_tokens": events}
    await answer.write(
        b"data: "
        + json.dumps({"choices": [], "usage": usage}, separators=(",", ":")).encode()
        + b"\n\ndata: [DONE]\n\n"
    )
    return answer


def _engine(path: str) -> None:
    _many_files()
    app = web.Application()
    app.router.add_post(load.PATH, _chat)
    web.run_app(app, path=path, print=None, backlog=4096)


def _many_files() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 65_536), hard))


def _gateway(path: str, port: int) -> None:
    _many_files()
    gateway_process(path, port)


def _resident(pid: int) -> int:
    """Bytes."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * _PAGE


async def _measure(options: argparse.Namespace, pid: int) -> None:
    sealed = await connect(f"http://127.0.0.1:{options.port}")
    body = json.dumps(
        {
            "model": "latest",
            "stream": True,
            "messages": [{"role": "user", "content": "x" * 400}],
            "stream_options": {"include_usage": True},
            "max_tokens": options.events,
        }
    ).encode()
    warm = body.replace(b'"max_tokens": %d' % options.events, b'"max_tokens": 1')
    for attempt in range(50):
        try:
            await sealed.ask(warm, Sample())
            break
        except RuntimeError:  # The engine does not listen yet.
            if attempt == 49:
                raise
            await asyncio.sleep(0.1)
    idle, highest = _resident(pid), 0
    samples = [Sample() for _ in range(options.streams)]
    started = time.perf_counter()

    async def one(i: int, sample: Sample) -> None:
        # Requests come over five seconds, all streams are open after that.
        await asyncio.sleep(5 * i / options.streams)
        await sealed.ask(body, sample)

    asking = asyncio.gather(*(one(i, sample) for i, sample in enumerate(samples)), return_exceptions=True)
    while not asking.done():
        highest = max(highest, _resident(pid))
        await asyncio.sleep(0.2)
    outcomes = await asking
    lost = [outcome for outcome in outcomes if outcome is not None]
    short = [sample for sample in samples if sample.tokens != options.events]
    ttft = sorted(sample.ttft for sample in samples if sample.arrivals)
    await asyncio.sleep(3)
    seconds = time.perf_counter() - started
    print(f"{options.streams} streams of {options.events} events in {seconds:.0f} s")
    print(f"complete {options.streams - len(short)}, lost {len(lost)} {sorted({type(item).__name__ for item in lost})}")
    print(f"gateway: {idle / 2**20:.0f} MiB before, {highest / 2**20:.0f} at most, {_resident(pid) / 2**20:.0f} after")
    print(f"per stream: {(highest - idle) / options.streams / 1024:.0f} KiB")
    median, late = ttft[len(ttft) // 2] * 1000, ttft[len(ttft) * 99 // 100] * 1000
    print(f"TTFT: median {median:.0f} ms, 99th percentile {late:.0f} ms")
    await sealed.close()


def main() -> None:
    """Starts engine and gateway as processes, measures, ends them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=2000)
    parser.add_argument("--events", type=int, default=20)
    parser.add_argument("--port", type=int, default=18081)
    options = parser.parse_args()
    _many_files()
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "engine.sock"
        engine = spawn.Process(target=_engine, args=(str(path),), daemon=True)
        gateway = spawn.Process(target=_gateway, args=(str(path), options.port), daemon=True)
        engine.start()
        gateway.start()
        try:
            asyncio.run(_measure(options, gateway.pid or 0))
        finally:
            for process in (engine, gateway):
                process.terminate()
                process.join(10)


if __name__ == "__main__":
    main()
