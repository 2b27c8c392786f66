"""A backend of two models whose engines are killed, and that is told to stop while it answers. Real vLLM."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from adytum.inference.channel import ohttp
from adytum.inference.gateway.edge.app import GATEWAY_PATH
from tests.conftest import free_port, wait_until_serving
from tests.support import ROOT, Answer, Wire, config_text, open_answer, seal, sealed_chat

LLAMA, E5 = "demo/llama-awq", "demo/e5"
SECONDS = 900
"""For an engine to start on a busy machine; by itself it takes twenty."""
pytestmark = pytest.mark.engine


@dataclass
class _Two:
    """A backend with the Llama and the embedding model."""

    process: subprocess.Popen[bytes]
    wire: Wire
    log: Path
    runtime: Path

    def states(self) -> dict[str, str]:
        with urllib.request.urlopen(f"{self.wire.url}/readyz", timeout=5) as answer:
            states: dict[str, str] = json.load(answer)["models"]
            return states

    def engine(self, model: str) -> dict[str, int]:
        """The engine's processes: guard, API server, core."""
        lines: dict[int, list[bytes]] = {}
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                with contextlib.suppress(OSError):
                    lines[int(entry.name)] = (entry / "cmdline").read_bytes().split(b"\0")
        ours = {
            pid: line
            for pid, line in lines.items()
            if model.encode() in line and any(part.startswith(bytes(self.runtime)) for part in line)
        }
        guard = next(pid for pid, line in ours.items() if b"--serve" not in line)
        # Two have this command line: the one outside the sandbox waits for the one inside, which has the core.
        servers = {pid for pid, line in ours.items() if b"--serve" in line}
        core = next(pid for pid in lines if _name(pid).startswith("VLLM::EngineCor") and _parent(pid) in servers)
        server = _parent(core)
        return {"guard": guard, "server": server, "core": core}


def _name(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return ""


def _parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[_Two]:
    folder = tmp_path_factory.mktemp("two")
    port = free_port()
    text = config_text(port=port, runtime=folder / "run", changes={"ready_seconds": "900\nhung_seconds = 15"})
    text = re.sub(r'(?ms)^\[\[models\]\]\nid = "demo/gemma3".*?(?=^\[\[models\]\])', "", text)
    config = folder / "two.toml"
    config.write_text(text)
    log = folder / "backend.log"
    with log.open("wb") as out:
        command = [sys.executable, "-m", "adytum.inference", "serve", "--config", str(config)]
        process = subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT)
    try:
        wait_until_serving(f"http://127.0.0.1:{port}", process, log)
        yield _Two(process, Wire(port), log, folder / "run")
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait(60)


@dataclass
class _Stream:
    """A sealed stream that runs in a thread."""

    wire: Wire
    tokens: int
    thread: threading.Thread = field(init=False)
    answer: Answer | None = None
    ended_at: float = 0.0
    begun: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self.thread = threading.Thread(target=self._run)
        self.thread.start()
        assert self.begun.wait(120)

    def _run(self) -> None:
        body = {
            "model": LLAMA,
            "messages": [{"role": "user", "content": "What is remote attestation?"}],
            "stream": True,
            "max_tokens": self.tokens,
            "ignore_eos": True,
            "temperature": 0,
        }
        sealer = ohttp.RequestSealer(ohttp.CHUNKED, self.wire.configuration())
        request = urllib.request.Request(
            self.wire.url + GATEWAY_PATH, seal(sealer, body), {"Content-Type": ohttp.CHUNKED.request}
        )
        received = b""
        with urllib.request.urlopen(request, timeout=60) as answer:
            while piece := answer.read1(65536):
                received += piece
                if len(received) > 4096:
                    self.begun.set()
        self.ended_at = time.monotonic()
        self.answer = open_answer(sealer, received)

    def result(self) -> tuple[str, float]:
        """("complete" or the error's code, when it ended)."""
        self.thread.join(120)
        assert self.answer is not None, "the stream did not arrive whole"
        assert self.answer.status == 200
        if b"data: [DONE]" in self.answer.content:
            return "complete", self.ended_at
        errors = [line[6:] for line in self.answer.content.split(b"\n") if b'"error"' in line]
        assert errors, self.answer.content[-300:]
        return str(json.loads(errors[-1])["error"]["code"]), self.ended_at


def _embed(wire: Wire) -> Any:
    return sealed_chat(wire, {"model": E5, "input": "query: attestation"}, path="/v1/embeddings").json()["data"][0]


def _until(two: _Two, state: str, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while two.states()[LLAMA] != state:
        assert time.monotonic() < deadline, two.log.read_text()[-2000:]
        time.sleep(0.25)


@pytest.mark.parametrize(
    ("part", "sent"), [("server", signal.SIGKILL), ("core", signal.SIGSTOP), ("guard", signal.SIGKILL)]
)
def test_a_broken_engine_ends_its_streams_and_comes_back_alone(two: _Two, part: str, sent: signal.Signals) -> None:
    """Killed, hung, or its guard killed: a sealed error, a new engine, and nothing for the other model."""
    _until(two, "live", SECONDS)
    before = _embed(two.wire)
    e5 = two.engine(E5)
    stream = _Stream(two.wire, 1900)
    old = two.engine(LLAMA)
    broken_at = time.monotonic()
    os.kill(old[part], sent)
    code, ended_at = stream.result()
    assert code == "engine_failed"
    # An engine that hangs is given up after fifteen seconds, another at once; a busy machine adds to both.
    assert ended_at - broken_at < 50
    refused = sealed_chat(two.wire, {"model": LLAMA, "messages": [{"role": "user", "content": "x"}]})
    assert (refused.status, refused.json()["error"]["code"]) == (503, "engine_unavailable")
    assert _embed(two.wire) == before
    # The guard ends only when nothing of the engine is left.
    _until(two, "restarting", 60)
    assert two.states()[E5] == "live"
    _until(two, "live", SECONDS)
    assert two.engine(E5) == e5, "the other model's engine was touched"
    new = two.engine(LLAMA)
    assert not set(new.values()) & {old[name] for name in ("guard", "server", "core")}
    for name in ("guard", "server", "core"):
        assert not Path(f"/proc/{old[name]}").exists(), f"{name} was left behind"
    answer = sealed_chat(two.wire, {"model": LLAMA, "messages": [{"role": "user", "content": "x"}], "max_tokens": 3})
    assert answer.status == 200


def test_a_stop_lets_a_stream_end_and_leaves_nothing(two: _Two) -> None:
    _until(two, "live", SECONDS)
    processes = {*two.engine(LLAMA).values(), *two.engine(E5).values()}
    stream = _Stream(two.wire, 1900)
    two.process.send_signal(signal.SIGTERM)
    assert stream.result()[0] == "complete"
    assert two.process.wait(30) == 0
    assert "DRAINING" in two.log.read_text()
    assert not [pid for pid in processes if Path(f"/proc/{pid}").exists()]
    assert not list(two.runtime.rglob("*.sock"))
