"""An engine that computes nothing and takes the modelled time: continuous batching over a model of a decode step.

All running sequences get one token in each step, as in vLLM. A step takes the model's time for their number. The engine
serves OpenAI's streamed chat, so every client and the gateway can talk to it.
"""

import asyncio
import json
from collections.abc import Callable

from aiohttp import web

from adytum.benchmarks.load import load

_EVENT = {
    "id": "chatcmpl-9f0123456789abcdef",
    "object": "chat.completion.chunk",
    "created": 1763859000,
    "model": "synthetic",
    "choices": [{"index": 0, "delta": {"content": "word "}, "logprobs": None, "finish_reason": None}],
}
_DATA = b"data: " + json.dumps(_EVENT, separators=(",", ":")).encode() + b"\n\n"


class Engine:
    """`step_s`: seconds of a step, by the number of sequences. `byte_s`: seconds for each byte of a request, once."""

    def __init__(self, step_s: Callable[[int], float], byte_s: float = 0.0) -> None:
        self._step_s = step_s
        self._byte_s = byte_s
        self._waiting: set[asyncio.Future[None]] = set()
        self._stepping: asyncio.Task[None] | None = None

    def app(self) -> web.Application:
        """The web application."""
        app = web.Application(client_max_size=1 << 26)
        app.router.add_post(load.PATH, self._chat)
        return app

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        body = await request.read()
        asked = json.loads(body)
        tokens = int(asked.get("max_completion_tokens") or asked["max_tokens"])
        await asyncio.sleep(len(body) * self._byte_s)
        answer = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await answer.prepare(request)
        for _ in range(tokens):
            await self._step()
            await answer.write(_DATA)
        usage = {"choices": [], "usage": {"prompt_tokens": len(body) // 4, "completion_tokens": tokens}}
        await answer.write(b"data: " + json.dumps(usage, separators=(",", ":")).encode() + b"\n\ndata: [DONE]\n\n")
        return answer

    async def _step(self) -> None:
        """Waits for the end of the next step that begins."""
        done = asyncio.get_running_loop().create_future()
        self._waiting.add(done)
        if self._stepping is None or self._stepping.done():
            self._stepping = asyncio.create_task(self._steps())
        await done

    async def _steps(self) -> None:
        loop = asyncio.get_running_loop()
        due = loop.time()
        while self._waiting:
            batch, self._waiting = self._waiting, set()
            # By the clock, not by the pause: the loop's own time is part of the step.
            due = max(due, loop.time() - 0.001) + self._step_s(len(batch))
            await asyncio.sleep(due - loop.time())
            for done in batch:
                if not done.done():
                    done.set_result(None)
            # Each request writes its token and asks for the next one before the next step begins.
            for _ in range(4):
                await asyncio.sleep(0)


def serve(path: str, workload: str, step_tax_ms: float, byte_tax_ns: float) -> None:
    """Serves on the Unix socket `path` until this process ends. `workload` is a key of `costs.WORKLOADS`."""
    from adytum.benchmarks.cc.costs import WORKLOADS

    model = WORKLOADS[workload]
    engine = Engine(lambda batch: (model.step_ms(batch) + step_tax_ms) / 1000, byte_tax_ns / 1e9)
    web.run_app(engine.app(), path=path, print=None, backlog=1024)
