"""Web servers in a thread for tests: they end at once, and their time can be moved on."""

import asyncio
import selectors
import socket
import threading
from typing import Any

import uvicorn


class ClockLoop(asyncio.SelectorEventLoop):
    """An event loop whose time runs as usual, and can be moved on: whatever waits for a later time is then due.

    Time limits of seconds or minutes are tested so without waiting for them, and without loosening them.
    """

    def __init__(self) -> None:
        super().__init__()
        self._skipped = 0.0

    def time(self) -> float:
        return super().time() + self._skipped

    def skip(self, seconds: float) -> None:
        """Moves time on, from any thread. Returns once all that was due has run."""
        moved = threading.Event()

        def move() -> None:
            self._skipped += seconds
            # Timers that are due now are handled in the loop's next turn, what they call soon in the one after it.
            self.call_soon(self.call_soon, self.call_soon, moved.set)

        self.call_soon_threadsafe(move)
        assert moved.wait(20)


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop for tasks without a network: it does not wait, but moves its time to what is due next.

    What takes no time in such a loop takes exactly none, so times can be compared exactly on any machine.
    """

    def __init__(self) -> None:
        super().__init__(_Hurried(self))
        self._now = 0.0

    def time(self) -> float:
        return self._now

    def move(self, seconds: float) -> None:
        self._now += seconds


class _Hurried(selectors.SelectSelector):
    def __init__(self, loop: VirtualLoop) -> None:
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None or timeout <= 0:
            return super().select(timeout)
        self._loop.move(timeout)
        return super().select(0)


class QuickServer(uvicorn.Server):
    """uvicorn, but `end` ends it at once and cuts its connections. Its own end takes a quarter of a second."""

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        self._ended = asyncio.Event()
        await super().serve(sockets)

    def end(self) -> None:
        """Ends the server, from any thread."""
        self._loop.call_soon_threadsafe(self._ended.set)

    async def main_loop(self) -> None:
        await self.on_tick(0)
        await self._ended.wait()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for server in self.servers:
            server.close()
        connections: Any = list(self.server_state.connections)
        for connection in connections:
            connection.transport.abort()
        for task in list(self.server_state.tasks):
            task.cancel()
        await asyncio.gather(*self.server_state.tasks, return_exceptions=True)
        await self.lifespan.shutdown()
