"""The engines as the gateway sees them: HTTP/1.1, over one Unix socket each.

This client is our own because it is on the hot path: a general one costs a third more per streamed chunk and more than
twice as much per request (benchmarks/NOTES.md). llhttp does the parsing, through `httptools`, which the outer side uses
too.
"""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import cast

import httptools

from adytum.inference.channel.bhttp import Fields
from adytum.inference.gateway.admission.admission import EngineCall

# The allow-list of an answer's header fields: no other field of an engine is passed on.
_PASSED = (b"content-type", b"retry-after")
_HEAD_LIMIT = 65_536
# With so many unread bytes of one answer its engine request has to wait: a slow client slows no other request.
_HIGH_WATER = 256 * 1024
_LOW_WATER = 64 * 1024
_IDLE_CONNECTIONS = 64
_CONNECT_SECONDS = 2.0


Sink = Callable[[bytes], Awaitable[None] | None]
"""Takes a piece of an answer at once. Returns an awaitable if it cannot take the next piece before that is done."""


class EngineUnavailable(Exception):
    """The engine did not take the request, or closed the connection before its answer began."""


class EngineCut(Exception):
    """The engine closed the connection, or violated HTTP, before its answer was complete."""


class EngineAnswer(asyncio.Protocol):
    """One connection to an engine and the answer arriving on it. One request at a time."""

    def __init__(self, on_idle_lost: "Callable[[EngineAnswer], None]") -> None:
        self._on_idle_lost = on_idle_lost
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._idle = True
        self.used = 0
        self._reset()

    def _reset(self) -> None:
        self._parser = httptools.HttpResponseParser(self)
        self._pieces: list[bytes] = []
        self._waiting: asyncio.Future[None] | None = None
        self._sink: Sink | None = None
        self._sink_busy: Awaitable[None] | None = None
        self._sink_error: Exception | None = None
        self._head_size = 0
        self._unread = 0
        self._paused = False
        self._head_done = False
        self._complete = False
        self._kept_alive = False
        self._lost = False
        self.status = 0
        self.fields: Fields = ()

    def __repr__(self) -> str:
        return f"EngineAnswer(status={self.status})"

    # What the gateway calls.

    async def ask(self, call: EngineCall) -> None:
        """Sends the request and waits for the answer's head. Raises `EngineUnavailable`."""
        self._reset()
        self._idle = False
        self.used += 1
        if self._transport is None or self._transport.is_closing():
            raise EngineUnavailable
        head = f"POST {call.path} HTTP/1.1\r\nHost: engine\r\nContent-Type: application/json\r\n"
        self._transport.write(head.encode() + b"Content-Length: %d\r\n\r\n" % len(call.body) + call.body)
        while not self._head_done:
            if self._lost:
                raise EngineUnavailable
            await self._wait()

    async def read(self) -> bytes:
        """All bytes since the last call; waits if there are none. Empty at the end. Raises `EngineCut`."""
        while not self._pieces:
            if self._complete:
                return b""
            if self._lost:
                raise EngineCut
            await self._wait()
        return self._take()

    async def pour(self, sink: Sink) -> None:
        """Passes the whole answer to `sink` as it arrives. Raises `EngineCut`, and what `sink` raises.

        `sink` is called from `data_received`: waking this task for each piece would cost as much as sealing and writing
        it.
        """
        while True:
            while self._pieces:
                busy = sink(self._take())
                if busy is not None:
                    await busy
            if self._complete:
                return
            if self._lost:
                raise EngineCut
            self._sink = sink
            try:
                await self._wait()
            finally:
                self._sink = None
            if self._sink_error is not None:
                raise self._sink_error
            busy, self._sink_busy = self._sink_busy, None
            if busy is not None:
                await busy

    def _take(self) -> bytes:
        pieces, self._pieces = self._pieces, []
        self._unread = 0
        if self._paused and self._transport is not None:
            self._paused = False
            self._transport.resume_reading()
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    @property
    def reusable(self) -> bool:
        """Whether the connection can carry another request."""
        return (
            self._complete
            and not self._pieces
            and not self._lost
            and self._transport is not None
            and not self._transport.is_closing()
            and self._kept_alive
        )

    def rest(self) -> None:
        """Marks the connection as back in its pool."""
        self._idle = True

    def abort(self) -> None:
        """Closes the connection at once, which aborts the generation."""
        self._lost = True
        if self._transport is not None:
            self._transport.abort()
        self._wake()

    async def _wait(self) -> None:
        self._waiting = self._loop.create_future()
        await self._waiting

    def _wake(self) -> None:
        waiting, self._waiting = self._waiting, None
        if waiting is not None and not waiting.done():
            waiting.set_result(None)

    # What the event loop calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        if self._idle or self._lost:
            self.abort()  # Bytes that no request asked for.
            return
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            self.abort()
        if self._sink is not None and self._pieces and not self._complete:
            try:
                self._sink_busy = self._sink(self._take())
            except Exception as error:
                self._sink_error = error
            if self._sink_busy is None and self._sink_error is None and not self._lost:
                return
            self._sink = None
        if self._unread > _HIGH_WATER and not self._paused and self._transport is not None:
            self._paused = True
            self._transport.pause_reading()
        self._wake()

    def connection_lost(self, error: Exception | None) -> None:
        self._lost = True
        if self._idle:
            self._on_idle_lost(self)
        self._wake()

    # What the parser calls, from within data_received.

    def on_header(self, name: bytes, value: bytes) -> None:
        self._head_size += len(name) + len(value)
        if self._head_size > _HEAD_LIMIT:
            self.abort()
        name = name.lower()
        if name in _PASSED and not self._head_done:
            self.fields += ((name, value),)

    def on_headers_complete(self) -> None:
        self.status = self._parser.get_status_code()
        self._head_done = True

    def on_body(self, body: bytes) -> None:
        self._pieces.append(body)
        self._unread += len(body)

    def on_message_complete(self) -> None:
        self._complete = True
        # Asked here: afterwards the parser has moved on to the next message and always returns false.
        self._kept_alive = self._parser.should_keep_alive()


