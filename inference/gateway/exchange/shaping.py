"""When cells leave: one at each tick of a grid that begins with the request and does not depend on the answer.

1. The outer head and the first cell wait for the first free slot: 4, 8, 16, ... ticks after the request was opened.
2. From there on one cell leaves at each tick. A tick that is missed, because the client reads slowly or the machine is
   busy, is skipped and not made up for.
3. After the answer's end ticks go on until the last of its cells (`inference/channel/shaping.py`) has left.

So the network sees an answer's slot and its number of cells, and nothing else of it. Whole answers and errors leave in
the same way as streams.
"""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress

from starlette.types import Send

from adytum.inference.channel.exchange import Exchange, OuterHead
from adytum.inference.channel.shaping import Cells
from adytum.inference.gateway.exchange.writing import Pour

FIRST_SLOT_TICKS = 4
"""Ticks from the opened request to the first slot; every later one is twice as late."""
# Bytes of events that wait for cells; beyond it the engine is made to wait.
_HIGH_WATER = 64 * 1024


class Paced:
    """Writes one answer whose body is made of whole cells: they leave on the grid. A `writing.Writing`."""

    def __init__(self, send: Send, cells: Cells) -> None:
        self._send = send
        self._cells = cells
        self._clock = asyncio.get_running_loop().time
        self._opened_at = self._clock()
        self._due = 0.0

    async def whole(self, answer: tuple[OuterHead, bytes]) -> None:
        head, data = answer
        await self._start(head)
        await self._rest(data)

    async def stream(
        self,
        begun: tuple[OuterHead, bytes],
        exchange: Exchange,
        passed: Callable[[bytes], bytes],
        pour: Pour,
    ) -> None:
        head, _ = begun
        room = asyncio.Event()

        async def wait_for_room() -> None:
            while exchange.waiting > _HIGH_WATER:
                room.clear()
                await room.wait()

        def keep(data: bytes) -> Awaitable[None] | None:
            exchange.data(passed(data))
            return wait_for_room() if exchange.waiting > _HIGH_WATER else None

        pouring = asyncio.ensure_future(pour(keep))
        try:
            await self._start(head)
            await self._tick()
            while not pouring.done():
                await self._cell(exchange.cell(), True)
                room.set()
                await self._tick()
            last, closing = pouring.result()
            await self._rest(last + exchange.end(closing))
        finally:
            pouring.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await pouring

    async def _start(self, head: OuterHead) -> None:
        """Writes the outer head at the first free slot, without a length, as a stream has none."""
        slot = FIRST_SLOT_TICKS * self._cells.cadence_s
        while self._opened_at + slot < self._clock():
            slot *= 2
        self._due = self._opened_at + slot
        await self._tick()
        await self._send({"type": "http.response.start", "status": head.status, "headers": list(head.headers)})

    async def _rest(self, data: bytes) -> None:
        """Writes all cells to the answer's end."""
        size = self._cells.size
        for at in range(0, len(data), size):
            await self._tick()
            await self._cell(data[at : at + size], at + size < len(data))

    async def _tick(self) -> None:
        """Waits for the tick that is due, or for the next one if it was missed."""
        cadence = self._cells.cadence_s
        late = self._clock() - self._due
        if late > cadence:
            self._due += (late // cadence + 1) * cadence
        if (early := self._due - self._clock()) > 0:
            await asyncio.sleep(early)

    async def _cell(self, data: bytes, more: bool) -> None:
        """Writes the cell of the tick that is due."""
        self._due += self._cells.cadence_s
        await self._send({"type": "http.response.body", "body": data, "more_body": more})
