"""The hot path: a sealed request in, an engine's answer sealed as it comes. Plain ASGI, nothing in between.

Per streamed chunk: one padding, one seal, one write. What the engine made while the last write was under
way leaves together.
"""

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Coroutine
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from typing import Any

from starlette.types import Message, Receive, Scope, Send

from adytum.inference.channel.bhttp import field
from adytum.inference.channel.errors import ChannelError, MessageTooLarge
from adytum.inference.channel.exchange import Closing, Exchange, OuterHead
from adytum.inference.channel.limits import DEFAULT_LIMITS
from adytum.inference.channel.openings import EhbpOpening, OhttpOpening
from adytum.inference.gateway import failures
from adytum.inference.gateway.accounting.ledger import Account, Ledger
from adytum.inference.gateway.accounting.telemetry import Telemetry
from adytum.inference.gateway.accounting.usage import Usage, of_whole
from adytum.inference.gateway.admission.admission import Admission, EngineCall
from adytum.inference.gateway.admission.load import Load
from adytum.inference.gateway.exchange.advance import advance
from adytum.inference.gateway.exchange.engines import EngineAnswer, EngineCut, Engines, EngineUnavailable, Sink
from adytum.inference.gateway.exchange.notary import Notary
from adytum.inference.gateway.exchange.shaping import Paced, stream
from adytum.inference.gateway.failures import Refusal, Refused
from adytum.inference.gateway.keys import DateNeeded, KeyRing, Replayed, ReplayMemoryFull

_log = logging.getLogger("adytum.gateway")
_JSON = ((b"content-type", b"application/json"),)
_EVENT_STREAM = b"text/event-stream"
FIRST = 18 * 1024
"""Bytes of a request that are opened before its header is looked at: a chunk as the client library makes it, and an
enc."""

Opening = OhttpOpening | EhbpOpening


class _ClientGone(Exception):
    """The client left before its request was complete."""


class _TooMuch(Exception):
    """All that is arriving would take more memory than there is for it."""


