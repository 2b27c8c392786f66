"""One verified upstream over aiohttp, which costs about a third of the CPU time of httpx2 per streamed chunk."""

import asyncio
import logging
from types import TracebackType
from typing import Any, Protocol, Self

import aiohttp
import yarl

from adytum.inference.channel.bhttp import Fields, ResponseHead
from adytum.inference.client.answers import PROBLEM_LIMIT, is_sealed, key_is_unknown, no_evidence, refusal
from adytum.inference.client.errors import ClientError, StaleDate, UpstreamRefused, UpstreamUnreachable
from adytum.inference.client.reader import ResponseReader, cut
from adytum.inference.client.session import (
    DOCUMENT_LIMIT,
    SEALED_HEADERS,
    Challenge,
    Session,
    Upstream,
)

_log = logging.getLogger("adytum.proxy")
CONNECT_SECONDS = 10.0
EVIDENCE_SECONDS = 30.0
"""For a whole request for evidence: devices can take seconds to produce it."""
# Shorter than the five seconds after which uvicorn, the backend's server, closes an idle connection: a request that is
# sent at that moment would fail.
_KEEP_ALIVE_SECONDS = 4.0
_FAILURES = (aiohttp.ClientError, OSError, TimeoutError)
_NOT_CONNECTED = (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError)


class Reply(Protocol):
    """An answer of one backend, or one that was merged from several backends' answers."""

    @property
    def head(self) -> ResponseHead:
        """Status and header."""

    @property
    def receipt_token(self) -> bytes | None:
        """Its checked receipt, after `next` has returned nothing."""

    async def next(self) -> bytes:
        """Content as it arrives; empty at the authenticated end. Raises `ClientError`."""

    def close(self) -> None:
        """Ends it, whether or not it was read to its end."""


class Answer:
    """An opened answer whose content is still arriving. The caller closes it."""

    def __init__(self, response: aiohttp.ClientResponse, reader: ResponseReader) -> None:
        self._response = response
        self._reader = reader
        self._first = b""

    @property
    def head(self) -> ResponseHead:
        """Status and header."""
        assert self._reader.head is not None
        return self._reader.head

    @property
    def receipt_token(self) -> bytes | None:
        """The answer's checked receipt, after `next` has returned nothing."""
        return self._reader.receipt_token if self._reader.ended else None

    async def open(self) -> None:
        """Reads up to the head. Raises `ResponseCut`, `ResponseForged`."""
        while self._reader.head is None:
            self._first += await self._more()

    async def next(self) -> bytes:
        """Content as it arrives; empty at the authenticated end. Raises `ResponseCut`, `ResponseForged`."""
        first, self._first = self._first, b""
        while not first and not self._reader.ended:
            first = await self._more()
        return first

    async def _more(self) -> bytes:
        try:
            data = await self._response.content.readany()
        except _FAILURES as error:
            raise cut() from error
        return self._reader.feed(data) if data else self._reader.finish()

    def close(self) -> None:
        """Returns the connection to the pool, or closes it at once if the answer has not ended."""
        if self._reader.ended:
            self._response.release()
        else:
            self._response.close()


