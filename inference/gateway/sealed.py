"""The hot path: a sealed request in, an engine's answer sealed as it comes.

Per streamed chunk: one wake-up, one padding, one seal, one write. What the engine made while the last write was under
way leaves together.
"""

import asyncio
import logging
from collections.abc import Callable
from typing import Any

import aiohttp
from fastapi import Request, Response
from starlette.types import Receive, Scope, Send

from inference.channel.errors import ChannelError
from inference.channel.exchange import EhbpOpening, Exchange, OhttpOpening, OuterHead
from inference.channel.limits import DEFAULT_LIMITS
from inference.gateway import failures
from inference.gateway.admission import Admission, EngineCall
from inference.gateway.engines import Engines, EngineUnavailable, passed_fields
from inference.gateway.failures import Refusal, Refused
from inference.keys import KeyRing, Replayed

_log = logging.getLogger("cloister.gateway")
_JSON = ((b"content-type", b"application/json"),)

Opening = OhttpOpening | EhbpOpening


class SealedService:
    """Opens sealed requests, asks the engines, seals the answers."""

    def __init__(
        self, keys: KeyRing, admission: Admission, engines: Engines, *, max_requests: int, request_seconds: float
    ) -> None:
        self._keys = keys
        self._admission = admission
        self._engines = engines
        self._max_requests = max_requests
        self._request_seconds = request_seconds
        self.in_progress = 0

    async def handle(self, request: Request, make_opening: Callable[[], Opening]) -> Response:
        """The response to `request`: sealed, or a problem document where it could not be opened."""
        is_ehbp = False
        if self.in_progress >= self._max_requests:
            return failures.BUSY.response()
        self.in_progress += 1
        try:
            opening = make_opening()
            is_ehbp = isinstance(opening, EhbpOpening)
            async with asyncio.timeout(self._request_seconds):
                async for data in request.stream():
                    opening.feed(data)
            exchange = opening.open()
            self._keys.spend(exchange.enc)
        except (ChannelError, Replayed, TimeoutError) as error:
            return failures.of_channel(error, is_ehbp=is_ehbp).response()
        finally:
            self.in_progress -= 1
        return _SealedResponse(self, exchange)

    async def answer(self, exchange: Exchange, send: Send) -> None:
        """Everything after the opening; every error from here on is sealed."""
        try:
            asked = self._ask(exchange)
            if isinstance(asked, bytes):
                await _whole(send, exchange.answer(200, _JSON, asked))
                return
            await self._forward(asked, exchange, send)
        except Refused as refused:
            await _refuse(exchange, refused.refusal, send)

    def _ask(self, exchange: Exchange) -> EngineCall | bytes:
        try:
            request = exchange.request()
        except ChannelError:
            raise Refused(failures.MALFORMED_INNER) from None
        asked = self._admission.admit(request)
        if isinstance(asked, EngineCall) and asked.stream and not exchange.can_stream:
            raise Refused(failures.STREAM_NEEDS_CHUNKS)
        return asked

    async def _forward(self, call: EngineCall, exchange: Exchange, send: Send) -> None:
        try:
            answer = await self._engines.send(call)
        except EngineUnavailable:
            raise Refused(failures.ENGINE_DOWN) from None
        # close(), not release(): a connection that still has an answer on it must go, which aborts the generation.
        try:
            if answer.content_type == "text/event-stream":
                await _stream(answer, exchange, send)
            else:
                body = await _read_whole(answer)
                await _whole(send, exchange.answer(answer.status, passed_fields(answer), body))
        finally:
            if answer.content.at_eof():
                answer.release()
            else:
                answer.close()


async def _stream(answer: aiohttp.ClientResponse, exchange: Exchange, send: Send) -> None:
    head, first = exchange.begin(answer.status, passed_fields(answer))
    await _start(send, head)
    if first:
        await _body(send, first)
    content = answer.content
    last = b""
    try:
        while data := await content.readany():
            sealed = exchange.data(data)
            if sealed:
                await _body(send, sealed)
    except (aiohttp.ClientError, OSError):
        # The client learns of it as an authenticated last event, not as a cut that the network could have made.
        last = exchange.data(failures.ENGINE_CUT.event())
    await _body(send, last + exchange.end(), more=False)


async def _read_whole(answer: aiohttp.ClientResponse) -> bytes:
    body = bytearray()
    try:
        while data := await answer.content.readany():
            body += data
            if len(body) > DEFAULT_LIMITS.message:
                raise Refused(failures.ENGINE_TOO_LARGE)
    except (aiohttp.ClientError, OSError):
        raise Refused(failures.ENGINE_CUT) from None
    return bytes(body)


async def _refuse(exchange: Exchange, refusal: Refusal, send: Send) -> None:
    await _whole(send, exchange.answer(refusal.status, _JSON, refusal.body()))


class _SealedResponse(Response):
    """A response that ends when the answer does, or at once when the client goes away."""

    def __init__(self, service: SealedService, exchange: Exchange) -> None:
        # Not the base's: status and headers are known only when the engine has answered.
        self.background = None
        self._service = service
        self._exchange = exchange

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._service.in_progress += 1
        answering = asyncio.ensure_future(self._answer(send))
        leaving = asyncio.ensure_future(_disconnect(receive))
        try:
            await asyncio.wait((answering, leaving), return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._service.in_progress -= 1
            for task in (answering, leaving):
                task.cancel()
            # Cancelling closes the engine's connection, which aborts the generation.
            await asyncio.gather(answering, leaving, return_exceptions=True)

    async def _answer(self, send: Send) -> None:
        started = False

        async def watched(message: Any) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self._service.answer(self._exchange, watched)
        except Exception as error:
            # The type's name only: a message could quote content. An answer that has begun stays without its
            # authenticated end, so the client takes it as cut.
            _log.error("answering failed: %s", type(error).__name__)
            if not started:
                await _refuse(self._exchange, failures.INTERNAL, send)


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _start(send: Send, head: OuterHead, length: int | None = None) -> None:
    headers = list(head.headers)
    if length is not None:
        headers.append((b"content-length", str(length).encode()))
    await send({"type": "http.response.start", "status": head.status, "headers": headers})


async def _body(send: Send, data: bytes, *, more: bool = True) -> None:
    await send({"type": "http.response.body", "body": data, "more_body": more})


async def _whole(send: Send, answer: tuple[OuterHead, bytes]) -> None:
    head, data = answer
    await _start(send, head, len(data))
    await _body(send, data, more=False)
