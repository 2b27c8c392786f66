"""Sealed against plaintext-to-the-socket and a bare relay: same load, same engine, one run, arms alternated.

    python -m benchmarks.serve [--concurrency 1 8 32] [--repetitions 6] [--out FILE]

Prints a table and writes the raw times. The relay copies bytes from TCP to the engine's socket: what it costs, any hop
between client and engine costs; what the sealed arm costs beyond it is the channel's. Ratios come from neighbouring
repetitions (A B C C B A ...), since these machines drift; intervals are 95 % bootstrap over the pairs.
"""

import argparse
import asyncio
import json
import os
import platform
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import load, relay, stats
from benchmarks.load import Arm, Sample, Shape
from deploy.demo.processes import ROOT, backend

MODEL = "demo/llama-awq"
SOCKET = ROOT / "var" / "run" / "demo-llama-awq" / "engine.sock"
_TICK = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Repetition:
    """One arm's load once. Times in seconds."""

    arm: str
    concurrency: int
    samples: list[Sample]
    wall: float
    gateway_cpu: float

    @property
    def throughput(self) -> float:
        """Generated tokens per second."""
        return sum(sample.tokens for sample in self.samples) / self.wall

    @property
    def pieces(self) -> int:
        """Pieces of content that arrived: events that came together count once."""
        return sum(len(sample.arrivals) for sample in self.samples)


def main() -> None:
    """Runs all loads against a backend started for it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--repetitions", type=int, default=6, help="pairs of arms at each concurrency")
    parser.add_argument("--tokens", type=int, default=100, help="tokens per answer")
    parser.add_argument("--rounds", type=int, default=4, help="requests per repetition and concurrent client")
    parser.add_argument("--port", type=int, default=8080)
    parser.add_argument("--out", type=Path, default=ROOT / "var" / "bench" / "serve.json")
    options = parser.parse_args()
    with backend(options.port) as pid, relay.running(SOCKET, options.port + 1) as relayed:
        found = asyncio.run(_measure(options, pid, relayed))
    print(_table(found))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps({"machine": _machine(), "repetitions": [_record(item) for item in found]}))
    print(f"raw times: {options.out}")


async def _measure(options: argparse.Namespace, pid: int, relayed: str) -> list[Repetition]:
    plaintext: Arm = load.Plaintext(SOCKET)
    bare: Arm = load.Plaintext(SOCKET, relayed)
    sealed: Arm = await load.Sealed.connect(f"http://127.0.0.1:{options.port}")
    arms = (plaintext, bare, sealed)
    found: list[Repetition] = []
    try:
        for concurrency in options.concurrency:
            rounds = max(options.rounds, 12 // concurrency)
            shape = Shape(MODEL, concurrency, concurrency * rounds, options.tokens)
            for arm in arms:  # warm-up, dropped
                await load.run(arm, shape)
            for pair in range(options.repetitions):
                for arm in arms if pair % 2 == 0 else arms[::-1]:
                    before = _cpu(pid)
                    samples, wall = await load.run(arm, shape)
                    found.append(Repetition(arm.name, concurrency, samples, wall, _cpu(pid) - before))
                print(f"concurrency {concurrency}: pair {pair + 1} of {options.repetitions}", flush=True)
    finally:
        for arm in arms:
            await arm.close()
    return found


def _cpu(pid: int) -> float:
    """CPU seconds that the gateway's process has used (its engines are processes of their own)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICK


def _table(found: list[Repetition]) -> str:
    lines = [
        "",
        f"{'conc':>4} {'arm':>7} {'plain tok/s':>11} {'arm tok/s':>9} {'ratio [95 %]':>22} "
        f"{'TTFT p50 plain/+ms':>19} {'TTFT +p99 ms':>12} {'gap p50 plain/+ms':>18} {'gap +p99 ms':>11} "
        f"{'gw us/piece':>11} {'gw us/req':>10}",
    ]
    for concurrency in sorted({item.concurrency for item in found}):
        plain = [item for item in found if (item.arm, item.concurrency) == ("plaintext", concurrency)]
        for name in ("relay", "sealed"):
            other = [item for item in found if (item.arm, item.concurrency) == (name, concurrency)]
            lines.append(f"{concurrency:>4} {name:>7} {_row(plain, other)}")
    return "\n".join(lines)


def _row(plain: list[Repetition], other: list[Repetition]) -> str:
    rates = [item.throughput for item in plain], [item.throughput for item in other]
    low, high = stats.interval(*rates, lambda a, b: stats.mean(b) / stats.mean(a))
    ttft = [_all(items, lambda sample: [sample.ttft]) for items in (plain, other)]
    gaps = [_all(items, lambda sample: sample.gaps) for items in (plain, other)]
    cpu = sum(item.gateway_cpu for item in other)
    return (
        f"{stats.mean(rates[0]):>11.0f} {stats.mean(rates[1]):>9.0f} "
        f"{stats.mean(rates[1]) / stats.mean(rates[0]):>8.3f} [{low:.3f}, {high:.3f}] "
        f"{_added(ttft, 0.5):>19} {_difference(ttft, 0.99):>12.2f} {_added(gaps, 0.5):>18} "
        f"{_difference(gaps, 0.99):>11.2f} {cpu / sum(item.pieces for item in other) * 1e6:>11.0f} "
        f"{cpu / sum(len(item.samples) for item in other) * 1e6:>10.0f}"
    )


def _all(items: list[Repetition], values: Any) -> list[float]:
    return [value for item in items for sample in item.samples for value in values(sample)]


def _difference(arms: list[list[float]], share: float) -> float:
    return (stats.percentile(arms[1], share) - stats.percentile(arms[0], share)) * 1000


def _added(arms: list[list[float]], share: float) -> str:
    return f"{stats.percentile(arms[0], share) * 1000:.2f}/{_difference(arms, share):+.2f}"


def _record(item: Repetition) -> dict[str, Any]:
    return {
        "arm": item.arm,
        "concurrency": item.concurrency,
        "wall_s": item.wall,
        "gateway_cpu_s": item.gateway_cpu,
        "requests": [
            {"tokens": sample.tokens, "total_s": sample.total, "arrivals_s": sample.arrivals} for sample in item.samples
        ],
    }


def _machine() -> dict[str, Any]:
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "cores": os.cpu_count(),
        "kernel": platform.release(),
        "python": platform.python_version(),
    }


if __name__ == "__main__":
    main()
