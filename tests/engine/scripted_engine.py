"""In place of the launcher in tests of supervision: a server on the engine's socket that does what a folder tells it.

Files in the folder that `SCRIPT` names: `dead` (it does not start), `hung` (it answers nothing), `progress` (its
counters move). Each start adds a line to `starts`.
"""

import argparse
import asyncio
import os
import sys
import time
from pathlib import Path

from aiohttp import web

FOLDER = Path(os.environ["SCRIPT"])


async def _health(_request: web.Request) -> web.Response:
    return web.Response()


async def _metrics(_request: web.Request) -> web.Response:
    while (FOLDER / "hung").exists():
        await asyncio.sleep(0.05)
    moved = time.monotonic_ns() if (FOLDER / "progress").exists() else 0
    return web.Response(text=f"vllm:generation_tokens_total {moved}\nvllm:other {time.monotonic_ns()}\n")


async def _chat(request: web.Request) -> web.StreamResponse:
    await request.read()
    answer = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await answer.prepare(request)
    await answer.write(b'data: {"choices":[]}\n\n')
    await asyncio.sleep(60)
    return answer


def main() -> None:
    """Serves until SIGTERM or the lifeline's end, as the launcher does."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--lifeline", type=int)
    parser.add_argument("--socket")
    options, _ = parser.parse_known_args()
    with (FOLDER / "starts").open("a") as starts:
        starts.write(f"{os.getpid()}\n")
    if (FOLDER / "dead").exists():
        sys.exit(3)
    app = web.Application()
    app.router.add_get("/health", _health)
    app.router.add_get("/metrics", _metrics)
    app.router.add_post("/v1/chat/completions", _chat)

    async def follow_lifeline(_app: web.Application) -> None:
        asyncio.get_running_loop().add_reader(options.lifeline, os._exit, 0)

    app.on_startup.append(follow_lifeline)
    web.run_app(app, path=options.socket, print=None)


if __name__ == "__main__":
    main()
