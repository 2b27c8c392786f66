"""The asynchronous transport: the calls that wait. Everything else is in base.py."""

from collections.abc import AsyncIterator
from typing import overload

import httpx2

from adytum.inference.client.answers import PROBLEM_LIMIT, key_is_unknown, no_evidence
from adytum.inference.client.errors import ClientError, StaleDate, UpstreamRefused
from adytum.inference.client.reader import ResponseReader
from adytum.inference.client.session import DOCUMENT_LIMIT, Challenge, Session
from adytum.inference.client.transport.base import (
    POOL_LIMITS,
    AsyncLock,
    AsyncShield,
    Transport,
    cut_by,
    opens,
)
from adytum.inference.client.transport.libraries import (
    AsyncClassicBase,
    ClassicRequest,
    ClassicResponse,
    Request,
    Response,
    answer,
    busy_or_raise,
    library_of,
    raise_to,
    stream_class,
)


class AsyncAdytumTransport(Transport[httpx2.AsyncBaseTransport], httpx2.AsyncBaseTransport, AsyncClassicBase):
    """For `httpx2.AsyncClient` and `httpx.AsyncClient`."""

    _new_lock = staticmethod(AsyncLock)

    def _new_inner(self) -> httpx2.AsyncBaseTransport:
        return httpx2.AsyncHTTPTransport(limits=POOL_LIMITS)

    @overload
    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response: ...
    @overload
    async def handle_async_request(self, request: ClassicRequest) -> ClassicResponse: ...
    async def handle_async_request(self, request: Request) -> Response:
        """Seals one request and returns its opened answer."""
        try:
            self._check(request)
            body = await request.aread()
            session = await self._session()
            try:
                return await self._exchange(session, request, body)
            except StaleDate:
                pass
            except UpstreamRefused as error:
                if not key_is_unknown(error):
                    raise
                session = await self._session(session)
            return await self._exchange(session, request, body)
        except ClientError as error:
            return busy_or_raise(request, error)

    async def verify(self) -> Session:
        """Verifies the upstream now, unless that was just done. Raises `ClientError`."""
        return await self._session()

    async def _session(self, unwanted: Session | None = None) -> Session:
        session = self._upstream.session(unwanted)
        if session is not None:
            return session
        ticket = self._upstream.ticket
        async with self._lock:
            session = self._upstream.session(unwanted)
            if session is not None:
                return session
            self._upstream.shared(ticket)
            try:
                challenge = self._upstream.challenge()
                return self._upstream.accept(challenge, await self._document(challenge))
            except ClientError as error:
                self._upstream.failed(error)
                raise

    async def _document(self, challenge: Challenge) -> bytes:
        response = await self._send(self._evidence_request(challenge))
        try:
            document = await self._read(response, DOCUMENT_LIMIT)
        finally:
            await response.aclose()
        if response.status_code != 200:
            raise no_evidence(self._upstream.origin, self._refusal(response, document))
        return document

    async def _exchange(self, session: Session, request: Request, body: bytes) -> Response:
        data, reader = self._seal(session, request, body)
        response = await self._send(self._sealed_request(session, request, data))
        try:
            if not opens(response):
                raise self._refusal(response, await self._read(response, PROBLEM_LIMIT))
            pieces = aiter(response.stream)  # type: ignore[arg-type]
            first = b""
            try:
                while reader.head is None:
                    piece = await anext(pieces, None)
                    first += reader.finish() if piece is None else reader.feed(piece)
            except httpx2.TransportError as error:
                raise cut_by(error) from error
            if session.corrects_date(reader.head):
                raise StaleDate
            kind = stream_class(_AsyncStream, library_of(request).AsyncByteStream)
            return answer(request, reader, kind(request, response, pieces, reader, first))
        except BaseException:
            with AsyncShield():
                await response.aclose()
            raise

    async def _send(self, request: httpx2.Request) -> httpx2.Response:
        try:
            return await self._inner.handle_async_request(request)
        except httpx2.TransportError as error:
            raise self._unreachable(error) from error

    async def _read(self, response: httpx2.Response, limit: int) -> bytes:
        """The content, cut to `limit` bytes and one more, by which the caller sees that it is too large."""
        data = b""
        try:
            async for piece in response.stream:  # type: ignore[union-attr]
                data += piece
                if len(data) > limit:
                    break
        except httpx2.TransportError as error:
            raise self._unreachable(error) from error
        return data[: limit + 1]

    async def aclose(self) -> None:
        await self._inner.aclose()


class _AsyncStream:
    """The content of an answer as it is opened. `stream_class` derives it from the request library's base class."""

    def __init__(
        self,
        request: Request,
        response: httpx2.Response,
        pieces: AsyncIterator[bytes],
        reader: ResponseReader,
        first: bytes,
    ) -> None:
        self._request = request
        self._response = response
        self._pieces = pieces
        self._reader = reader
        self._first = first

    async def __aiter__(self) -> AsyncIterator[bytes]:
        reader = self._reader
        try:
            if self._first:
                yield self._first
            async for data in self._pieces:
                if content := reader.feed(data):
                    yield content
            if not reader.ended and (content := reader.finish()):
                yield content
        except ClientError as error:
            raise_to(self._request, error)
        except httpx2.TransportError as error:
            raise_to(self._request, cut_by(error))

    async def aclose(self) -> None:
        await self._response.aclose()
