"""A relay that copies bytes between TCP and a Unix socket without looking at them: the least that any hop costs.

What `adytum.benchmarks.runs.serve` measures beyond it is the cost of the channel and of the gateway.
"""

import asyncio
import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import uvloop

from adytum.benchmarks.processes import python


class _Side(asyncio.Protocol):
    def __init__(self) -> None:
        self.transport: asyncio.Transport | None = None
        self.peer: _Side | None = None
        self._early = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        if self.peer is None or self.peer.transport is None:
            self._early += data
        else:
            self.peer.transport.write(data)

    def join(self, peer: "_Side") -> None:
        self.peer, peer.peer = peer, self
        if self._early and peer.transport is not None:
            peer.transport.write(self._early)

    def connection_lost(self, error: Exception | None) -> None:
        if self.peer is not None and self.peer.transport is not None:
            self.peer.transport.close()


class _Accepted(_Side):
    def __init__(self, path: str) -> None:
        super().__init__()
        self._path = path

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._connecting = asyncio.ensure_future(self._connect())

    async def _connect(self) -> None:
        _, upstream = await asyncio.get_running_loop().create_unix_connection(_Side, self._path)
        self.join(upstream)


def _serve(path: str, port: int) -> None:
    async def serve() -> None:
        server = await asyncio.get_running_loop().create_server(lambda: _Accepted(path), "127.0.0.1", port)
        await server.serve_forever()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(serve())


@contextlib.contextmanager
def running(path: Path, port: int) -> Iterator[str]:
    """A relay to the Unix socket `path`, in a process of its own. Yields its URL."""
    with python(_serve, str(path), port):
        yield f"http://127.0.0.1:{port}"
