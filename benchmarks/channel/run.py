"""The gateway alone against a synthetic engine, and nginx with TLS and LiteLLM's proxy in front of the same one.

    python -m adytum.benchmarks channel [--quick] [--out FILE]

Figures are CPU time of the measured process, including the kernel's part, so that they hold although load and engine
share the machine's cores; "per second and core" is their inverse. Arms alternate; intervals are 95 % bootstrap.
"""

import argparse
import asyncio
import json
import os
import platform
import tempfile
import time
import urllib.request
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import uvloop

from adytum.benchmarks.channel import arms, measure, peers
from adytum.benchmarks.channel.arms import Arm
from adytum.benchmarks.channel.engine import engine_process
from adytum.benchmarks.channel.gateway import gateway_process
from adytum.benchmarks.channel.measure import Load
from adytum.benchmarks.load.load import ehbp_configuration
from adytum.benchmarks.processes import free_port, many_files, python, wait_for
from adytum.benchmarks.runfile import stats
from adytum.inference.channel import keyconfig
from adytum.inference.channel.hpke import KemId

Raw = dict[str, dict[str, list[float]]]
"""Measurement, arm, one value per repetition."""

# When saturated, single writes merge in one read, so only the paced load has a target for "one by one".
_LOADS = {
    "one by one, paced": Load(64, 100, 10, 1),
    "one by one, saturated": Load(64, 300, 0, 1),
    "together (16), saturated": Load(64, 800, 0, 16),
}
_SLOW_EVENTS = 240
"""The most for each of LiteLLM's streams: with as many as the others it would take minutes."""
OHTTP = "OHTTP "


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help="two short repetitions, up to 1,000 streams")
    parser.add_argument("--repetitions", type=int, help="of each measurement, at least 2 (default 7; 2 with --quick)")
    parser.add_argument(
        "--peers", type=Path, default=Path("var/bench-peers"), help="benchmarks/channel/peers.sh's folder"
    )
    parser.add_argument("--out", type=Path, default=Path("var/bench/channel.json"), help="raw figures (JSON)")


def run(arguments: argparse.Namespace) -> int:
    """Measures, prints the table and writes the file. Returns exit status 0."""
    many_files()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        found = runner.run(_run(arguments))
    print("\n".join(table(found["figures"], found["kem_seconds"])))
    for reason in found["absent"]:
        print(f"not measured: {reason}")
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(found, indent=1))
    print(f"raw figures: {arguments.out}")
    return 0


async def _run(arguments: argparse.Namespace) -> dict[str, Any]:
    repetitions = max(2, arguments.repetitions or (2 if arguments.quick else 7))
    machine = _machine(arguments.peers)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        socket, engine_port, port = folder / "engine.sock", free_port(), free_port()
        stack.enter_context(python(engine_process, str(socket), engine_port))
        pid = stack.enter_context(python(gateway_process, str(socket), port))
        if not (wait_for(engine_port, 20) and wait_for(port, 20)):
            raise SystemExit("engine or gateway did not start")
        ours = gateway_arms(port, pid)
        others = [peers.nginx(stack, folder, socket), peers.litellm(stack, folder, arguments.peers, engine_port)]
        present = [*ours, *(arm for arm in others if isinstance(arm, Arm))]
        for arm in present:
            await arms.check(arm)
        raw: Raw = {}
        for repetition in range(-1, repetitions):  # The first is dropped.
            for arm in present if repetition % 2 else present[::-1]:
                for name, value in (await _once(arm, arguments.quick)).items():
                    if repetition >= 0:
                        raw.setdefault(name, {}).setdefault(arm.name, []).append(value)
            print(f"repetition {repetition + 1} of {repetitions}", flush=True)
    for count in (100, 1000) if arguments.quick else (100, 1000, 5000):
        await _idle(raw, count, 1 if count == 5000 or arguments.quick else 3)
    machine["load_after"] = os.getloadavg()
    kems = {which.name: measure.kem(which) for which in KemId}
    absent = [reason for reason in others if isinstance(reason, str)]
    return {"machine": machine, "figures": raw, "kem_seconds": kems, "absent": absent}


def gateway_arms(port: int, pid: int) -> list[Arm]:
    """Each protocol with each KEM that the gateway offers for it."""

    def fetched(path: str) -> tuple[keyconfig.KeyConfiguration, ...]:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}") as answer:
            return keyconfig.decode_list(answer.read())

    offered = fetched("/.well-known/ohttp-gateway")
    found = [Arm(OHTTP + item.kem.name, port, pid, arms.oblivious(item)) for item in offered]
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/.well-known/hpke-keys") as answer:
        configuration = ehbp_configuration(answer.read())
    return [*found, Arm("EHBP " + configuration.kem.name, port, pid, arms.ehbp_arm(configuration))]


