"""The leak hunt: canaries along every path of a real backend with real vLLM, then searched for everywhere.

One run of some two minutes: requests that succeed, fail in every way a client can make them fail, are abandoned, are
overtaken by engines that crash and hang, by a shutdown and by a crash of the gateway itself. One hit fails.
"""

import asyncio
import contextlib
import json
import os
import re
import signal
import socket
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

from adytum.deploy.demo.relay import Relay
from adytum.inference.channel import bhttp, ohttp
from adytum.inference.channel.bhttp import RequestHead
from adytum.inference.gateway.edge.app import GATEWAY_PATH
from tests.conftest import free_port, wait_until_serving
from tests.pictures import carrying, data_url
from tests.support import ROOT, Answer, Wire, config_text, open_answer
from tests.system.leaks.places import Bytes, Files, Processes, WholeTree, Written, hunt
from tests.system.leaks.search import Canary, Searcher

GEMMA, E5 = "demo/gemma3", "demo/e5"
CHAT = "/v1/chat/completions"
_NAMES = tuple("prompt system tool image input key wrong-key model path field value header cut".split())  # noqa: SIM905


@dataclass
class Hunted:
    """A backend, the network in front of it, and what was sent."""

    process: subprocess.Popen[bytes]
    backend: Wire
    network: Wire
    relay: Relay
    folder: Path
    canaries: dict[str, Canary]
    written: Written | None
    since: float
    secrets: list[Canary] = field(default_factory=list)
    statuses: list[int] = field(default_factory=list)

    def word(self, name: str) -> str:
        return self.canaries[name].data.decode()

    def send(self, body: Any, path: str = CHAT, method: str = "POST", key: str | None = None) -> bytes:
        """A sealed request's bytes and, kept for the search, what its answer's keys derive from."""
        sealer = ohttp.RequestSealer(ohttp.CHUNKED, self.configuration)
        self.secrets.append(
            Canary(f"session {len(self.secrets)}", sealer._context.export(b"message/bhttp chunked response", 32))
        )
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        fields = (
            (b"content-type", b"application/json"),
            (b"authorization", b"Bearer " + (key or self.word("key")).encode()),
            (b"x-adytum-cache-domain", self.word("header").encode()),
        )
        message = bhttp.encode(RequestHead(method, "https", "backend", path, fields), content)
        self.sealer = sealer
        return sealer.start() + sealer.final(message)

    def ask(self, body: Any, path: str = CHAT, method: str = "POST", key: str | None = None) -> Answer:
        """A sealed request through the network, and its opened answer."""
        data = self.send(body, path, method, key)
        sealer = self.sealer
        status, _, wire = self.network.request("POST", GATEWAY_PATH, data, {"Content-Type": ohttp.CHUNKED.request})
        assert status == 200, wire
        answer = open_answer(sealer, wire)
        self.statuses.append(answer.status)
        return answer

    def begin(self, body: Any, wait: bool = True) -> socket.socket:
        """A sealed request whose answer has begun to come, and is left open."""
        data = self.send(body)
        connection = socket.create_connection(("127.0.0.1", self.network.port), timeout=60)
        head = f"POST {GATEWAY_PATH} HTTP/1.1\r\nHost: x\r\nContent-Type: message/ohttp-chunked-req\r\n"
        connection.sendall(head.encode() + f"Content-Length: {len(data)}\r\n\r\n".encode() + data)
        if wait:
            assert connection.recv(4096).startswith(b"HTTP/1.1 200")
        return connection

    def states(self) -> dict[str, str]:
        with urllib.request.urlopen(f"{self.backend.url}/readyz", timeout=5) as answer:
            states: dict[str, str] = json.load(answer)["models"]
            return states

    def until(self, model: str, *wanted: str) -> None:
        deadline = time.monotonic() + 900
        while self.states()[model] not in wanted:
            assert time.monotonic() < deadline, self.states()
            time.sleep(0.2)

    def core(self, model: str) -> int:
        """The engine's process that computes."""
        servers, cores = set(), set()
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError, ValueError):
                line = (entry / "cmdline").read_bytes().split(b"\0")
                if model.encode() in line and b"--serve" in line and any(bytes(self.folder) in part for part in line):
                    servers.add(int(entry.name))
                elif (entry / "comm").read_text().startswith("VLLM::EngineCor"):
                    cores.add(int(entry.name))
        return next(pid for pid in cores if _parent(pid) in servers)


