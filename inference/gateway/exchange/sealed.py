"""The hot path: a sealed request in, an engine's answer sealed as it comes. Plain ASGI, nothing in between.

1. `reading` takes the request's bytes and opens them as they come.
2. The key ring answers each encapsulated key once; admission decides what is asked of which engine.
3. `lease` owns everything that an admitted request holds.
4. The engine's answer is sealed, and `writing` lets it leave: at once, or in cells on a grid (`shaping`).
"""

import asyncio
import logging
from collections.abc import Callable
from email.utils import parsedate_to_datetime
from http import HTTPStatus

from starlette.types import Receive, Scope, Send

from adytum.inference.channel.bhttp import field
from adytum.inference.channel.errors import ChannelError
from adytum.inference.channel.exchange import Closing, Exchange, OuterHead
from adytum.inference.channel.limits import DEFAULT_LIMITS
from adytum.inference.channel.openings import EhbpOpening
from adytum.inference.gateway import failures
from adytum.inference.gateway.accounting.ledger import Account, Ledger
from adytum.inference.gateway.accounting.telemetry import Telemetry
from adytum.inference.gateway.accounting.usage import Usage, of_whole
from adytum.inference.gateway.admission.admission import Admission, EngineCall
from adytum.inference.gateway.admission.load import Load
from adytum.inference.gateway.exchange.engines import EngineAnswer, EngineCut, Engines, Sink
from adytum.inference.gateway.exchange.lease import Lease
from adytum.inference.gateway.exchange.notary import Notary
from adytum.inference.gateway.exchange.reading import Arrivals, ClientGone, Opening, TooMuchArriving, while_there
from adytum.inference.gateway.exchange.shaping import Paced
from adytum.inference.gateway.exchange.writing import Plain, Writing
from adytum.inference.gateway.failures import Refusal, Refused
from adytum.inference.gateway.keys import DateNeeded, KeyRing, Replayed, ReplayMemoryFull

