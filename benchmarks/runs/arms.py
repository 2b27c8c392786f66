"""The arms of a serving run: each is a way from a client to one engine, and all run for the whole run."""

import asyncio
import contextlib
import json
import secrets
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from adytum.benchmarks.channel.gateway import gateway_process
from adytum.benchmarks.errors import Unusable
from adytum.benchmarks.load import load, relay
from adytum.benchmarks.load.generator import Generator, Load
from adytum.benchmarks.load.samples import request
from adytum.benchmarks.processes import cpu_ticks, free_port, python, wait_for
from adytum.benchmarks.runfile.runfile import Level, Request
from adytum.inference.channel.exchange import Shape
from adytum.inference.channel.hpke import KemId
from adytum.inference.channel.padding import Padding
from adytum.inference.channel.shaping import Cells

_READY_S = 60
VLLM, OWN = "vllm bench serve", "benchmarks.load"
SHAPES: dict[str, Shape] = {"off": Padding.OFF, "pad": Padding.PAD, "constant": Cells(2048, 32, 0.01)}
"""Shapes of answers. The cells are those of docs/explanation/shaping.md."""


@dataclass(frozen=True)
class Arm:
    """`way`: engine, relay, proxy (our local proxy), ohttp, ehbp, or the gateway of a shape."""

    name: str
    client: str
    way: str
    what: str
    kem: str = ""


_KEMS = {"mlkem768-x25519": KemId.MLKEM768_X25519, "x25519": KemId.X25519}
_XWING = "mlkem768-x25519"
ARMS = {
    arm.name: arm
    for arm in (
        Arm("direct", VLLM, "relay", "plaintext to the engine's socket, over a relay that copies bytes"),
        Arm("ohttp", VLLM, "proxy", "the local proxy, Oblivious HTTP with X-Wing, the gateway", _XWING),
        Arm("ohttp-x25519", VLLM, "proxy", "the local proxy, Oblivious HTTP with X25519, the gateway", "x25519"),
        Arm("own-direct", OWN, "engine", "plaintext on the engine's socket, no relay"),
        Arm("own-relay", OWN, "relay", "like direct: compares the two clients"),
        Arm("own-proxy", OWN, "proxy", "like ohttp: compares the two clients", _XWING),
        Arm("own-ohttp", OWN, "ohttp", "sealed in the client, Oblivious HTTP with X-Wing", _XWING),
        Arm("own-ohttp-x25519", OWN, "ohttp", "sealed in the client, Oblivious HTTP with X25519", "x25519"),
        Arm("own-ehbp", OWN, "ehbp", "sealed in the client, EHBP (X25519)", "x25519"),
        *(Arm(f"own-shape-{name}", OWN, name, f"like own-ohttp, answers shaped {name!r}", _XWING) for name in SHAPES),
    )
}


@dataclass(frozen=True)
class Backend:
    """The backend that is measured. `gateway`: its process, if known."""

    url: str
    socket: Path
    policy: Path
    api_key: str = ""
    gateway: int | None = None


