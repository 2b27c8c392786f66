"""Ten minutes of sealed requests while engines are killed at random, and the fate of each request.

    python -m adytum.benchmarks.runs.soak [--minutes 10] [--concurrency 32] [--pause 20] [--out FILE]

Every request must end in one of two ways: complete and authenticated, or with an error inside the seal. Anything else
fails the run: a truncated answer, an error in the clear, a wait of minutes. So does a process, a socket or a temporary
folder that is left behind, or a gateway that has grown. A kill hits a random process of a random engine: API server,
core, guard.
"""

import argparse
import asyncio
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path

import aiohttp

from adytum.benchmarks.runfile import stats
from adytum.deploy.demo.processes import ROOT, backend
from adytum.inference.channel import bhttp, keyconfig, ohttp
from adytum.inference.channel.bhttp import Content, RequestHead, ResponseHead
from adytum.inference.channel.errors import ChannelError
from adytum.inference.channel.keyconfig import KeyConfiguration

MODELS = {"demo/llama-awq": "generate", "demo/gemma3": "generate", "demo/e5": "embed"}
_RUNTIME = ROOT / "var" / "run"
_GATEWAY = "/.well-known/ohttp-gateway"
_PROMPT = "What is remote attestation?"
_LIMIT_S = 90.0
_BACK_S = 180.0
"""How long a killed engine may take to be live again after the load has ended."""
_ROOM = 1.3
"""The gateway's memory in the last minute, compared with the second, may be larger by this factor."""


@dataclass
class Outcome:
    """One request. `end`: "complete", "sealed error" with its code, or "lost" with what happened."""

    model: str
    at_s: float
    seconds: float
    end: str
    detail: str = ""
    since_last_byte_s: float = 0.0


@dataclass
class Kill:
    """One kill: the process, its model, and when the model was live again."""

    model: str
    process: str
    at_s: float
    live_after_s: float | None = None


@dataclass
class Run:
    """Everything that was observed."""

    outcomes: list[Outcome] = field(default_factory=list)
    kills: list[Kill] = field(default_factory=list)
    memory_kib: list[tuple[float, int]] = field(default_factory=list)
    left: list[str] = field(default_factory=list)


class _Client:
    def __init__(self, url: str, configuration: KeyConfiguration, session: aiohttp.ClientSession, run: Run) -> None:
        self._url = url + _GATEWAY
        self._configuration = configuration
        self._session = session
        self._run = run
        self._start = time.monotonic()

    async def ask(self, model: str) -> None:
        began = time.monotonic()
        outcome = Outcome(model, began - self._start, 0.0, "lost")
        self._last = began
        try:
            async with asyncio.timeout(_LIMIT_S):
                await self._ask(model, outcome)
        except TimeoutError:
            outcome.detail = f"nothing for {_LIMIT_S:.0f} s"
        except (ChannelError, aiohttp.ClientError) as error:
            outcome.detail = f"{type(error).__name__}: {error}"
        outcome.seconds = time.monotonic() - began
        self._run.outcomes.append(outcome)

    async def _ask(self, model: str, outcome: Outcome) -> None:
        path, body = _request(model)
        sealer = ohttp.RequestSealer(ohttp.CHUNKED, self._configuration)
        head = RequestHead("POST", "https", "backend", path, ((b"content-type", b"application/json"),))
        sealed = sealer.start() + sealer.final(bhttp.encode(head, body))
        opener, decoder = sealer.response(), bhttp.Decoder("response")
        status, content, last = 0, b"", time.monotonic()
        headers = {"Content-Type": ohttp.CHUNKED.request}
        async with self._session.post(self._url, data=sealed, headers=headers) as answer:
            if answer.status != 200:
                outcome.detail = f"status {answer.status} in the clear: {(await answer.text())[:80]}"
                return
            found = []
            while data := await answer.content.readany():
                outcome.since_last_byte_s = max(outcome.since_last_byte_s, time.monotonic() - last)
                last = time.monotonic()
                found += decoder.feed(opener.feed(data))
        # Raises if the authenticated end is missing.
        found += decoder.feed(opener.finish()) + decoder.finish()
        for event in found:
            if isinstance(event, ResponseHead):
                status = event.status
            elif isinstance(event, Content):
                content += event.data
        _judge(model, status, content, outcome)