def _parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


@pytest.fixture(scope="module")
def hunted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hunted]:
    folder = tmp_path_factory.mktemp("hunt")
    canaries = {name: Canary.text(name) for name in _NAMES}
    port = free_port()
    changes = {"ready_seconds": "900\nhung_seconds = 15", "max_requests": "6"}
    text = config_text(port=port, runtime=folder / "run", api_keys=[canaries["key"].data.decode()], changes=changes)
    text = re.sub(r'(?ms)^\[\[models\]\]\nid = "demo/llama-awq".*?(?=^\[\[models\]\])', "", text)
    metrics = free_port()
    text += f'\n[metering]\nrecords = "{folder / "usage.jsonl"}"\n[telemetry]\nport = {metrics}\n'
    (folder / "hunt.toml").write_text(text)
    since = time.time()
    ours = frozenset({os.getpid()})
    written: Written | None = Written(Searcher(canaries.values()), ours)
    try:
        written.start()  # type: ignore[union-attr]
    except PermissionError:
        written = None
    relay = Relay(port)
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    network = Wire(asyncio.run_coroutine_threadsafe(relay.start(), loop).result(10))
    with (folder / "backend.log").open("wb") as log:
        command = [
            sys.executable,
            "-X",
            "faulthandler",
            "-m",
            "adytum.inference",
            "serve",
            "--config",
            str(folder / "hunt.toml"),
        ]
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
    try:
        wait_until_serving(f"http://127.0.0.1:{port}", process, folder / "backend.log")
        found = Hunted(process, Wire(port), network, relay, folder, canaries, written, since)
        found.metrics = Wire(metrics)  # type: ignore[attr-defined]
        found.configuration = network.configuration()  # type: ignore[attr-defined]
        yield found
    finally:
        if process.poll() is None:
            process.kill()
            process.wait(30)
        asyncio.run_coroutine_threadsafe(relay.stop(), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)


def _messages(h: Hunted) -> list[dict[str, Any]]:
    return [{"role": "system", "content": h.word("system")}, {"role": "user", "content": h.word("prompt")}]


def _ask_everything(h: Hunted) -> None:
    """Requests that succeed, on every route."""
    chat = {"model": GEMMA, "messages": _messages(h), "max_tokens": 8}
    tools = [{"type": "function", "function": {"name": "f", "description": h.word("tool"), "parameters": {}}}]
    assert h.ask(chat).status == 200
    assert h.ask({**chat, "stream": True}).status == 200
    assert h.ask({**chat, "tools": tools, "user": h.word("field")}).status == 200
    seen = {"type": "image_url", "image_url": {"url": data_url(carrying(h.canaries["image"].data))}}
    asked = [{"role": "user", "content": [seen, {"type": "text", "text": h.word("prompt")}]}]
    assert h.ask({**chat, "messages": asked}).status == 200
    assert h.ask({"model": GEMMA, "prompt": h.word("prompt"), "max_tokens": 4}, "/v1/completions").status == 200
    assert h.ask({"model": GEMMA, "input": h.word("input"), "max_output_tokens": 4}, "/v1/responses").status == 200
    assert h.ask({**chat, "system": h.word("system"), "messages": _messages(h)[1:]}, "/v1/messages").status == 200
    assert h.ask({"model": E5, "input": [h.word("input"), h.word("prompt")]}, "/v1/embeddings").status == 200
    assert h.ask(b"", "/v1/models", "GET").status == 200


