"""How an answer leaves: `Plain`, at once, or on a grid of ticks (`shaping.Paced`)."""

from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Protocol

from starlette.types import Send

from adytum.inference.channel.exchange import Closing, Exchange, OuterHead
from adytum.inference.gateway.exchange.advance import advance
from adytum.inference.gateway.exchange.engines import Sink

Pour = Callable[[Sink], Coroutine[Any, Any, tuple[bytes, Closing]]]
"""Brings an engine's whole stream to a sink. Returns what is sealed and still to be written, and the closing."""


class Writing(Protocol):
    """Writes one answer, whole or as a stream."""

    async def whole(self, answer: tuple[OuterHead, bytes]) -> None:
        """Writes a sealed answer."""

    async def stream(
        self, begun: tuple[OuterHead, bytes], exchange: Exchange, passed: Callable[[bytes], bytes], pour: Pour
    ) -> None:
        """Seals and writes what `pour` brings. `begun`: what `exchange.begin` returned; `passed` returns what of the
        engine's bytes the client gets."""


class Plain:
    """Writes at once: per chunk one padding, one seal, one write. What the engine made while the last write was under
    way leaves together."""

    def __init__(self, send: Send) -> None:
        self._send = send

    async def whole(self, answer: tuple[OuterHead, bytes]) -> None:
        head, data = answer
        await self._start(head, (b"content-length", b"%d" % len(data)))
        await self._send({"type": "http.response.body", "body": data, "more_body": False})

    async def stream(
        self, begun: tuple[OuterHead, bytes], exchange: Exchange, passed: Callable[[bytes], bytes], pour: Pour
    ) -> None:
        send = self._send
        head, first = begun
        await self._start(head)
        if first:
            await send({"type": "http.response.body", "body": first, "more_body": True})

        def write(data: bytes) -> Awaitable[None] | None:
            sealed = exchange.data(passed(data))
            if not sealed:
                return None
            return advance(send({"type": "http.response.body", "body": sealed, "more_body": True}))

        last, closing = await pour(write)
        await send({"type": "http.response.body", "body": last + exchange.end(closing), "more_body": False})

    async def _start(self, head: OuterHead, *more: tuple[bytes, bytes]) -> None:
        await self._send({"type": "http.response.start", "status": head.status, "headers": [*head.headers, *more]})
