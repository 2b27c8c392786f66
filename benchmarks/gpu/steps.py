"""The run on a GPU machine, in steps that each fit into one call of a few minutes. A finished step is not repeated.

Everything before `install` uses the standard library only, because the machine starts bare. Results are files in OUT,
and `state.json` there lists the finished steps. A step that fails is not listed, and the next call begins with it.
"""

import json
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from adytum.benchmarks.gpu import pieces, shapes

ROOT = Path(__file__).resolve().parents[2]
_CONFIG = """\
# Written by benchmarks/gpu: one model of the true shape with random weights.
[server]
host = "127.0.0.1"
port = {port}
replica = "gpu"
max_requests = 1024
swap = "allowed"

[tls]
mode = "off"

[callers]
authentication = "none"

[channel]
padding = "pad"
key_lifetime_s = 3600
key_overlap_s = 600

[evidence]
cpu = "simulated"
gpus = "none"
interval_s = 0.1

[engines]
python = "{python}"
runtime_directory = "{runtime}"
sandbox = "{sandbox}"
device = "{device}"
canary = "off"
ready_seconds = {ready}

[[models]]
id = "{id}"
task = "{task}"
source = "{source}"
arguments = {arguments}
"""


class StepError(Exception):
    """A step failed. The message says what to do."""


@dataclass(frozen=True)
class Options:
    """`small`: small shapes, for a machine without a GPU. `gateway`, `engine`: existing interpreters."""

    pieces: Path
    work: Path
    out: Path
    device: str
    small: bool
    sandbox: str
    gateway: Path | None
    engine: Path | None
    port: int
    concurrency: tuple[tuple[int, ...], ...] = ((1, 8), (32, 64))

    @property
    def gateway_python(self) -> Path:
        return self.gateway or self.work / "gateway" / "bin" / "python"

    @property
    def engine_python(self) -> Path:
        return self.engine or self.work / "engine" / "bin" / "python"

    def models(self) -> list[shapes.Model]:
        return [model.small() if self.small else model for model in shapes.MODELS]


@dataclass(frozen=True)
class Step:
    """`seconds`: the longest time that it may take; it does not begin if less is left."""

    name: str
    seconds: float
    take: Callable[[Options], None]


def steps(options: Options) -> list[Step]:
    """All steps, in order."""
    found = []
    if options.gateway is None or options.engine is None:
        found.append(Step("install", 420, install))
    found += [Step("shapes", 30, write_shapes), Step("states", 60, states)]
    if options.device == "cuda":
        found.append(Step("transfer", 240, transfer))
    for model in options.models():
        for levels in options.concurrency:
            name = f"serve-{model.name}-{'-'.join(map(str, levels))}"
            found.append(Step(name, 540, partial(serve, model=model, levels=levels, name=name)))
    return found


def run(options: Options, limit: float, say: Callable[[str], None]) -> bool:
    """Runs steps until `limit` seconds are used. Returns whether all are done. Raises `StepError`."""
    options.out.mkdir(parents=True, exist_ok=True)
    options.work.mkdir(parents=True, exist_ok=True)
    path = options.out / "state.json"
    done: dict[str, float] = json.loads(path.read_text()) if path.exists() else {}
    began = time.monotonic()
    for step in steps(options):
        if step.name in done:
            continue
        left = limit - (time.monotonic() - began)
        if left < step.seconds:
            say(f"{step.name} may take {step.seconds:.0f} s and {left:.0f} are left: call again")
            return False
        started = time.monotonic()
        say(f"{step.name} ...")
        step.take(options)
        done[step.name] = round(time.monotonic() - started, 1)
        path.write_text(json.dumps(done, indent=1) + "\n")
        say(f"{step.name}: {done[step.name]} s")
    return True


def install(options: Options) -> None:
    """Makes two environments from the copied wheels: the gateway's, and the engines' over the machine's own torch."""
    wheels = options.work / "wheels"
    pieces.join(options.pieces, wheels)
    here = ROOT / "benchmarks" / "gpu"
    for name, more in (("gateway", []), ("engine", ["--system-site-packages"])):
        venv = options.work / name
        shutil.rmtree(venv, ignore_errors=True)
        _run([sys.executable, "-m", "venv", *more, str(venv)])
        pip = [str(venv / "bin" / "python"), "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"]
        _run([*pip, "--find-links", str(wheels), "-r", str(here / f"{name}.txt")])
    # The project itself, from this checkout.
    site = next((options.work / "gateway" / "lib").glob("python3.*")) / "site-packages"
    (site / "adytum-checkout.pth").write_text(f"{ROOT}\n")
    # Fails at once if a large wheel that was not copied turns out to be needed.
    _run([str(options.engine_python), "-c", "import torch, vllm; print(vllm.__version__, torch.__version__)"])