def _fail_everything(h: Hunted) -> None:
    """Every error that a client can make, each with a canary where the mistake is."""
    chat = {"model": GEMMA, "messages": _messages(h), "max_tokens": 8}
    image = h.canaries["image"].data
    broken = carrying(image)[:-200]
    parts, cut = (
        [{"type": "image_url", "image_url": {"url": data_url(data)}}, {"type": "text", "text": h.word("prompt")}]
        for data in (image * 3, broken)
    )
    value = h.word("value")
    bad: list[tuple[Any, ...]] = [
        (b'{"messages": "' + h.canaries["prompt"].data,),
        ({**chat, "model": h.word("model")},),
        ({**chat, "model": E5},),
        (chat, f"/v1/{h.word('path')}?{h.word('value')}"),
        (chat, CHAT, "PATCH"),
        (chat, CHAT, "POST", h.word("wrong-key")),
        ({**chat, "kv_transfer_params": {h.word("field"): value}},),
        (
            {
                **chat,
                "messages": [
                    {"role": "user", "content": [{"type": "image_url", "image_url": {"url": f"http://{value}"}}]}
                ],
            },
        ),
        ({**chat, "messages": [{"role": "user", "content": parts}]},),
        ({**chat, "messages": [{"role": "user", "content": cut}]},),
        ({**chat, "messages": [{"role": "user", "content": [*parts[:1], {"type": "text", "text": None}]}]},),
        ({**chat, "messages": [{"role": value, "content": value}]},),
        ({**chat, "messages": value},),
        ({**chat, "temperature": value},),
        ({**chat, "max_tokens": 10**9},),
        ({**chat, "messages": [{"role": "user", "content": (h.word("prompt") + " ") * 20_000}]},),
        ({**chat, "tools": [{"type": value}]},),
        ({**chat, "tool_choice": {"type": "function", "function": {"name": value}}},),
        (
            {
                **chat,
                "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": value}}},
            },
        ),
        ({**chat, "stop": [value], "logit_bias": {value: 1}},),
        ({**chat, "stream": True, "stream_options": value},),
        ({"model": E5, "input": {h.word("field"): value}}, "/v1/embeddings"),
        ({"model": E5, "input": (h.word("input") + " ") * 5000}, "/v1/embeddings"),
        ({"model": GEMMA, "input": [{"type": value}]}, "/v1/responses"),
        ({"model": GEMMA, "messages": value, "max_tokens": 1}, "/v1/messages"),
    ]
    statuses = [h.ask(*asked).status for asked in bad]
    # vLLM takes three of them.
    assert sum(status >= 400 for status in statuses) >= 20, statuses
    # Outside the seal, by mistake: refused, and neither echoed nor logged.
    status, _, body = h.backend.request("POST", f"{CHAT}?{value}", json.dumps(chat).encode(), {h.word("header"): value})
    assert (status, h.canaries["prompt"].data in body) == (400, False)
    status, _, body = h.backend.request("GET", f"/{h.word('path')}")
    assert (status, h.canaries["path"].data in body) == (404, False)


def _disturb(h: Hunted) -> None:
    """Clients that leave, too many at once, an engine that hangs and one that crashes."""
    long = {"model": GEMMA, "messages": _messages(h), "max_tokens": 900, "min_tokens": 900, "stream": True}
    cut = {**long, "messages": [{"role": "user", "content": h.word("cut")}]}
    h.begin(cut).close()
    # Cut off while it is sent.
    data = h.send(cut)
    with socket.create_connection(("127.0.0.1", h.network.port)) as connection:
        head = f"POST {GATEWAY_PATH} HTTP/1.1\r\nHost: x\r\nContent-Type: message/ohttp-chunked-req\r\n"
        connection.sendall(head.encode() + f"Content-Length: {len(data)}\r\n\r\n".encode() + data[:1500])
    open_ones = [h.begin(long) for _ in range(5)]
    open_ones += [h.begin(long, wait=False) for _ in range(3)]
    time.sleep(0.5)
    status, _, _ = h.network.request("POST", GATEWAY_PATH, h.send(long), {"Content-Type": ohttp.CHUNKED.request})
    assert status == 503, "too many at once"
    os.kill(h.core(GEMMA), signal.SIGSEGV)
    h.until(GEMMA, "restarting", "checking")
    for connection in open_ones:
        # Those that were refused stay open for another request.
        connection.settimeout(1)
        with contextlib.suppress(OSError):
            while connection.recv(65_536):
                pass
        connection.close()
    assert h.ask({"model": GEMMA, "messages": _messages(h)}).status == 503
    stuck = h.core(E5)
    os.kill(stuck, signal.SIGSTOP)
    assert h.ask({"model": E5, "input": h.word("input")}, "/v1/embeddings").status in (502, 503)
    h.until(E5, "live")
    h.until(GEMMA, "live")
    assert h.ask({"model": GEMMA, "messages": _messages(h), "max_tokens": 4}).status == 200