async def _once(arm: Arm, quick: bool) -> dict[str, float]:
    slow = arm.name == "LiteLLM"
    found = {}
    for name, load in _LOADS.items():
        events = min(load.events, _SLOW_EVENTS) if slow else load.events
        load = replace(load, events=events // 4 if quick else events)
        found[name], found[name + ", events/s of wall time"] = await measure.chunks(arm, load)
    requests = 32 if slow else 160 if quick else 480
    found["request"], found["request, per s of wall time"] = await measure.opens(arm, requests, 16)
    return found


async def _idle(raw: Raw, count: int, repetitions: int) -> None:
    # A fresh process each time, because an allocator keeps the memory of earlier streams.
    for _ in range(repetitions):
        with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
            folder = Path(name)
            socket, port = folder / "engine.sock", free_port()
            stack.enter_context(python(engine_process, str(socket), 0))
            pid = stack.enter_context(python(gateway_process, str(socket), port))
            wait_for(port, 20)
            present = [gateway_arms(port, pid)[0], peers.nginx(stack, folder, socket)]
            for arm in present:
                if isinstance(arm, Arm):
                    await arms.check(arm)
                    for kind, value in zip(("RSS", "PSS"), await measure.idle(arm, count), strict=True):
                        raw.setdefault(f"idle {count} {kind}", {}).setdefault(arm.name, []).append(value)


def table(raw: Raw, kems: dict[str, float]) -> list[str]:
    """The lines: median and interval, per second and core, ratios to the peers, each target with its verdict.

    "open": the target is inside the interval.
    """
    lines = [f"{'':<28} {'arm':<26} {'median [95 %]':>30} {'per s and core':>15}"]
    for name in (*_LOADS, "request"):
        for arm, values in raw[name].items():
            micro = [value * 1e6 for value in values]
            lines.append(f"{name:<28} {arm:<26} {_spread(micro):>27} us {measure.per_core(_median(values)):>15,.0f}")
    for name in (name for name in raw if name.startswith("idle")):
        for arm, values in raw[name].items():
            lines.append(f"{name:<28} {arm:<26} {_spread([value / 1024 for value in values]):>26} KiB")
    lines += [f"KEM and key schedule, {name}: {seconds * 1e6:.0f} us" for name, seconds in kems.items()]
    return [*lines, "", *_verdicts(raw, kems)]


def _verdicts(raw: Raw, kems: dict[str, float]) -> list[str]:
    lines = []
    for arm in (arm for arm in raw["request"] if arm.startswith(("OHTTP", "EHBP"))):
        for name, target in (("one by one, paced", 20_000), ("together (16), saturated", 60_000)):
            cost = _estimate(raw[name][arm])
            text = f"{arm}, {name}: {measure.per_core(cost.value):,.0f} of {target:,} per s and core"
            lines.append(_verdict(text, _side(cost.low, cost.high, 1 / target)))
        cost, kem = _estimate(raw["request"][arm]), kems[arm.split()[1]]
        text = f"{arm}, request beside the KEM: {(cost.value - kem) * 1e6:.0f} of at most 200 us"
        lines.append(_verdict(text, _side(cost.low - kem, cost.high - kem, 200e-6)))
        for peer in ("nginx TLS", "LiteLLM"):
            for name in _LOADS:
                if peer not in raw[name]:
                    continue
                a, b = raw[name][peer], raw[name][arm]
                if peer == "LiteLLM":
                    a, b = b, a
                found = _ratio(a, b)
                ratio, low, high = found.value, found.low, found.high
                asked = _side(low, high, 3) if peer == "nginx TLS" else _side(10 - high, 10 - low, 0)
                text = "over nginx TLS (at most 3)" if peer == "nginx TLS" else "of LiteLLM over it (at least 10)"
                lines.append(_verdict(f"{arm}, {name}, CPU {text}: {ratio:.2f} [{low:.2f}, {high:.2f}]", asked))
    for name in (name for name in raw if name.startswith("idle") and name.endswith("PSS")):
        arm = next(arm for arm in raw[name] if arm != "nginx TLS")
        kib = _median(raw[name][arm]) / 1024
        text = f"{arm}, {name}: {kib:.1f} of less than 40 KiB a stream"
        lines.append(_verdict(text, kib < 40))
    return lines


def _side(low: float, high: float, limit: float) -> bool | None:
    """Whether a value that should be at most `limit` is; None if the limit is inside the interval."""
    return None if low <= limit < high else high <= limit


def _verdict(text: str, met: bool | None) -> str:
    return f"{'open   ' if met is None else 'met    ' if met else 'NOT MET'} {text}"


def _estimate(values: Sequence[float]) -> stats.Estimate:
    return stats.estimate(len(values), lambda picks: _median([values[place] for place in picks]))


def _ratio(a: Sequence[float], b: Sequence[float]) -> stats.Estimate:
    """The median of `b` over that of `a`. Repetition i of both ran next to each other."""

    def statistic(mine: Sequence[int], theirs: Sequence[int]) -> float:
        return _median([b[place] for place in theirs]) / _median([a[place] for place in mine])

    return stats.difference((len(a), len(b)), statistic, paired=len(a) == len(b))


def _median(values: Sequence[float]) -> float:
    return stats.percentile(values, 0.5)


def _spread(values: Sequence[float]) -> str:
    if len(values) == 1:
        return f"{values[0]:,.1f} n=1"
    found = _estimate(values)
    return f"{found.value:,.1f} [{found.low:,.1f}, {found.high:,.1f}] n={len(values)}"


def _machine(folder: Path) -> dict[str, Any]:
    models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "cores": os.cpu_count(),
        "cpu": models[0].partition(": ")[2] if models else "unknown",
        "kernel": platform.release(),
        "python": platform.python_version(),
        "load_before": os.getloadavg(),
        "peers": peers.versions(folder),
    }