class UpstreamClient:
    """Sends requests to one upstream. An async context manager. `api_key` replaces the credentials given to `send`."""

    def __init__(self, upstream: Upstream, api_key: str | None = None) -> None:
        self.upstream = upstream
        self._api_key = api_key
        self._lock = asyncio.Lock()
        self._http: aiohttp.ClientSession

    async def __aenter__(self) -> Self:
        self._http = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEP_ALIVE_SECONDS),
            # No total time-out: an answer may take as long as its model needs.
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS),
            auto_decompress=False,
            cookie_jar=aiohttp.DummyCookieJar(),
            skip_auto_headers=("User-Agent", "Accept-Encoding", "Accept"),
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._http.close()

    async def verify_at_start(self) -> None:
        """Verifies once and logs the result, so that a wrong policy shows before the first request."""
        try:
            session = await self.session()
        except ClientError as error:
            _log.warning("%s", error)
        else:
            self.log_verified(session)

    def log_verified(self, session: Session) -> None:
        """Logs what was verified."""
        models = ", ".join(model.id for model in session.evidence.claims.models)
        _log.info("verified %s (%s, %s): %s", self.upstream.origin, session.evidence.provider, session.kem, models)

    @property
    def health(self) -> dict[str, Any]:
        """The upstream, and whether it is verified at the moment."""
        return {"upstream": str(self.upstream.origin), "verified": self.upstream.session() is not None}

    async def send(self, method: str, path: str, fields: Fields, body: bytes) -> Answer:
        """The answer once its head is open. Raises `ClientError`."""
        session = await self.session()
        try:
            return await self._exchange(session, method, path, fields, body)
        except StaleDate:
            pass
        except UpstreamRefused as error:
            if not key_is_unknown(error):
                raise
            session = await self.session(session)
        return await self._exchange(session, method, path, fields, body)

    async def session(self, unwanted: Session | None = None) -> Session:
        """A usable session, verified now if there is none. Raises `ClientError`."""
        session = self.upstream.session(unwanted)
        if session is not None:
            return session
        ticket = self.upstream.ticket
        async with self._lock:
            session = self.upstream.session(unwanted)
            if session is not None:
                return session
            self.upstream.shared(ticket)
            try:
                challenge = self.upstream.challenge()
                return self.upstream.accept(challenge, await self._document(challenge))
            except ClientError as error:
                error.unopened = True  # Only evidence was asked for; nothing was sealed.
                self.upstream.failed(error)
                raise

    async def _document(self, challenge: Challenge) -> bytes:
        try:
            async with asyncio.timeout(EVIDENCE_SECONDS):
                response = await self._http.get(self._url(challenge.target), allow_redirects=False)
                try:
                    document = await _read(response, DOCUMENT_LIMIT)
                finally:
                    response.release()
        except _FAILURES as error:
            raise self._unreachable(error) from error
        if response.status != 200:
            raise no_evidence(self.upstream.origin, self._refusal(response, document))
        return document

    async def _exchange(self, session: Session, method: str, path: str, fields: Fields, body: bytes) -> Answer:
        data, reader = session.seal(method, path, fields, body, api_key=self._api_key)
        try:
            response = await self._http.post(
                self._url(session.gateway_path), data=data, headers=SEALED_HEADERS, allow_redirects=False
            )
        except _FAILURES as error:
            raise self._unreachable(error) from error
        answer = Answer(response, reader)
        try:
            if not is_sealed(response.status, response.headers.get("Content-Type")):
                raise self._refusal(response, await self._problem(response))
            await answer.open()
            if session.corrects_date(answer.head):
                raise StaleDate
        except BaseException:
            answer.close()
            raise
        return answer

    async def _problem(self, response: aiohttp.ClientResponse) -> bytes:
        try:
            async with asyncio.timeout(CONNECT_SECONDS):
                return await _read(response, PROBLEM_LIMIT)
        except _FAILURES as error:
            raise self._unreachable(error) from error

    def _url(self, target: str) -> yarl.URL:
        return yarl.URL(f"{self.upstream.origin}{target}", encoded=True)

    def _refusal(self, response: aiohttp.ClientResponse, body: bytes) -> ClientError:
        headers = response.headers
        return refusal(
            self.upstream.origin, response.status, headers.get("Content-Type"), headers.get("Retry-After"), body
        )

    def _unreachable(self, error: BaseException) -> UpstreamUnreachable:
        return UpstreamUnreachable(
            f"{self.upstream.origin} cannot be reached ({type(error).__name__}: {error}). Check the address and the "
            "network.",
            unopened=isinstance(error, _NOT_CONNECTED),
        )


async def _read(response: aiohttp.ClientResponse, limit: int) -> bytes:
    """The body, cut to `limit` bytes and one more, by which the caller sees that it is too large."""
    body = b""
    while len(body) <= limit and (data := await response.content.readany()):
        body += data
    return body[: limit + 1]