_log = logging.getLogger("adytum.gateway")
_JSON = ((b"content-type", b"application/json"),)
_EVENT_STREAM = b"text/event-stream"


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
        """`max_requests`: at a time. `request_seconds`: for one request to arrive. `max_upload`: bytes of all requests
        that are arriving."""
        self._keys = keys
        self._admission = admission
        self._engines = engines
        self._notary = notary
        self._ledger = ledger
        self._max_requests = max_requests
        self._request_seconds = request_seconds
        self._load = load
        self._telemetry = telemetry
        self.arrivals = Arrivals(max_upload, admission.know)
        self.in_progress = 0

    async def handle(self, scope: Scope, receive: Receive, send: Send, make_opening: Callable[[], Opening]) -> None:
        """Answers one request: sealed, or with a problem document if it could not be opened."""
        if self.in_progress >= self._max_requests:
            await failures.BUSY(scope, receive, send)
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
                refused = await self.arrivals.take(receive, opening)
            exchange = opening.open() if refused is None else opening.abandon()
            refused = self._spend(exchange) or refused
        except (ChannelError, Replayed, TimeoutError) as error:
            problem = failures.of_channel(error, is_ehbp=is_ehbp)
            if self._telemetry is not None:
                self._telemetry.unopened(problem.status)
            await problem(scope, receive, send)
            return
        except ClientGone:
            return
        except TooMuchArriving:
            await failures.BUSY(scope, receive, send)
            return
        except Exception as error:
            # Not an error of the channel: a fault of ours. The answer is as fixed as the others, and the log gets the
            # type's name only.
            _log.error("opening failed: %(kind)s", {"kind": type(error).__name__})
            await failures.FAULT(scope, receive, send)
            return
        writing = Plain(send) if exchange.cells is None else Paced(send, exchange.cells)
        try:
            await while_there(receive, self._answer(exchange, refused, writing))
        except Exception as error:
            _log.error("refusing failed: %(kind)s", {"kind": type(error).__name__})

    def _spend(self, exchange: Exchange) -> Refusal | None:
        """Returns a refusal, to be sealed, if the request cannot be told from a replay. Raises what is answered in the
        clear."""
        try:
            self._keys.spend(exchange.enc, exchange.recipient, lambda: _date(exchange))
        except DateNeeded as needed:
            return failures.date_needed(needed.now)
        except ReplayMemoryFull:
            return failures.TOO_MANY_TO_REMEMBER
        return None

    async def _answer(self, exchange: Exchange, refused: Refusal | None, writing: Writing) -> None:
        """Everything after the opening; every error from here on is sealed."""
        try:
            if refused is not None:
                raise Refused(refused)
            asked = self._ask(exchange)
            if isinstance(asked, bytes):
                await writing.whole(exchange.answer(200, _JSON, asked, self._notary.closing(exchange, 200)))
            else:
                with Lease(asked, self._load, self._ledger, self._engines) as lease:
                    await self._forward(lease, exchange, writing)
        except Refused as error:
            await self._refuse(exchange, error.refusal, writing)
        except Exception as error:
            # The type's name only: a message could quote content. An answer that has begun stays without its
            # authenticated end, so the client takes it as cut.
            _log.error("answering failed: %(kind)s", {"kind": type(error).__name__})
            if exchange.untouched:
                await self._refuse(exchange, failures.INTERNAL, writing)

    def _ask(self, exchange: Exchange) -> EngineCall | bytes:
        try:
            request = exchange.request()
        except ChannelError:
            raise Refused(failures.MALFORMED_INNER) from None
        return self._admission.admit(request)

    async def _forward(self, lease: Lease, exchange: Exchange, writing: Writing) -> None:
        if lease.call.stream and not exchange.can_stream:
            raise Refused(failures.STREAM_NEEDS_CHUNKS)
        answer, account = await lease.ask()
        if (field(answer.fields, b"content-type") or b"").startswith(_EVENT_STREAM):
            begun = exchange.begin(answer.status, answer.fields)

            async def pour(sink: Sink) -> tuple[bytes, Closing]:
                poured = await self._pour(lease.call, answer, account, exchange, sink)
                lease.answered()
                return poured

            await writing.stream(begun, exchange, account.stream.feed, pour)
        else:
            sealed = await self._whole(lease.call, answer, account, exchange)
            lease.answered()
            await writing.whole(sealed)

    async def _whole(
        self, call: EngineCall, answer: EngineAnswer, account: Account, exchange: Exchange
    ) -> tuple[OuterHead, bytes]:
        """Reads an answer that is not a stream, settles and seals it."""
        try:
            body = await _read_whole(answer)
        except Refused:
            await account.settle("cut", account.stream.usage)
            raise
        if answer.status == HTTPStatus.BAD_REQUEST:
            body = failures.of_engine(body)
        used = of_whole(body) if answer.status == HTTPStatus.OK else Usage(0, 0, 0)
        if used is None:
            # An answer without its count cannot be charged exactly: the same estimate as for a stream that was cut.
            used = account.stream.usage
        await account.settle("ok" if answer.status == HTTPStatus.OK else "refused", used)
        closing = self._notary.closing(exchange, answer.status, call.model.id, used)
        return exchange.answer(answer.status, answer.fields, body, closing)

    async def _pour(
        self, call: EngineCall, answer: EngineAnswer, account: Account, exchange: Exchange, sink: Sink
    ) -> tuple[bytes, Closing]:
        """Pours and settles a stream. Returns what is sealed and still to be written, and the answer's closing."""
        try:
            await answer.pour(sink)
        except EngineCut:
            # The client learns of it from an authenticated last event, not from a cut that the network could have made.
            last = exchange.data(failures.ENGINE_CUT.event())
            await account.settle("cut", account.stream.usage)
        else:
            last = exchange.data(account.stream.finish())
            await account.settle("ok", account.stream.usage)
        return last, self._notary.closing(exchange, answer.status, call.model.id, account.stream.usage)

    async def _refuse(self, exchange: Exchange, refusal: Refusal, writing: Writing) -> None:
        if self._telemetry is not None:
            self._telemetry.refused(refusal.code)
        # No receipt for a caller without a key: it would cost more than the request.
        closing = None if refusal is failures.BAD_KEY else self._notary.closing(exchange, refusal.status)
        await writing.whole(exchange.answer(refusal.status, refusal.fields(), refusal.body(), closing))


def _date(exchange: Exchange) -> float | None:
    """The inner `Date`, Unix seconds (RFC 9110, 5.6.7); `None` if it is missing or invalid."""
    try:
        said = field(exchange.request().fields, b"date")
        return parsedate_to_datetime(said.decode("ascii")).timestamp() if said is not None else None
    except (ChannelError, ValueError, TypeError, OverflowError):
        return None


async def _read_whole(answer: EngineAnswer) -> bytes:
    """Raises `Refused` if the engine's answer is cut or too large."""
    body = bytearray()
    try:
        while data := await answer.read():
            body += data
            if len(body) > DEFAULT_LIMITS.message:
                raise Refused(failures.ENGINE_TOO_LARGE)
    except EngineCut:
        raise Refused(failures.ENGINE_CUT) from None
    return bytes(body)
