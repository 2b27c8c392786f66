"""What secrecy costs a serving backend: the same load through several arms, alternated, with each request's times.

    python -m adytum.benchmarks serve [--config FILE] [--arms direct ohttp own-ehbp] [--concurrency 1 8 32] [--rate 2 8]

Without --config the demo is started; with it, the running backend of that configuration is driven. Writes a run file
(benchmarks/runfile/run.schema.json) and prints a table. The label (--label) must match the mode that the GPUs' driver
reports.
"""

import argparse
import contextlib
import itertools
import json
import os
import shlex
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from adytum.benchmarks.errors import Unusable
from adytum.benchmarks.load import generator
from adytum.benchmarks.load.generator import Load
from adytum.benchmarks.report import summary
from adytum.benchmarks.runfile import runfile
from adytum.benchmarks.runfile.runfile import Level, Repetition, Run
from adytum.benchmarks.runs import arms, machine, software
from adytum.benchmarks.runs.arms import ARMS, Arm, Arms, Backend
from adytum.deploy.demo.processes import CONFIG, POLICY, ROOT, Failed
from adytum.deploy.demo.processes import backend as demo
from adytum.inference.backend.models import socket_path
from adytum.inference.core.config import Config, ConfigError, Model
from adytum.inference.core.config import load as load_config

_LEAST_REPETITIONS = 3
_LEAST_REQUESTS = 6
KEY_VARIABLE = "ADYTUM_API_KEY"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `serve`."""
    add = parser.add_argument
    add("--config", type=Path, help="the running backend's configuration; without it the demo is started")
    add("--url", help="of the running backend; default: the configuration's address")
    add("--policy", type=Path, default=POLICY, help="the local proxies verify the backend against it")
    add("--arms", nargs="+", default=["direct", "ohttp"], metavar="ARM", help=", ".join(ARMS))
    add("--task", choices=["chat", "embeddings"], default="chat")
    add("--model", help="id; default: the configuration's first of the task")
    add("--concurrency", type=int, nargs="*", default=None, help="closed loop, clients at once (1 4 16 32 64 128)")
    add("--rate", type=float, nargs="*", default=[], help="Poisson, requests per second")
    add("--prompt-tokens", type=int, default=128)
    add("--output-tokens", type=int, default=128)
    add("--rounds", type=int, default=4, help="requests per client of a closed loop, in a repetition")
    add("--poisson-seconds", type=float, default=20.0, help="of a Poisson load, in a repetition")
    add("--repetitions", type=int, default=6, help="of each arm at each level, at least 3")
    add("--seed", type=int, default=20261123)
    add("--ttft-ms", type=float, help="a limit of goodput")
    add("--tpot-ms", type=float, help="a limit of goodput")
    add("--e2e-ms", type=float, help="a limit of goodput")
    add("--label", choices=machine.LABELS, help="refused if the machine is another; default: the machine's")
    add("--machine", default="", help="its name in the run file")
    add("--gateway-pid", type=int, help="the gateway's process, for its CPU time; known if the demo is started")
    add("--port", type=int, default=8080, help="of the demo")
    add("--quick", action="store_true", help="1 and 4 at once, short answers, three repetitions: to try it")
    add("--out", type=Path, default=ROOT / "var" / "bench" / "run.json")


def run(options: argparse.Namespace) -> int:
    """Returns the exit status: 0, or 1 if requests failed. Raises `Unusable`."""
    if options.quick:
        options.concurrency, options.rate, options.repetitions, options.rounds = [1, 4], [], 3, 2
        options.output_tokens = min(options.output_tokens, 24)
    levels = [Level("closed", float(value)) for value in (options.concurrency or ([] if options.rate else [1, 8, 32]))]
    levels += [Level("poisson", value) for value in options.rate]
    chosen = _chosen(options, levels)
    here = machine.facts(options.machine)
    label = machine.labelled(here, options.label)
    configuration = _configuration(options)
    model = _model(configuration, options)
    source = model.source if Path(model.source).is_dir() else model.id
    load = Load(
        options.task, model.id, source, options.prompt_tokens, options.output_tokens if options.task == "chat" else 0
    )
    began = _now()
    with _backend(options, configuration, model) as backend:
        python = configuration.engines.python
        flags = software.engine_flags(backend.socket)
        key = os.environ.get(KEY_VARIABLE, "")
        with (
            generator.running(python, key) as maintained,
            arms.running(backend, maintained, load, chosen) as running,
        ):
            first = {
                arm.name: running.flags(arm, levels[0], _requests(options, levels[0]), options.seed) for arm in chosen
            }
            found = list(_measured(running, chosen, levels, options))
        now = machine.facts(options.machine)
        if now["gpu"]["mode"] != here["gpu"]["mode"]:
            raise Unusable("the GPUs' mode changed during the run: its figures belong to neither and were not kept")
    result = Run(
        {
            "schema": runfile.VERSION,
            "kind": "measurement",
            "label": label,
            "began": began,
            "ended": _now(),
            "command": shlex.split(shlex.join(sys.argv[1:])),
            "machine": here,
            "software": software.versions(python, configuration),
            "models": [software.model(model)],
            "engine_flags": flags,
            "load": head_of(options, load),
            "limits": {"ttft_ms": options.ttft_ms, "tpot_ms": options.tpot_ms, "e2e_ms": options.e2e_ms},
            "arms": [
                {"name": arm.name, "client": arm.client, "what": arm.what, "flags": first[arm.name]} for arm in chosen
            ],
        },
        tuple(found),
    )
    result.save(options.out)
    print(summary.table(result))
    print(summary.agreement(result), end="")
    print(f"run file: {options.out}")
    failed = sum(bool(request.error) for item in found for request in item.requests)
    if failed:
        errors = {request.error for item in found for request in item.requests if request.error}
        print(f"{failed} requests failed: {'; '.join(sorted(errors)[:3])}", file=sys.stderr)
    return 1 if failed else 0


def head_of(options: argparse.Namespace, load: Load) -> dict[str, Any]:
    """The run file's `load`."""
    return {
        "task": load.task,
        "model": load.model,
        "prompt_tokens": load.prompt_tokens,
        "output_tokens": load.output_tokens,
        "rounds": options.rounds,
        "poisson_s": options.poisson_seconds,
        "seed": options.seed,
        "repetitions": options.repetitions,
        "warmup_requests": "one repetition",
    }


