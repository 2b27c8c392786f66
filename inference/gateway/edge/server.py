"""The web server of the gateway: where it listens and how it ends."""

import asyncio
import contextlib
import signal
import socket
import ssl
from collections.abc import Callable, Iterator

import uvicorn

from adytum.inference.core.lifecycle import StepFailed
from adytum.inference.gateway.edge.connections import Guard

_KEEP_ALIVE_S = 75
"""Longer than most clients and balancers keep an idle connection, so that no request arrives on a closing one."""
_CUT_S = 5
"""For sending sealed errors to the answers that were cut at the end of the drain."""


class GatewayServer(uvicorn.Server):
    """uvicorn that does not end the process itself: engines must be stopped after a signal.

    The first SIGTERM or SIGINT drains: no new request is accepted, and answers in progress have `drain_seconds` before
    `cut` ends them. A second signal does not wait.
    """

    def __init__(
        self,
        app: object,
        context: ssl.SSLContext | None,
        *,
        guard: Guard,
        drain_seconds: float,
        draining: Callable[[], None],
        cut: Callable[[], None],
    ) -> None:
        super().__init__(
            uvicorn.Config(
                app,  # type: ignore[arg-type]
                loop="uvloop",
                http=guard.protocol(),
                ws="none",
                lifespan="off",
                access_log=False,
                log_config=None,
                server_header=False,
                proxy_headers=False,
                timeout_graceful_shutdown=round(drain_seconds + _CUT_S),
                timeout_keep_alive=_KEEP_ALIVE_S,
            )
        )
        self._context = context
        self._drain_seconds = drain_seconds
        self._draining = draining
        self._cut = cut

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        self.config.load()
        # uvicorn would want a path, and a key that exists in memory only has none.
        self.config.ssl = self._context
        await super().serve(sockets)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self.drain)
        yield

    def drain(self) -> None:
        """What a signal does."""
        if self.should_exit:
            self.force_exit = True
            self._cut()
            return
        self.should_exit = True
        self._draining()
        asyncio.get_running_loop().call_later(self._drain_seconds, self._cut)


def listen(host: str, port: int) -> socket.socket:
    """The listening socket. Raises `StepFailed`."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise StepFailed(
            f"cannot listen on {host} port {port} ({error.strerror}): choose another server.port"
        ) from error
