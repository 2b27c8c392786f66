"""One replica in a process of its own, so that it can be killed: the real gateway before a scripted engine.

    python -m tests.system.replica <configuration> <folder>

The engine appends the first message of each request that it is asked to `<folder>/asked`, before it answers.
"""

import signal
import sys
from pathlib import Path
from typing import Any

from aiohttp import web

from adytum.inference.core.config import load
from tests.unit.gateway.support import ScriptedEngine, running_gateway


class Recording(ScriptedEngine):
    """Keeps what it was asked where the end of the process leaves it."""

    def __init__(self, asked: Path) -> None:
        super().__init__()
        self._asked = asked

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        body: dict[str, Any] = await request.json()
        with self._asked.open("a") as file:
            file.write(body["messages"][0]["content"] + "\n")
        return await super()._answer(request)


def main() -> None:
    config, folder = load(Path(sys.argv[1])), Path(sys.argv[2])
    with running_gateway(config, folder, engine=Recording(folder / "asked")):
        signal.sigwait({signal.SIGTERM, signal.SIGINT})


if __name__ == "__main__":
    main()