def _chosen(options: argparse.Namespace, levels: list[Level]) -> list[Arm]:
    unknown = [name for name in options.arms if name not in ARMS]
    if unknown:
        raise Unusable(f"no arm is called {unknown[0]}; there are {', '.join(ARMS)}")
    if options.repetitions < _LEAST_REPETITIONS:
        raise Unusable(f"--repetitions is at least {_LEAST_REPETITIONS}: fewer have no interval")
    numbers = [options.prompt_tokens, options.output_tokens, options.rounds, options.poisson_seconds]
    numbers += [level.value for level in levels]
    numbers += [value for value in (options.ttft_ms, options.tpot_ms, options.e2e_ms) if value is not None]
    if min(numbers) <= 0:
        raise Unusable("lengths, rounds, seconds, levels and limits are greater than 0")
    return [ARMS[name] for name in dict.fromkeys(options.arms)]


def _configuration(options: argparse.Namespace) -> Config:
    try:
        return load_config(options.config or CONFIG)
    except ConfigError as error:
        raise Unusable(str(error)) from error


def _model(configuration: Config, options: argparse.Namespace) -> Model:
    task = "generate" if options.task == "chat" else "embed"
    fitting = [item for item in configuration.models if item.task == task and options.model in (None, item.id)]
    if not fitting:
        names = ", ".join(f"{item.id} ({item.task})" for item in configuration.models)
        raise Unusable(f"the configuration has no model for {options.task} of that name; it has {names}")
    return fitting[0]


@contextlib.contextmanager
def _backend(options: argparse.Namespace, configuration: Config, model: Model) -> Iterator[Backend]:
    socket = socket_path(configuration, model)
    if options.config is None:
        try:
            with demo(options.port) as pid:
                yield Backend(f"http://127.0.0.1:{options.port}", socket, options.policy, "", pid)
        except Failed as error:
            raise Unusable(str(error)) from error
        return
    scheme = "http" if configuration.tls.mode == "off" else "https"
    url = options.url or f"{scheme}://{configuration.server.host}:{configuration.server.port}"
    try:
        with urllib.request.urlopen(f"{url}/readyz", timeout=10) as answer:
            step = json.load(answer)["step"]
    except urllib.error.HTTPError as error:
        raise Unusable(f"the backend at {url} does not serve yet (status {error.code} of /readyz)") from error
    except (OSError, ValueError) as error:
        raise Unusable(f"no backend answers at {url}: start it, or omit --config for the demo") from error
    if step != "SERVING" or not socket.exists():
        raise Unusable(f"the backend at {url} is at {step}, and its engine's socket would be {socket}")
    yield Backend(url, socket, options.policy, os.environ.get(KEY_VARIABLE, ""), options.gateway_pid)


def _requests(options: argparse.Namespace, level: Level) -> int:
    if level.kind == "poisson":
        return max(_LEAST_REQUESTS, round(level.value * float(options.poisson_seconds)))
    return max(_LEAST_REQUESTS, round(level.value) * int(options.rounds))


def _measured(
    running: Arms, chosen: list[Arm], levels: list[Level], options: argparse.Namespace
) -> Iterator[Repetition]:
    """At every level: a warm-up of each arm, which is dropped, then the arms in turn, forwards and backwards."""
    order = itertools.count()
    total = len(levels) * len(chosen) * (options.repetitions + 1)
    with tqdm(total=total, unit="load", disable=None) as bar:
        for place, level in enumerate(levels):
            requests = _requests(options, level)
            for index in range(-1, options.repetitions):
                # Prompts are the same for all arms and new in each repetition.
                seed = options.seed + 1000 * place + index + 1
                for arm in chosen if index % 2 == 0 else chosen[::-1]:
                    bar.set_postfix_str(f"{level}, {arm.name}" + (", warm-up" if index < 0 else ""))
                    found, wall, cpu = running.run(arm, level, requests, seed)
                    bar.update()
                    if index >= 0:
                        yield Repetition(arm.name, level, index, next(order), wall, cpu, tuple(found))


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
