"""CPU time per streamed chunk on the client, for each way to read a stream. Run as a program:

    .venv/bin/python -m tests.unit.client.measure [CHUNKS]

A process serves small events a millisecond apart, in the clear and sealed, so that each is a read of its own. Reading
in the clear is the baseline; the rest is the cost of the seal. Loopback, one stream at a time, the minimum of five
rounds.
"""

import asyncio
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import aiohttp
import httpx2

from adytum.attestation.policy.policy import Policy
from adytum.inference.channel.exchange import InnerRequest
from adytum.inference.client.transport import AdytumTransport, AsyncAdytumTransport
from tests.conftest import free_port
from tests.support import ROOT
from tests.unit.client import support

GAP = 0.001
ROUNDS = 5
"""The minimum counts: other work on the machine only adds."""
EVENT = b'data: {"id":"c","object":"chat.completion.chunk","choices":[{"index":0,"delta":{"content":" word"}}]}\n\n'
SIMULATED = Policy.accept_simulated()


class _Server(support.Fake):
    """Also serves the stream in the clear, at /plain."""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["path"] != "/plain":
            await super().__call__(scope, receive, send)
            return
        await send({"type": "http.response.start", "status": 200, "headers": list(support.SSE)})
        for _ in range(int(scope["query_string"])):
            await asyncio.sleep(GAP)
            await send({"type": "http.response.body", "body": EVENT, "more_body": True})
        await send({"type": "http.response.body", "body": b""})


def serve(port: int) -> None:
    import uvicorn

    def script(request: InnerRequest) -> list[bytes]:
        return [EVENT] * int(json.loads(request.body)["chunks"])

    support.script = script
    uvicorn.run(_Server(gap=GAP), port=port, http="httptools", loop="uvloop", lifespan="off", log_level="critical")


def cpu_of(pid: int) -> float:
    """CPU seconds of a process, all threads."""
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks) / 1e9


def read(client: httpx2.Client, method: str, url: str, body: Any = None) -> int:
    with client.stream(method, url, json=body) as response:
        return sum(1 for _ in response.iter_raw())


async def aread(client: httpx2.AsyncClient, method: str, url: str, body: Any = None) -> int:
    async with client.stream(method, url, json=body) as response:
        return sum([1 async for _ in response.aiter_raw()])


async def read_aiohttp(url: str) -> int:
    count = 0
    async with aiohttp.ClientSession() as session, session.get(url) as response:
        while await response.content.readany():
            count += 1
    return count


def measure(chunks: int) -> None:
    port, proxy_port = free_port(), free_port()
    policy = ROOT / "deploy" / "config" / "demo-policy.toml"
    url, proxy = f"http://127.0.0.1:{port}", f"http://127.0.0.1:{proxy_port}"
    server = subprocess.Popen([sys.executable, "-m", "tests.unit.client.measure", "serve", str(port)], cwd=ROOT)
    options = ["--upstream", url, "--policy", str(policy), "--port", str(proxy_port)]
    forwarding = subprocess.Popen(
        [sys.executable, "-m", "adytum.inference", "proxy", *options], cwd=ROOT, stderr=subprocess.DEVNULL
    )
    chat, body = "/v1/chat/completions", {"chunks": chunks, "stream": True}
    try:
        for wanted in (f"{url}/plain?1", f"{proxy}/healthz"):
            _wait_for(wanted)
        own = os.getpid()

        best: dict[str, float] = {}

        def note(name: str, pid: int, count: int, before: float) -> None:
            cost = (cpu_of(pid) - before) / count * 1e6
            best[name] = min(cost, best.get(name, cost))

        def synchronous() -> None:
            with httpx2.Client(timeout=60) as plain:
                before = cpu_of(own)
                note("httpx2, in the clear", own, read(plain, "GET", f"{url}/plain?{chunks}"), before)
            with httpx2.Client(transport=AdytumTransport(url, SIMULATED), timeout=60) as sealed:
                sealed.post(f"{url}{chat}", json={"chunks": 1})
                before = cpu_of(own)
                note("httpx2, AdytumTransport", own, read(sealed, "POST", f"{url}{chat}", body), before)

        async def asynchronous() -> None:
            async with httpx2.AsyncClient(timeout=60) as plain:
                before = cpu_of(own)
                note("httpx2 async, in the clear", own, await aread(plain, "GET", f"{url}/plain?{chunks}"), before)
            transport = AsyncAdytumTransport(url, SIMULATED)
            async with httpx2.AsyncClient(transport=transport, timeout=60) as sealed:
                await sealed.post(f"{url}{chat}", json={"chunks": 1})
                before = cpu_of(own)
                count = await aread(sealed, "POST", f"{url}{chat}", body)
                note("httpx2 async, AsyncAdytumTransport", own, count, before)
            before = cpu_of(own)
            note("aiohttp, in the clear", own, await read_aiohttp(f"{url}/plain?{chunks}"), before)

        def proxied() -> None:
            with httpx2.Client(timeout=60) as caller:
                caller.post(f"{proxy}{chat}", json={"chunks": 1})
                before = cpu_of(forwarding.pid)
                note("the proxy's process", forwarding.pid, read(caller, "POST", f"{proxy}{chat}", body), before)

        for _ in range(ROUNDS):
            synchronous()
            asyncio.run(asynchronous())
            proxied()
        for name, cost in best.items():
            print(f"{name:37}{cost:6.1f} µs a chunk")  # noqa: T201
    finally:
        for process in (server, forwarding):
            process.terminate()
            process.wait(20)


def _wait_for(url: str) -> None:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            httpx2.get(url)
            return
        except httpx2.TransportError:
            time.sleep(0.05)
    raise TimeoutError(url)


if __name__ == "__main__":
    if sys.argv[1:2] == ["serve"]:
        serve(int(sys.argv[2]))
    else:
        measure(int(sys.argv[1]) if len(sys.argv) > 1 else 3000)