def _outside(h: Hunted) -> bytes:
    """All that the backend and its engines tell any caller."""
    pages = [h.backend.request("GET", path)[2] for path in ("/readyz", "/healthz", "/v1/models", GATEWAY_PATH)]
    pages.append(h.backend.request("GET", f"/.well-known/attestation?nonce={'1' * 64}")[2])
    for name in (GEMMA, E5):
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(str(h.folder / "run" / name.replace("/", "-") / "engine.sock"))
            connection.sendall(b"GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            pages.append(b"".join(iter(lambda: connection.recv(65_536), b"")))
    own = h.metrics.request("GET", "/metrics")[2]  # type: ignore[attr-defined]
    assert b'adytum_requests_total{model="demo/gemma3"' in own
    assert b'adytum_model_state{model="demo/e5",state="live"} 1.0' in own
    assert b"adytum_evidence_rounds" in own
    assert h.metrics.request("GET", "/")[0] == 404  # type: ignore[attr-defined]
    return b"".join((*pages, own))


# Two minutes by itself; on a machine with other work, engines start and stop several times more slowly.
@pytest.mark.engine
@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_nothing_of_a_conversation_is_found_anywhere(hunted: Hunted) -> None:
    h = hunted
    _ask_everything(h)
    _fail_everything(h)
    _disturb(h)
    said = _outside(h)
    processes = frozenset({os.getpid(), *_ancestors(os.getpid())})
    running = hunt([Processes(processes)], Searcher([*h.canaries.values(), *h.secrets]))
    for name in (GEMMA, E5):
        folder = h.folder / "run" / name.replace("/", "-")
        assert folder.stat().st_mode & 0o077 == 0, "only the engine's user and root reach its socket"
    # A stream is under way when the operator stops the backend, and when that crashes.
    left = h.begin({"model": GEMMA, "messages": _messages(h), "max_tokens": 900, "min_tokens": 900, "stream": True})
    h.process.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    h.process.send_signal(signal.SIGSEGV)
    _, status = os.waitpid(h.process.pid, 0)
    h.process.returncode = -os.WTERMSIG(status)
    assert os.WTERMSIG(status) == signal.SIGSEGV
    assert not os.WCOREDUMP(status)
    left.close()
    time.sleep(1)
    logs = [h.folder / "backend.log", *(h.folder / "run").glob("*.log")]
    assert len(logs) == 3
    assert b"Fatal Python error: Segmentation fault" in logs[0].read_bytes(), "its traceback is searched too"
    places: list[Any] = [
        Bytes("what clients sent", lambda: bytes(h.relay.sent)),
        Bytes("what clients got", lambda: bytes(h.relay.answered)),
        Bytes("pages and metrics", lambda: said),
        Files("logs, standard output and error", lambda: logs),
        Files("usage records", lambda: [h.folder / "usage.jsonl"]),
        WholeTree(h.since),
    ]
    if h.written is not None:
        h.written.stop()
        places.append(h.written)
    assert len(h.secrets) > 30
    assert {200, 400, 401, 404, 405, 503} <= set(h.statuses)
    searcher = Searcher([*h.canaries.values(), *h.secrets])
    assert hunt(places, searcher) | running == set()


def _ancestors(pid: int) -> list[int]:
    found = []
    while (pid := _parent(pid)) > 1:
        found.append(pid)
    return found
