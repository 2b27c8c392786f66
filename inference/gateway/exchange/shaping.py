"""When cells leave: one at each tick of a grid that begins with the request and knows nothing of the answer.

1. The outer head and the first cell wait for the first free slot: 4, 8, 16, ... ticks after the request was opened.
2. From there on one cell leaves at each tick. A tick that is missed, because the client reads slowly or the machine is
   busy, is left out and not made up for.
3. After the answer's end ticks go on until the last of its cells (`inference/channel/shaping.py`) has left.

So the network sees which slot and which number of cells an answer had, and nothing else of it. Whole answers and errors
take the same way as streams.
"""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from typing import Any

from starlette.types import Message, Send

from adytum.inference.channel.exchange import Closing, Exchange, OuterHead
from adytum.inference.channel.shaping import Cells
from adytum.inference.gateway.exchange.engines import Sink

FIRST_SLOT_TICKS = 4
"""Ticks from the opened request to the first slot; every later one is twice as late."""
# Bytes of events that wait for cells, from which on the engine is made to wait.
_HIGH_WATER = 64 * 1024


class Paced:
    """An ASGI `send` for one answer whose body is made of whole cells: they leave on the grid."""

    def __init__(self, send: Send, cells: Cells) -> None:
        self._send = send
        self.cells = cells
        self._clock = asyncio.get_running_loop().time
        self._opened_at = self._clock()
        self._due = 0.0

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            await self._start(message)
            return
        body, more, size = message.get("body", b""), message.get("more_body", False), self.cells.size
        for at in range(0, len(body), size):
            await self.wait()
            await self.cell(body[at : at + size], more or at + size < len(body))

    async def _start(self, message: Message) -> None:
        slot = FIRST_SLOT_TICKS * self.cells.cadence_s
        while self._opened_at + slot < self._clock():
            slot *= 2
        self._due = self._opened_at + slot
        await self.wait()
        # A length would be in the head, and the head of a stream has none.
        headers = [line for line in message["headers"] if line[0] != b"content-length"]
        await self._send({**message, "headers": headers})

    async def wait(self) -> None:
        """Waits for the tick that is due, or for the next one where it was missed."""
        cadence = self.cells.cadence_s
        late = self._clock() - self._due
        if late > cadence:
            self._due += (late // cadence + 1) * cadence
        if (early := self._due - self._clock()) > 0:
            await asyncio.sleep(early)

    async def cell(self, data: bytes, more: bool) -> None:
        """Writes the cell of the tick that is due."""
        self._due += self.cells.cadence_s
        await self._send({"type": "http.response.body", "body": data, "more_body": more})


async def stream(
    send: Paced, head: OuterHead, exchange: Exchange, pour: Callable[[Sink], Coroutine[Any, Any, Closing]]
) -> None:
    """A stream of events in cells. `pour` brings all of it to the sink that it is given, and gives its closing."""
    room = asyncio.Event()

    async def wait_for_room() -> None:
        while exchange.waiting > _HIGH_WATER:
            room.clear()
            await room.wait()

    def write(data: bytes) -> Awaitable[None] | None:
        exchange.data(data)
        return wait_for_room() if exchange.waiting > _HIGH_WATER else None

    pouring = asyncio.ensure_future(pour(write))
    try:
        await send({"type": "http.response.start", "status": head.status, "headers": list(head.headers)})
        await send.wait()
        while not pouring.done():
            await send.cell(exchange.cell(), True)
            room.set()
            await send.wait()
        await send({"type": "http.response.body", "body": exchange.end(pouring.result()), "more_body": False})
    finally:
        pouring.cancel()
        with suppress(asyncio.CancelledError, Exception):
            await pouring