class Engines:
    """Connections by model. `sockets`: path by model id. A model takes requests between `open` and `shut`."""

    def __init__(self, sockets: dict[str, Path]) -> None:
        self._sockets = sockets
        self._open: set[str] = set()
        self._idle: dict[str, list[EngineAnswer]] = {name: [] for name in sockets}
        self._busy: dict[str, set[EngineAnswer]] = {name: set() for name in sockets}

    def open(self, name: str) -> None:
        """Lets requests through to the model's engine."""
        self._open.add(name)

    def shut(self, name: str) -> None:
        """Lets no more requests through to the model's engine, and cuts those in progress. Their clients are told."""
        self._open.discard(name)
        for answer in (*self._busy[name], *self._idle[name]):
            answer.abort()
        self._idle[name].clear()

    def in_progress(self, name: str) -> int:
        """The number of requests that the model's engine has."""
        return len(self._busy[name])

    async def send(self, call: EngineCall) -> EngineAnswer:
        """The engine's answer, once its head has arrived. Pass it to `done` afterwards. Raises `EngineUnavailable`."""
        name = call.model.id
        while name in self._open:
            is_new = not self._idle[name]
            answer = await self._connect(name) if is_new else self._idle[name].pop()
            try:
                await self._ask(name, answer, call)
            except EngineUnavailable:
                if is_new:
                    raise
                # The engine had closed this idle connection and took nothing of the request.
                continue
            return answer
        raise EngineUnavailable

    async def _ask(self, name: str, answer: EngineAnswer, call: EngineCall) -> None:
        self._busy[name].add(answer)
        try:
            await answer.ask(call)
        except BaseException:
            self._busy[name].discard(answer)
            answer.abort()
            raise

    async def _connect(self, name: str) -> EngineAnswer:
        idle = self._idle[name]

        def forget(answer: EngineAnswer) -> None:
            if answer in idle:
                idle.remove(answer)

        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(_CONNECT_SECONDS):
                _, answer = await loop.create_unix_connection(lambda: EngineAnswer(forget), str(self._sockets[name]))
        except (OSError, TimeoutError) as error:
            raise EngineUnavailable from error
        return answer

    def done(self, call: EngineCall, answer: EngineAnswer) -> None:
        """Takes an answer's connection back, or closes it if the answer was not read to its end."""
        self._busy[call.model.id].discard(answer)
        idle = self._idle[call.model.id]
        if answer.reusable and len(idle) < _IDLE_CONNECTIONS:
            answer.rest()
            idle.append(answer)
        else:
            answer.abort()

    def close(self) -> None:
        """Closes all idle connections."""
        for idle in self._idle.values():
            for answer in idle:
                answer.abort()
            idle.clear()
