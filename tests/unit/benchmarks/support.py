"""Composed run files: known times, known differences."""

import random
from typing import Any

from adytum.benchmarks.runfile import runfile
from adytum.benchmarks.runfile.runfile import Level, Repetition, Request, Run
from adytum.benchmarks.runs import machine

LEVELS = (Level("closed", 1.0), Level("closed", 8.0))


def head(label: str = "cc-off", **changes: Any) -> dict[str, Any]:
    """Of a run that validates. The machine is this one's facts."""
    none = machine.absent("composed by a test")
    return {
        "schema": runfile.VERSION,
        "kind": "measurement",
        "label": label,
        "began": "2026-11-23T12:00:00Z",
        "ended": "2026-11-23T12:10:00Z",
        "command": ["serve"],
        "machine": machine.facts("a machine of a test <b>"),
        "software": {
            "adytum": "0",
            "commit": none,
            "gateway": {"python": "3"},
            "engine": {"vllm": "0.33.0"},
            "generator": {"vllm": "0.33.0"},
            "configuration_sha256": none,
        },
        "models": [{"id": "m", "source": "m", "revision": none, "lock_sha256": machine.fact("00")}],
        "engine_flags": machine.fact(["--max-num-seqs", "256"]),
        "load": {
            "task": "chat",
            "model": "m",
            "prompt_tokens": 128,
            "output_tokens": 21,
            "rounds": 4,
            "poisson_s": 20,
            "seed": 1,
            "repetitions": 6,
            "warmup_requests": "one repetition",
        },
        "limits": {"ttft_ms": 45.0, "tpot_ms": None, "e2e_ms": None},
        "arms": [
            {"name": name, "client": "benchmarks.load", "what": name, "flags": None} for name in ("direct", "ohttp")
        ],
        **changes,
    }


def composed(label: str, *, step_ms: float, ttft_ms: float = 40.0, seed: int = 1, spread: float = 0.02) -> Run:
    """A run whose every step takes `step_ms` and whose first tokens take `ttft_ms`; each repetition drifts by
    `spread`."""
    rng = random.Random(seed)
    found = []
    for arm in ("direct", "ohttp"):
        for level in LEVELS:
            for index in range(6):
                drift = rng.gauss(1, spread)
                requests = tuple(_request(step_ms * drift, ttft_ms * drift, rng) for _ in range(20))
                wall = sum(request.e2e_s for request in requests) / level.value
                found.append(Repetition(arm, level, index, len(found), wall, 0.1, requests))
    return Run(head(label), tuple(found))


def _request(step_ms: float, ttft_ms: float, rng: random.Random) -> Request:
    gaps = tuple(step_ms * rng.gauss(1, 0.01) / 1000 for _ in range(20))
    ttft = ttft_ms * rng.gauss(1, 0.01) / 1000
    return Request(0.0, ttft, ttft + sum(gaps), gaps, 21, 128)
