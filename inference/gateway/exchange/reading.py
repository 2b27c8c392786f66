"""The client's side of a request: taking its bytes, opening them as they come, and noticing that the client left."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from starlette.types import Receive

from adytum.inference.channel.bhttp import Fields
from adytum.inference.channel.errors import MessageTooLarge
from adytum.inference.channel.limits import DEFAULT_LIMITS
from adytum.inference.channel.openings import EhbpOpening, OhttpOpening
from adytum.inference.gateway.failures import Refusal, Refused

FIRST = 18 * 1024
"""Bytes of a request that are opened before its header is looked at: a chunk as the client library makes it, and an
encapsulated key."""

Opening = OhttpOpening | EhbpOpening


class ClientGone(Exception):
    """The client left before its request was complete."""


class TooMuchArriving(Exception):
    """The requests that are arriving would together take more memory than they may."""


class Arrivals:
    """The requests that are arriving. Together they hold at most `limit` bytes: each alone may be large and slow.

    `know` raises `Refused` for a header without a valid API key.
    """

    def __init__(self, limit: int, know: Callable[[Fields], None]) -> None:
        self._limit = limit
        self._know = know
        self.held = 0
        """Bytes of all requests that are arriving."""

    async def take(self, receive: Receive, opening: Opening) -> Refusal | None:
        """Feeds the whole request to `opening`.

        Returns a refusal if the header, which is readable before the rest, has no valid API key. The rest is then taken
        from the network, so that its sender gets to read the answer, but it is neither kept nor opened.

        Raises `ClientGone`, `TooMuchArriving` and `ChannelError`.
        """
        held = arrived = 0
        refused: Refusal | None = None
        try:
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientGone
                data = message.get("body", b"")
                arrived += len(data)
                if refused is not None:
                    if arrived > DEFAULT_LIMITS.message:
                        raise MessageTooLarge("the request is too long")
                elif data:
                    if self.held + len(data) > self._limit:
                        raise TooMuchArriving
                    self.held += len(data)
                    held += len(data)
                    refused = self._feed(opening, data, held - len(data))
                if not message.get("more_body", False):
                    return refused
        finally:
            self.held -= held

    def _feed(self, opening: Opening, data: bytes, fed: int) -> Refusal | None:
        """Opens what came. Returns a refusal as soon as the header is readable and has no valid API key.

        `fed`: bytes of the request that were fed before. What is opened before the look depends on the request's bytes
        alone, not on how the network divided them.
        """
        while data and not opening.looked:
            end = FIRST - fed % FIRST
            opening.feed(data[:end])
            fed, data = fed + len(data[:end]), data[end:]
            if (fields := opening.fields()) is not None:
                try:
                    self._know(fields)
                except Refused as refused:
                    return refused.refusal
        if data:
            opening.feed(data)
        return None


async def while_there(receive: Receive, answer: Coroutine[Any, Any, None]) -> None:
    """Runs `answer`. It is cancelled, and with it the generation, as soon as the client leaves."""
    mine = asyncio.current_task()
    assert mine is not None
    gone = False

    async def leave() -> None:
        nonlocal gone
        while (await receive())["type"] != "http.disconnect":
            pass
        gone = True
        mine.cancel()

    leaving = asyncio.ensure_future(leave())
    try:
        await answer
    except asyncio.CancelledError:
        # The server's end cancels this task, too, and that cancellation goes on.
        if not gone or mine.uncancel():
            raise
    finally:
        leaving.cancel()