def _request(model: str) -> tuple[str, bytes]:
    if MODELS[model] == "embed":
        return "/v1/embeddings", json.dumps({"model": model, "input": [_PROMPT] * 4}).encode()
    body = {
        "model": model,
        "messages": [{"role": "user", "content": _PROMPT}],
        "stream": True,
        "temperature": 0,
        "max_tokens": 100,
        "ignore_eos": True,
    }
    return "/v1/chat/completions", json.dumps(body).encode()


def _judge(model: str, status: int, content: bytes, outcome: Outcome) -> None:
    """Sets the `end` of an answer that arrived whole."""
    if MODELS[model] == "embed" and status == 200:
        vectors = [item["embedding"] for item in json.loads(content)["data"]]
        if len(vectors) == 4 and all(abs(sum(x * x for x in vector) - 1) < 1e-2 for vector in vectors):
            outcome.end = "complete"
        else:
            outcome.detail = "the embeddings are not four vectors of length 1"
    elif status == 200 and b"\n\ndata: [DONE]\n\n" in content[-2048:]:  # Padding follows it.
        outcome.end = "complete"
    else:
        lines = [line.removeprefix(b"data: ") for line in content.split(b"\n") if b'"error"' in line]
        try:
            error = json.loads(lines[-1])["error"]
            outcome.end, outcome.detail = "sealed error", str(error.get("code") or error["type"])
        except (IndexError, ValueError, KeyError, TypeError):
            outcome.detail = f"status {status}, neither complete nor an error: {content[-80:]!r}"


def _children(pid: int) -> list[int]:
    """All processes below `pid`."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
    found: list[int] = []
    generation = {pid}
    while generation := {child for child, parent in parents.items() if parent in generation}:
        found += generation
    return sorted(found)


def _engine(gateway: int, model: str) -> list[int]:
    """The engine's processes: the guard, whose command line names the socket, and all below it."""
    for child in _children(gateway):
        try:
            line = Path(f"/proc/{child}/cmdline").read_bytes()
        except OSError:
            continue
        if b"--lifeline" in line and model.encode() in line.split(b"\0"):
            return [child, *(below for below in _children(child) if _name(below) != "tracker")]
    return []


def _name(pid: int) -> str:
    """The process's part in its engine."""
    try:
        line, name = Path(f"/proc/{pid}/cmdline").read_bytes(), Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return "ended"
    if b"resource_tracker" in line:
        return "tracker"  # It cleans up shared memory and serves nothing.
    # The server's command line repeats the guard's arguments.
    return "API server" if b"--serve" in line else "guard" if b"--lifeline" in line else name


async def _kill(session: aiohttp.ClientSession, url: str, gateway: int, run: Run, options: argparse.Namespace) -> None:
    rng, start = random.Random(options.seed), time.monotonic()
    while True:
        await asyncio.sleep(rng.uniform(0.5, 1.5) * options.pause)
        if time.monotonic() - start > options.minutes * 60 - 30:
            return
        states = await _states(session, url)
        live = sorted(model for model, state in states.items() if state == "live")
        if not live:
            continue
        model = rng.choice(live)
        processes = _engine(gateway, model)
        if not processes:
            continue
        pid = rng.choice(processes)
        name = _name(pid)
        os.kill(pid, signal.SIGKILL)
        kill = Kill(model, name, time.monotonic() - start)
        run.kills.append(kill)
        print(f"[{kill.at_s:5.0f} s] killed {name} of {model}", flush=True)
        asyncio.get_running_loop().create_task(_back(session, url, kill, start))


async def _back(session: aiohttp.ClientSession, url: str, kill: Kill, start: float) -> None:
    down = False
    while kill.live_after_s is None:
        await asyncio.sleep(0.25)
        state = (await _states(session, url)).get(kill.model)
        down = down or state != "live"
        if down and state == "live":
            kill.live_after_s = time.monotonic() - start - kill.at_s


async def _states(session: aiohttp.ClientSession, url: str) -> dict[str, str]:
    async with session.get(f"{url}/readyz") as answer:
        states: dict[str, str] = (await answer.json())["models"]
        return states


def _resident(pid: int) -> int:
    line = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1])