class SealedService:
    """Opens sealed requests, asks the engines, seals the answers."""

    def __init__(
        self,
        keys: KeyRing,
        admission: Admission,
        engines: Engines,
        notary: Notary,
        ledger: Ledger,
        *,
        max_requests: int,
        request_seconds: float,
        max_upload: int,
        load: Load,
        telemetry: Telemetry | None = None,
    ) -> None:
        self._keys = keys
        self._admission = admission
        self._engines = engines
        self._notary = notary
        self._ledger = ledger
        self._max_requests = max_requests
        self._request_seconds = request_seconds
        self._max_upload = max_upload
        self._load = load
        self._telemetry = telemetry
        self._uploaded = 0
        self.in_progress = 0

    async def handle(self, scope: Scope, receive: Receive, send: Send, make_opening: Callable[[], Opening]) -> None:
        """Answers one request: sealed, or with a problem document where it could not be opened."""
        if self.in_progress >= self._max_requests:
            await failures.BUSY.response()(scope, receive, send)
            return
        self.in_progress += 1
        try:
            await self._handle(scope, receive, send, make_opening)
        finally:
            self.in_progress -= 1

    async def _handle(self, scope: Scope, receive: Receive, send: Send, make_opening: Callable[[], Opening]) -> None:
        is_ehbp = False
        try:
            opening = make_opening()
            is_ehbp = isinstance(opening, EhbpOpening)
            async with asyncio.timeout(self._request_seconds):
                refused = await self._receive(receive, opening)
            exchange = opening.open() if refused is None else opening.abandon()
            refused = self._spend(exchange) or refused
        except (ChannelError, Replayed, TimeoutError) as error:
            problem = failures.of_channel(error, is_ehbp=is_ehbp)
            if self._telemetry is not None:
                self._telemetry.unopened(problem.status)
            await problem.response()(scope, receive, send)
            return
        except _ClientGone:
            return
        except _TooMuch:
            await failures.BUSY.response()(scope, receive, send)
            return
        except Exception as error:
            # Not one of the channel's: a fault of ours. The answer is as fixed as the others, the log has a name only.
            _log.error("opening failed: %(kind)s", {"kind": type(error).__name__})
            await failures.FAULT.response()(scope, receive, send)
            return
        if exchange.cells is not None:
            send = Paced(send, exchange.cells)
        try:
            await _while_there(receive, self._answer(exchange, refused, send))
        except Exception as error:
            _log.error("refusing failed: %(kind)s", {"kind": type(error).__name__})

    async def _receive(self, receive: Receive, opening: Opening) -> Refusal | None:
        """The whole request. What all that are arriving hold together is bounded: each alone may be large and slow.

        Gives a refusal where the header, which is readable before the rest, has no valid API key: the rest is then
        taken from the network, so that its sender gets to read the answer, and not opened.
        """
        held = arrived = 0
        refused: Refusal | None = None
        try:
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise _ClientGone
                data = message.get("body", b"")
                arrived += len(data)
                if refused is not None:
                    if arrived > DEFAULT_LIMITS.message:
                        raise MessageTooLarge("the request is too long")
                elif data:
                    if self._uploaded + len(data) > self._max_upload:
                        raise _TooMuch
                    self._uploaded += len(data)
                    held += len(data)
                    refused = self._feed(opening, data)
                if not message.get("more_body", False):
                    return refused
        finally:
            self._uploaded -= held

    def _feed(self, opening: Opening, data: bytes) -> Refusal | None:
        """Opens what came; gives what to say to who has no valid key, as soon as his header is readable."""
        while data and not opening.looked:
            opening.feed(data[:FIRST])
            data = data[FIRST:]
            if (fields := opening.fields()) is not None:
                try:
                    self._admission.know(fields)
                except Refused as refused:
                    return refused.refusal
        if data:
            opening.feed(data)
        return None

    def _spend(self, exchange: Exchange) -> Refusal | None:
        """What to say, sealed, to a request that cannot be told from a replay. Raises what is said in the clear."""
        try:
            self._keys.spend(exchange.enc, exchange.recipient, lambda: _date(exchange))
        except DateNeeded as needed:
            return failures.date_needed(needed.now)
        except ReplayMemoryFull:
            return failures.TOO_MANY_TO_REMEMBER
        return None

    async def _answer(self, exchange: Exchange, refused: Refusal | None, send: Send) -> None:
        """Everything after the opening; every error from here on is sealed."""
        try:
            if refused is not None:
                raise Refused(refused)
            asked = self._ask(exchange)
            if isinstance(asked, bytes):
                await _whole(send, exchange.answer(200, _JSON, asked, self._notary.closing(exchange, 200)))
                return
            try:
                await self._forward(asked, exchange, send)
            finally:
                if asked.hold is not None:
                    asked.hold.end()
        except Refused as error:
            await self._refuse(exchange, error.refusal, send)
        except Exception as error:
            # The type's name only: a message could quote content. An answer that has begun stays without its
            # authenticated end, so the client takes it as cut.
            _log.error("answering failed: %(kind)s", {"kind": type(error).__name__})
            if exchange.untouched:
                await self._refuse(exchange, failures.INTERNAL, send)

    def _ask(self, exchange: Exchange) -> EngineCall | bytes:
        try:
            request = exchange.request()
        except ChannelError:
            raise Refused(failures.MALFORMED_INNER) from None
        asked = self._admission.admit(request)
        if isinstance(asked, EngineCall) and asked.stream and not exchange.can_stream:
            if asked.hold is not None:
                asked.hold.end()
            raise Refused(failures.STREAM_NEEDS_CHUNKS)
        return asked

    async def _forward(self, call: EngineCall, exchange: Exchange, send: Send) -> None:
        with self._load.holding(call):
            await self._forward_to(call, exchange, send)

    async def _forward_to(self, call: EngineCall, exchange: Exchange, send: Send) -> None:
        account = self._ledger(call)
        try:
            answer = await self._engines.send(call)
        except EngineUnavailable:
            account.void()
            raise Refused(failures.ENGINE_DOWN) from None
        except asyncio.CancelledError:
            account.close()
            raise
        with contextlib.ExitStack() as held:
            held.callback(self._engines.done, call, answer)
            held.callback(account.close)
            if (field(answer.fields, b"content-type") or b"").startswith(_EVENT_STREAM):
                if isinstance(send, Paced):
                    await self._stream_in_cells(call, answer, account, exchange, send, held.close)
                else:
                    await self._stream(call, answer, account, exchange, send)
            else:
                await self._pass_whole(call, answer, account, exchange, send, held.close)

    async def _pass_whole(
        self,
        call: EngineCall,
        answer: EngineAnswer,
        account: Account,
        exchange: Exchange,
        send: Send,
        release: Callable[[], None],
    ) -> None:
        try:
            body = await _read_whole(answer)
        except Refused:
            await account.settle("cut", account.stream.usage)
            raise
        if answer.status == HTTPStatus.BAD_REQUEST:
            body = failures.of_engine(body)
        used = of_whole(body) if answer.status == HTTPStatus.OK else Usage(0, 0, 0)
        if used is None:
            # An answer without its count cannot be charged rightly: the same estimate as for a stream that was cut.
            used = account.stream.usage
        await account.settle("ok" if answer.status == HTTPStatus.OK else "refused", used)
        closing = self._notary.closing(exchange, answer.status, call.model.id, used)
        sealed = exchange.answer(answer.status, answer.fields, body, closing)
        if isinstance(send, Paced):
            # Cells take longer than the engine did, and it is free for another request.
            release()
        await _whole(send, sealed)

    async def _stream(
        self, call: EngineCall, answer: EngineAnswer, account: Account, exchange: Exchange, send: Send
    ) -> None:
        head, sealed = exchange.begin(answer.status, answer.fields)
        await _start(send, head)
        if sealed:
            await send({"type": "http.response.body", "body": sealed, "more_body": True})
        passed = account.stream.feed

        def write(data: bytes) -> Awaitable[None] | None:
            sealed = exchange.data(passed(data))
            if not sealed:
                return None
            return advance(send({"type": "http.response.body", "body": sealed, "more_body": True}))

        last, closing = await self._pour(call, answer, account, exchange, write)
        await send({"type": "http.response.body", "body": last + exchange.end(closing), "more_body": False})

    async def _stream_in_cells(
        self,
        call: EngineCall,
        answer: EngineAnswer,
        account: Account,
        exchange: Exchange,
        send: Paced,
        release: Callable[[], None],
    ) -> None:
        head, _ = exchange.begin(answer.status, answer.fields)
        passed = account.stream.feed

        async def pour(keep: Sink) -> Closing:
            _, closing = await self._pour(call, answer, account, exchange, lambda data: keep(passed(data)))
            release()
            return closing

        await stream(send, head, exchange, pour)

    async def _pour(
        self, call: EngineCall, answer: EngineAnswer, account: Account, exchange: Exchange, sink: Sink
    ) -> tuple[bytes, Closing]:
        """All of an engine's stream: what is left to write, and the answer's closing."""
        try:
            await answer.pour(sink)
        except EngineCut:
            # The client learns of it as an authenticated last event, not as a cut that the network could have made.
            last = exchange.data(failures.ENGINE_CUT.event())
            await account.settle("cut", account.stream.usage)
        else:
            last = exchange.data(account.stream.finish())
            await account.settle("ok", account.stream.usage)
        return last, self._notary.closing(exchange, answer.status, call.model.id, account.stream.usage)

    async def _refuse(self, exchange: Exchange, refusal: Refusal, send: Send) -> None:
        if self._telemetry is not None:
            self._telemetry.refused(refusal.code)
        # No receipt for who has no key: it would cost more than his asking.
        closing = None if refusal is failures.BAD_KEY else self._notary.closing(exchange, refusal.status)
        await _whole(send, exchange.answer(refusal.status, refusal.fields(), refusal.body(), closing))