class Arms:
    """All arms of a run, running."""

    def __init__(
        self, backend: Backend, generator: Generator | None, load_: Load, urls: dict[str, str], pids: dict[str, int]
    ) -> None:
        self._backend = backend
        self._generator = generator
        self._load = load_
        self._urls = urls
        self._pids = pids

    def flags(self, arm: Arm, level: Level, requests: int, seed: int) -> list[str] | None:
        """The generator's flags, if the arm uses it."""
        if arm.client != VLLM:
            return None
        return self._load.flags(level, requests, seed, self._urls[arm.name], _salt())

    def run(self, arm: Arm, level: Level, requests: int, seed: int) -> tuple[list[Request], float, float | None]:
        """One load: its requests, its wall time, and the gateway's CPU time (None if unknown), in seconds."""
        assert self._generator is not None
        pid = self._pids.get(arm.name, self._backend.gateway)
        if arm.client == VLLM:
            flags = self._load.flags(level, requests, seed, self._urls[arm.name], _salt())
            before = _cpu(pid)
            found, wall = self._generator.load(flags)
        else:
            path = load.PATH if self._load.task == "chat" else load.EMBEDDINGS
            # The same words as the generator's, so that the two clients can be compared.
            prompts = self._generator.prompts(self._load.flags(level, requests, seed))
            model, tokens, salt = self._load.model, self._load.output_tokens, _salt()
            bodies = [load.body(path, model, prompt, tokens, salt) for prompt in prompts]
            before = _cpu(pid)
            samples, wall = asyncio.run(self._own(arm, path, bodies, level, seed))
            found = [request(sample) for sample in samples]
        after = _cpu(pid)
        return found, wall, None if before is None or after is None else after - before

    async def _own(
        self, arm: Arm, path: str, bodies: Sequence[bytes], level: Level, seed: int
    ) -> tuple[list[load.Sample], float]:
        url, key = self._urls.get(arm.name, self._backend.url), self._backend.api_key
        client: load.Arm
        if arm.way == "engine":
            client = load.Plaintext(self._backend.socket, path=path)
        elif arm.way in ("relay", "proxy"):
            client = load.Plaintext(self._backend.socket, url, path=path, api_key=key)
        elif arm.way == "ehbp":
            client = await load.Ehbp.connect(url, path=path, api_key=key)
        else:
            client = await load.Sealed.connect(url, _KEMS[arm.kem], path=path, api_key=key)
        try:
            if level.kind == "closed":
                return await load.closed(client, bodies, round(level.value))
            return await load.poisson(client, bodies, level.value, seed)
        finally:
            await client.close()


def _salt() -> str:
    """A fresh salt for one load. Every arm sends the same prompts, and only the gateway salts them: without this, the
    second of two plaintext arms would find its prompts in the engine's cache."""
    return secrets.token_hex(16)


def _cpu(pid: int | None) -> float | None:
    return None if pid is None else cpu_ticks(pid)


@contextlib.contextmanager
def running(backend: Backend, generator: Generator | None, load_: Load, arms: Sequence[Arm]) -> Iterator[Arms]:
    """Starts what the arms need in addition to the backend: the relay, a proxy per KEM, a gateway per shape."""
    urls: dict[str, str] = {}
    pids: dict[str, int] = {}
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        started: dict[tuple[str, str], str] = {}
        for arm in arms:
            thing = (arm.way, arm.kem if arm.way == "proxy" else "")
            if thing not in started and arm.way == "relay":
                port = free_port()
                started[thing] = stack.enter_context(relay.running(backend.socket, port))
                _listening(port)
            elif thing not in started and arm.way == "proxy":
                started[thing] = stack.enter_context(_proxy(backend, arm.kem, folder))
            elif thing not in started and arm.way in SHAPES:
                started[thing], pids[arm.name] = stack.enter_context(_shaped(backend, SHAPES[arm.way]))
            if thing in started:
                urls[arm.name] = started[thing]
        yield Arms(backend, generator, load_, urls, pids)


@contextlib.contextmanager
def _proxy(backend: Backend, kem: str, folder: Path) -> Iterator[str]:
    port, log = free_port(), folder / f"proxy-{kem}.log"
    command = [sys.executable, "-m", "adytum.inference", "proxy", "--upstream", backend.url, "--port", str(port)]
    with log.open("wb") as out:
        process = subprocess.Popen(
            [*command, "--policy", str(backend.policy), "--kem", kem], stdout=out, stderr=subprocess.STDOUT
        )
    try:
        deadline = time.monotonic() + _READY_S
        while not _verified(port):
            if process.poll() is not None or time.monotonic() > deadline:
                raise Unusable(f"the local proxy did not verify {backend.url}:\n{log.read_text()[-2000:]}")
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(20)


def _verified(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/healthz", timeout=2) as answer:
            return bool(json.load(answer)["verified"])
    except (OSError, ValueError, urllib.error.URLError):
        return False


@contextlib.contextmanager
def _shaped(backend: Backend, shape: Shape) -> Iterator[tuple[str, int]]:
    """A gateway of the demo's configuration in front of the engine, with answers of `shape`. Yields URL and process."""
    port = free_port()
    with python(gateway_process, str(backend.socket), port, shape) as pid:
        _listening(port)
        yield f"http://127.0.0.1:{port}", pid


def _listening(port: int) -> None:
    if not wait_for(port, _READY_S):
        raise Unusable(f"nothing listens on port {port} of this machine after {_READY_S} s")
