"""A model, not a measurement: CC-Off and CC-On simulated by an engine that computes nothing, on any machine.

    python -m adytum.benchmarks model --workload llama-3-8b-awq [--transfers off.json on.json] [--out FOLDER]
    python -m adytum.benchmarks model --errors

Writes two run files for `compare`, off.json and on.json, which are marked as a model throughout. The costs of CC-On are
published constants, or what `transfer` measured in a machine's two modes (benchmarks/cc/costs.py). --errors prints the
model's distance from every published figure.
"""

import argparse
import asyncio
import contextlib
import itertools
import json
import multiprocessing
import shlex
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from adytum.benchmarks.cc import costs, synthetic, transfer
from adytum.benchmarks.cc.costs import MIDDLE, WORKLOADS, Tax, Workload
from adytum.benchmarks.errors import Unusable
from adytum.benchmarks.load import load
from adytum.benchmarks.load.samples import request
from adytum.benchmarks.runfile import runfile
from adytum.benchmarks.runfile.runfile import MODEL_NOTE, Level, Repetition, Run
from adytum.benchmarks.runs import machine
from adytum.deploy.demo.processes import ROOT

_OFF, _ON = "model-cc-off", "model-cc-on"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `model`."""
    parser.add_argument("--workload", choices=sorted(WORKLOADS), default="llama-3-8b-awq")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--tokens", type=int, default=64, help="per answer")
    parser.add_argument("--prompt-bytes", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=2, help="requests per client, in a repetition")
    parser.add_argument("--repetitions", type=int, default=3, help="at least 3")
    parser.add_argument("--transfers", type=Path, nargs=2, metavar=("OFF", "ON"), help="files that `transfer` wrote")
    parser.add_argument("--out", type=Path, default=ROOT / "var" / "bench" / "model")
    parser.add_argument("--errors", action="store_true", help="print the model beside published figures, and stop")


def run(options: argparse.Namespace) -> int:
    """Exit status 0. Raises `Unusable`."""
    if options.errors:
        print(f"{MODEL_NOTE}\n\n{costs.table()}")
        return 0
    if options.repetitions < 3 or min([*options.concurrency, options.tokens, options.rounds, options.prompt_bytes]) < 1:
        raise Unusable("--repetitions is at least 3; lengths, rounds and levels are at least 1")
    tax, source = MIDDLE, "the middle of published constants"
    if options.transfers is not None:
        off, on = (transfer.load(path) for path in options.transfers)
        if (off["label"], on["label"]) not in (("cc-off", "cc-on"), ("tee-only", "cc-on")):
            raise Unusable(f"the transfers are of {off['label']} and {on['label']}; a CC-Off and a CC-On are needed")
        tax, source = costs.from_transfers(off, on), "the transfers of one machine in its two modes"
    workload = WORKLOADS[options.workload]
    began = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    with _engines(workload, tax) as sockets:
        found = list(_measured(sockets, options))
    print(f"{MODEL_NOTE}: {workload.name} on {workload.gpu}; CC-On adds {tax.step_ms:.2f} ms a step ({source})")
    for label in (_OFF, _ON):
        what = f"{MODEL_NOTE}: a synthetic engine's steps of {workload.name} on {workload.gpu}"
        if label == _ON:
            what += f", with {tax.step_ms:.3f} ms a step and {tax.byte_ns:.3f} ns a byte from {source}"
        head = _head(options, workload, label, began) | {
            "arms": [{"name": "synthetic", "client": "benchmarks.load", "what": what, "flags": None}]
        }
        path = options.out / f"{label.removeprefix('model-cc-')}.json"
        Run(head, tuple(item for name, item in found if name == label)).save(path)
        print(f"run file: {path}")
    return 0


@contextlib.contextmanager
def _engines(workload: Workload, tax: Tax) -> Iterator[dict[str, Path]]:
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        sockets = {label: Path(folder) / f"{label}.sock" for label in (_OFF, _ON)}
        processes = []
        for label, path in sockets.items():
            costs = (tax.step_ms, tax.byte_ns) if label == _ON else (0.0, 0.0)
            arguments = (str(path), workload.name, *costs)
            processes.append(spawn.Process(target=synthetic.serve, args=arguments, daemon=True))
        try:
            for process in processes:
                process.start()
            deadline = time.monotonic() + 30
            while not all(path.exists() for path in sockets.values()):
                if time.monotonic() > deadline:
                    raise Unusable("the synthetic engines did not start in 30 s")
                time.sleep(0.05)
            yield sockets
        finally:
            for process in processes:
                process.terminate()
                process.join(10)


def _measured(sockets: dict[str, Path], options: argparse.Namespace) -> Iterator[tuple[str, Repetition]]:
    order = itertools.count()
    body = load.body(load.PATH, "synthetic", "x" * options.prompt_bytes, options.tokens)
    labels = list(sockets)
    total = len(options.concurrency) * len(labels) * (options.repetitions + 1)
    with tqdm(total=total, unit="load", disable=None) as bar:
        for concurrency in options.concurrency:
            for index in range(-1, options.repetitions):
                for label in labels if index % 2 == 0 else labels[::-1]:
                    samples, wall = asyncio.run(_load(sockets[label], body, concurrency, options.rounds))
                    bar.update()
                    if any(sample.error for sample in samples):
                        raise Unusable(f"the synthetic engine failed: {samples[0].error}")
                    if index >= 0:
                        level, requests = Level("closed", float(concurrency)), tuple(map(request, samples))
                        yield label, Repetition("synthetic", level, index, next(order), wall, None, requests)


async def _load(socket: Path, body: bytes, concurrency: int, rounds: int) -> tuple[list[load.Sample], float]:
    client = load.Plaintext(socket)
    try:
        return await load.closed(client, [body] * concurrency * rounds, concurrency)
    finally:
        await client.close()


def _head(options: argparse.Namespace, workload: Workload, label: str, began: str) -> dict[str, Any]:
    here = machine.facts()
    none = machine.absent("a model: no engine ran")
    return {
        "schema": runfile.VERSION,
        "kind": MODEL_NOTE,
        "label": label,
        "began": began,
        "ended": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": shlex.split(shlex.join(sys.argv[1:])),
        "machine": here | {"name": f"{MODEL_NOTE}: {workload.gpu}; played on {here['name']}"},
        "software": {
            "adytum": "synthetic engine",
            "commit": none,
            "gateway": {"none": None},
            "engine": {"synthetic": json.dumps(workload.name)},
            "generator": {"benchmarks.load": None},
            "configuration_sha256": none,
        },
        "models": [{"id": workload.name, "source": "benchmarks/cc/costs.py", "revision": none, "lock_sha256": none}],
        "engine_flags": none,
        "load": {
            "task": "chat",
            "model": workload.name,
            "prompt_tokens": max(1, options.prompt_bytes // 4),
            "output_tokens": options.tokens,
            "rounds": options.rounds,
            "poisson_s": 1,
            "seed": 0,
            "repetitions": options.repetitions,
            "warmup_requests": "one repetition",
        },
        "limits": {"ttft_ms": None, "tpot_ms": None, "e2e_ms": None},
    }