def _date(exchange: Exchange) -> float | None:
    """What the inner `Date` says, Unix seconds (RFC 9110, 5.6.7)."""
    try:
        said = field(exchange.request().fields, b"date")
        return parsedate_to_datetime(said.decode("ascii")).timestamp() if said is not None else None
    except (ChannelError, ValueError, TypeError, OverflowError):
        return None


async def _while_there(receive: Receive, answer: Coroutine[Any, Any, None]) -> None:
    """Runs `answer`. A client that goes away ends it, and with it the generation, at once."""
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
        # Not the client's going only, but the server's end, too: that one goes on.
        if not gone or mine.uncancel():
            raise
    finally:
        leaving.cancel()


async def _read_whole(answer: EngineAnswer) -> bytes:
    body = bytearray()
    try:
        while data := await answer.read():
            body += data
            if len(body) > DEFAULT_LIMITS.message:
                raise Refused(failures.ENGINE_TOO_LARGE)
    except EngineCut:
        raise Refused(failures.ENGINE_CUT) from None
    return bytes(body)


async def _whole(send: Send, answer: tuple[OuterHead, bytes]) -> None:
    head, data = answer
    await _start(send, head, (b"content-length", b"%d" % len(data)))
    await send({"type": "http.response.body", "body": data, "more_body": False})


async def _start(send: Send, head: OuterHead, *more: tuple[bytes, bytes]) -> None:
    message: Message = {"type": "http.response.start", "status": head.status, "headers": [*head.headers, *more]}
    await send(message)
