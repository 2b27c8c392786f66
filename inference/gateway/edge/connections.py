"""The outer connections: how many there may be, and how much time and memory each may take before it is cut.

This is uvicorn's protocol on `httptools`, plus the limits that uvicorn leaves to a proxy in front of it. One sweep a
second checks all connections, which costs less than a timer for each.
"""

import asyncio
import select
from typing import Any, cast

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from adytum.inference.gateway.limits import LIMITS, GatewayLimits

_SWEEP_S = 1.0
_AFTERWARDS_S = 3.0


class Guard:
    """The state that all connections of one server share. `connections`: how many may be open. `body_seconds`: for a
    body to arrive."""

    def __init__(self, connections: int, body_seconds: float, limits: GatewayLimits = LIMITS) -> None:
        self.connections = connections
        # The request is answered 408 first; a connection that goes on sending is cut.
        self.body_seconds = body_seconds + _AFTERWARDS_S
        self.limits = limits
        self.open: set[GuardedProtocol] = set()
        self.cut = 0
        """Connections that were cut for exceeding a limit."""
        self._sweeping: asyncio.TimerHandle | None = None

    def protocol(self) -> type["GuardedProtocol"]:
        """The protocol class for uvicorn, which makes the objects itself."""
        return cast(type[GuardedProtocol], type("GuardedProtocol", (GuardedProtocol,), {"guard": self}))

    def enter(self, connection: "GuardedProtocol") -> bool:
        """Counts a connection in. Returns whether there was room for it."""
        if len(self.open) >= self.connections:
            return False
        self.open.add(connection)
        if self._sweeping is None:
            self._sweeping = connection.loop.call_later(_SWEEP_S, self._sweep)
        return True

    def _sweep(self) -> None:
        self._sweeping = None
        for connection in tuple(self.open):
            if connection.overdue(connection.loop.time()):
                self.cut += 1
                connection.transport.abort()
            elif connection.left():
                connection.transport.abort()
        if self.open:
            loop = next(iter(self.open)).loop
            self._sweeping = loop.call_later(_SWEEP_S, self._sweep)


class GuardedProtocol(HttpToolsProtocol):
    """One connection."""

    guard: Guard

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._head_since: float | None = None
        self._body_since: float | None = None
        self._stalled_since: float | None = None
        self._head_size = 0
        self._lines_size = 0
        self._earlier: list[RequestResponseCycle] = []
        """Unanswered requests before the newest one (`cycle`): the first is being answered, the others wait."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        if not self.guard.enter(self):
            # Without an answer: writing one would cost the resources that are short.
            transport.abort()
            return
        self._head_since = self.loop.time()
        super().connection_made(transport)

    def connection_lost(self, error: Exception | None) -> None:
        if self in self.guard.open:
            self.guard.open.discard(self)
            # uvicorn tells only the newest request that the client left. With others waiting, that is not the one being
            # answered, and its engine would work on.
            for cycle in self._earlier:
                if not cycle.response_complete:
                    cycle.disconnected = True
                    cycle.message_event.set()
            super().connection_lost(error)

    def data_received(self, data: bytes) -> None:
        if self.transport is None or self.transport.is_closing():
            return
        if self._body_since is None:
            if self._head_since is None:
                self._head_since = self.loop.time()
            self._head_size += len(data)
        super().data_received(data)
        limits = self.guard.limits
        # The parser reports a line once it is complete, so a line without an end is counted here.
        if (self._head_since is not None and self._head_size > limits.head) or len(self.pipeline) > limits.pipelined:
            self._cut()

    def on_header(self, name: bytes, value: bytes) -> None:
        super().on_header(name, value)
        limits = self.guard.limits
        self._lines_size += len(name) + len(value)
        if len(self.headers) > limits.head_lines or self._lines_size > limits.head:
            self._cut()

    def on_headers_complete(self) -> None:
        self._head_since = None
        self._head_size = self._lines_size = 0
        self._body_since = self.loop.time()
        if not self.transport.is_closing():
            known = (*self._earlier, self.cycle)
            self._earlier = [cycle for cycle in known if cycle is not None and not cycle.response_complete]
            super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        if not self.transport.is_closing():
            super().on_body(body)

    def on_message_complete(self) -> None:
        self._body_since = None
        if not self.transport.is_closing():
            super().on_message_complete()

    def pause_writing(self) -> None:
        self._stalled_since = self.loop.time()
        super().pause_writing()

    def resume_writing(self) -> None:
        self._stalled_since = None
        super().resume_writing()

    def overdue(self, now: float) -> bool:
        """Whether this connection has exceeded one of its times."""
        limits = self.guard.limits
        return (
            (self._head_since is not None and now - self._head_since > limits.head_seconds)
            or (self._body_since is not None and now - self._body_since > self.guard.body_seconds)
            or (self._stalled_since is not None and now - self._stalled_since > limits.write_seconds)
        )

    def left(self) -> bool:
        """Whether the client closed a connection that is not being read. uvicorn stops reading while a request or a
        large body waits, and an event loop that does not read does not notice the end."""
        if self.transport.is_closing() or not self.flow.read_paused:
            return False
        poll = select.poll()
        poll.register(self.transport.get_extra_info("socket").fileno(), select.POLLRDHUP)
        return bool(poll.poll(0))

    def _cut(self) -> None:
        self.guard.cut += 1
        self.transport.abort()