async def _soak(url: str, gateway: int, run: Run, options: argparse.Namespace) -> None:
    start = time.monotonic()
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector) as session:
        async with session.get(url + _GATEWAY) as answer:
            client = _Client(url, keyconfig.decode_list(await answer.read())[0], session, run)
        killing = asyncio.create_task(_kill(session, url, gateway, run, options))

        async def worker(model: str) -> None:
            while time.monotonic() - start < options.minutes * 60:
                before = len(run.outcomes)
                await client.ask(model)
                if run.outcomes[before:] and run.outcomes[-1].end != "complete":
                    await asyncio.sleep(0.5)  # As a client would, before it asks again.

        async def memory() -> None:
            while True:
                run.memory_kib.append((time.monotonic() - start, _resident(gateway)))
                await asyncio.sleep(2)

        measuring = asyncio.create_task(memory())
        names = list(MODELS)
        await asyncio.gather(*(worker(names[i % len(names)]) for i in range(options.concurrency)))
        deadline = time.monotonic() + _BACK_S
        while any(kill.live_after_s is None for kill in run.kills) and time.monotonic() < deadline:
            await asyncio.sleep(1)
        for task in (killing, measuring):
            task.cancel()
        await asyncio.gather(killing, measuring, return_exceptions=True)
        await asyncio.sleep(1)


def _homes() -> set[str]:
    return {path.name for path in Path(tempfile.gettempdir()).glob("adytum-engine-*")}


def _report(run: Run, options: argparse.Namespace) -> bool:
    ends = Counter((outcome.end, outcome.detail) for outcome in run.outcomes)
    print(f"\n{len(run.outcomes)} requests, {len(run.kills)} kills")
    for (end, detail), count in sorted(ends.items()):
        print(f"  {count:>7} {end}{': ' + detail if detail else ''}")
    back = [kill.live_after_s for kill in run.kills if kill.live_after_s is not None]
    if back:
        low, high = min(back), max(back)
        print(f"  live again after {stats.percentile(back, 0.5):.1f} s (median), {low:.1f} to {high:.1f}")
    errors = [outcome for outcome in run.outcomes if outcome.end == "sealed error" and "failed" in outcome.detail]
    if errors:
        longest = max(outcome.since_last_byte_s for outcome in errors)
        print(
            f"  a stream whose engine was killed ended with its sealed error after at most {longest:.2f} s of silence"
        )
    early = [kib for at, kib in run.memory_kib if 60 <= at < 120] or [kib for _, kib in run.memory_kib[:5]]
    late = [kib for at, kib in run.memory_kib if at > options.minutes * 60 - 60]
    grown = stats.mean(late) / stats.mean(early)
    print(
        f"  gateway: {stats.mean(early) / 1024:.0f} MiB in the second minute, {stats.mean(late) / 1024:.0f} in the last"
    )
    for what in run.left:
        print(f"  left behind: {what}")
    not_back = [kill for kill in run.kills if kill.live_after_s is None]
    for kill in not_back:
        print(f"  {kill.model} was not live again after the kill at {kill.at_s:.0f} s")
    lost = sum(count for (end, _), count in ends.items() if end == "lost")
    return bool(run.kills and ends) and not (lost or run.left or not_back) and grown < _ROOM


def main() -> int:
    """Starts a backend, loads it, kills its engines, counts, and checks what is left after it has stopped."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--concurrency", type=int, default=32)
    parser.add_argument("--pause", type=float, default=20, help="mean seconds between two kills")
    parser.add_argument("--port", type=int, default=8080)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=ROOT / "var" / "bench" / "soak.json")
    options = parser.parse_args()
    run, homes = Run(), _homes()
    with backend(options.port) as gateway:
        asyncio.run(_soak(f"http://127.0.0.1:{options.port}", gateway, run, options))
        processes = _children(gateway)
    time.sleep(0.5)
    run.left += [f"process {pid}" for pid in processes if Path(f"/proc/{pid}").exists()]
    run.left += [str(path) for path in _RUNTIME.rglob("*.sock")]
    run.left += sorted(_homes() - homes)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(asdict(run)))
    passed = _report(run, options)
    print(f"{'passed' if passed else 'FAILED'}; all observations: {options.out}")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