def write_shapes(options: Options) -> None:
    """Writes the models' folders."""
    for model in options.models():
        shapes.write(model, options.work / "models" / model.name)


def states(options: Options) -> None:
    """Records the backend's view of this machine: preflight, also with --require cc-on, and the devices' reports."""
    asked = {
        "preflight.txt": "adytum.inference preflight",
        "preflight-cc-on.txt": "adytum.inference preflight --require cc-on",
        "collect.txt": f"adytum.attestation collect --cpu none --gpus nvidia --nonce {'00' * 32}",
    }
    for name, words in asked.items():
        command = [str(options.gateway_python), "-m", *words.split()]
        found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        text = f"$ {' '.join(command[1:])}\n{found.stdout}{found.stderr}exit status {found.returncode}\n"
        (options.out / name).write_text(text)
        if name == "preflight-cc-on.txt" and found.returncode == 0:
            raise StepError("preflight --require cc-on accepts this machine: is it the machine for this run, CC off?")


def transfer(options: Options) -> None:
    """Measures the parts of CC's tax; here with CC off."""
    command = [
        str(options.gateway_python),
        "-m",
        "adytum.benchmarks",
        "transfer",
        "--out",
        str(options.out / "transfer.json"),
    ]
    _run([*command, "--engine-python", str(options.engine_python)])


def serve(options: Options, model: shapes.Model, levels: tuple[int, ...], name: str) -> None:
    """Drives the backend with one model, plaintext and sealed in turns."""
    config = options.work / f"{name}.toml"
    runtime = options.work / "run"
    runtime.mkdir(exist_ok=True, mode=0o700)
    arguments = ["--load-format", "dummy", *model.arguments]
    config.write_text(
        _CONFIG.format(
            port=options.port,
            python=options.engine_python,
            runtime=runtime,
            sandbox=options.sandbox,
            device=options.device,
            ready=420,
            id=model.id,
            task=model.task,
            source=options.work / "models" / model.name,
            arguments=json.dumps(arguments),
        )
        + ("kv_cache_bytes = 134217728\n" if options.device == "cpu" else "")
    )
    log = options.out / f"{name}.log"
    python = str(options.gateway_python)
    with log.open("wb") as written:
        backend = subprocess.Popen(
            [python, "-m", "adytum.inference", "serve", "--config", str(config)],
            cwd=ROOT,
            stdout=written,
            stderr=written,
        )
    try:
        _wait(backend, options.port, log)
        if options.device == "cuda":
            memory = _run([python, "-m", "adytum.benchmarks.gpu.memory", str(config)])
            (options.out / f"{name}-memory.json").write_text(memory)
        bench = [python, "-m", "adytum.benchmarks", "serve", "--config", str(config), "--arms", "direct", "ohttp"]
        bench += ["--concurrency", *map(str, levels), "--repetitions", "3", "--rounds", "2"]
        bench += ["--task", "chat" if model.task == "generate" else "embeddings", "--gateway-pid", str(backend.pid)]
        lengths = ("64", "16") if options.small else ("512", "128")
        bench += ["--prompt-tokens", lengths[0], "--output-tokens", lengths[1]]
        _run([*bench, "--out", str(options.out / f"{name}.json")])
    finally:
        backend.send_signal(signal.SIGTERM)
        try:
            backend.wait(60)
        except subprocess.TimeoutExpired:
            backend.kill()
            backend.wait()


def _wait(backend: "subprocess.Popen[bytes]", port: int, log: Path) -> None:
    while True:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=5) as answer:
                if answer.status == 200:
                    return
        except (urllib.error.URLError, OSError):
            pass
        if backend.poll() is not None:
            raise StepError(f"the backend ended while starting: read {log} and the engine's log beside it")
        time.sleep(0.5)


def _run(command: list[str]) -> str:
    found = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if found.returncode != 0:
        raise StepError(f"{' '.join(command[:6])} ... ended with status {found.returncode}:\n{found.stdout[-3000:]}")
    return found.stdout
