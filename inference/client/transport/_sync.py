# Generated from inference/client/transport/_async.py by scripts/unasync.py. Change that file, then run the script.
"""The synchronous transport: the calls that wait. Everything else is in base.py."""

from collections.abc import Iterator
from typing import overload

import httpx2

from adytum.inference.client.answers import PROBLEM_LIMIT, key_is_unknown, no_evidence
from adytum.inference.client.errors import ClientError, StaleDate, UpstreamRefused
from adytum.inference.client.reader import ResponseReader
from adytum.inference.client.session import DOCUMENT_LIMIT, Challenge, Session
from adytum.inference.client.transport.base import (
    POOL_LIMITS,
    Lock,
    Shield,
    Transport,
    cut_by,
    opens,
)
from adytum.inference.client.transport.libraries import (
    ClassicBase,
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


class AdytumTransport(Transport[httpx2.BaseTransport], httpx2.BaseTransport, ClassicBase):
    """For `httpx2.Client` and `httpx.Client`."""

    _new_lock = staticmethod(Lock)

    def _new_inner(self) -> httpx2.BaseTransport:
        return httpx2.HTTPTransport(limits=POOL_LIMITS)

    @overload
    def handle_request(self, request: httpx2.Request) -> httpx2.Response: ...
    @overload
    def handle_request(self, request: ClassicRequest) -> ClassicResponse: ...
    def handle_request(self, request: Request) -> Response:
        """Seals one request and returns its opened answer."""
        try:
            self._check(request)
            body = request.read()
            session = self._session()
            try:
                return self._exchange(session, request, body)
            except StaleDate:
                pass
            except UpstreamRefused as error:
                if not key_is_unknown(error):
                    raise
                session = self._session(session)
            return self._exchange(session, request, body)
        except ClientError as error:
            return busy_or_raise(request, error)

    def verify(self) -> Session:
        """Verifies the upstream now, unless that was just done. Raises `ClientError`."""
        return self._session()

    def _session(self, unwanted: Session | None = None) -> Session:
        session = self._upstream.session(unwanted)
        if session is not None:
            return session
        ticket = self._upstream.ticket
        with self._lock:
            session = self._upstream.session(unwanted)
            if session is not None:
                return session
            self._upstream.shared(ticket)
            try:
                challenge = self._upstream.challenge()
                return self._upstream.accept(challenge, self._document(challenge))
            except ClientError as error:
                self._upstream.failed(error)
                raise

    def _document(self, challenge: Challenge) -> bytes:
        response = self._send(self._evidence_request(challenge))
        try:
            document = self._read(response, DOCUMENT_LIMIT)
        finally:
            response.close()
        if response.status_code != 200:
            raise no_evidence(self._upstream.origin, self._refusal(response, document))
        return document

    def _exchange(self, session: Session, request: Request, body: bytes) -> Response:
        data, reader = self._seal(session, request, body)
        response = self._send(self._sealed_request(session, request, data))
        try:
            if not opens(response):
                raise self._refusal(response, self._read(response, PROBLEM_LIMIT))
            pieces = iter(response.stream)  # type: ignore[arg-type]
            first = b""
            try:
                while reader.head is None:
                    piece = next(pieces, None)
                    first += reader.finish() if piece is None else reader.feed(piece)
            except httpx2.TransportError as error:
                raise cut_by(error) from error
            if session.corrects_date(reader.head):
                raise StaleDate
            kind = stream_class(_Stream, library_of(request).SyncByteStream)
            return answer(request, reader, kind(request, response, pieces, reader, first))
        except BaseException:
            with Shield():
                response.close()
            raise

    def _send(self, request: httpx2.Request) -> httpx2.Response:
        try:
            return self._inner.handle_request(request)
        except httpx2.TransportError as error:
            raise self._unreachable(error) from error

    def _read(self, response: httpx2.Response, limit: int) -> bytes:
        """The content, cut to `limit` bytes and one more, by which the caller sees that it is too large."""
        data = b""
        try:
            for piece in response.stream:  # type: ignore[union-attr]
                data += piece
                if len(data) > limit:
                    break
        except httpx2.TransportError as error:
            raise self._unreachable(error) from error
        return data[: limit + 1]

    def close(self) -> None:
        self._inner.close()


class _Stream:
    """The content of an answer as it is opened. `stream_class` derives it from the request library's base class."""

    def __init__(
        self,
        request: Request,
        response: httpx2.Response,
        pieces: Iterator[bytes],
        reader: ResponseReader,
        first: bytes,
    ) -> None:
        self._request = request
        self._response = response
        self._pieces = pieces
        self._reader = reader
        self._first = first

    def __iter__(self) -> Iterator[bytes]:
        reader = self._reader
        try:
            if self._first:
                yield self._first
            for data in self._pieces:
                if content := reader.feed(data):
                    yield content
            if not reader.ended and (content := reader.finish()):
                yield content
        except ClientError as error:
            raise_to(self._request, error)
        except httpx2.TransportError as error:
            raise_to(self._request, cut_by(error))

    def close(self) -> None:
        self._response.close()
