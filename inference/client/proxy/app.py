"""The proxy's web application: everything under `/v1/` is sealed, sent and opened; `/healthz` reports its state."""

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence

from aiohttp import HttpVersion11, hdrs, web

from adytum.inference.channel.limits import DEFAULT_LIMITS
from adytum.inference.channel.receipts import TRAILER
from adytum.inference.client.answers import BUSY
from adytum.inference.client.errors import (
    ClientError,
    NotVerified,
    NoUpstream,
    RequestRefused,
    ResponseCut,
    ResponseForged,
    UpstreamRefused,
    UpstreamUnreachable,
)
from adytum.inference.client.proxy.guard import Guard, error_response, json_response
from adytum.inference.client.proxy.replicas import Replicas
from adytum.inference.client.proxy.upstream import Reply, UpstreamClient

_log = logging.getLogger("adytum.proxy")
BODY_LIMIT = DEFAULT_LIMITS.message
"""Bytes of one request's body."""
ANSWER_LIMIT = 2 * DEFAULT_LIMITS.message
"""Bytes of an answer that is not a stream."""
# The proxy frames its own answer; the backend's other header fields are for the caller.
_NOT_PASSED = frozenset((b"connection", b"content-length", b"transfer-encoding", b"keep-alive", b"server", b"date"))
_CODES: dict[type[ClientError], str] = {
    RequestRefused: "request_refused",
    UpstreamUnreachable: "upstream_unreachable",
    UpstreamRefused: "upstream_refused",
    NotVerified: "upstream_not_verified",
    NoUpstream: "no_upstream",
    ResponseCut: "response_cut",
    ResponseForged: "response_forged",
}


def create_app(
    client: UpstreamClient | Replicas,
    *,
    bound: str = "127.0.0.1",
    allow_hosts: Sequence[str] = (),
    allow_origins: Sequence[str] = (),
) -> web.Application:
    """The web application. `bound` is the address it listens on, `allow_hosts` are further names that callers may use
    for it, `allow_origins` the origins whose web pages may use it."""

    async def lifespan(_app: web.Application) -> AsyncIterator[None]:
        async with client:
            first = asyncio.create_task(client.verify_at_start())
            yield
            first.cancel()

    guard = Guard(bound, allow_hosts, allow_origins)
    app = web.Application(middlewares=[guard.check])
    app.on_response_prepare.append(guard.finish)
    app.cleanup_ctx.append(lifespan)
    app.router.add_route("*", "/{path:.*}", _Routes(client).answer, expect_handler=_continue_later)
    return app


async def _continue_later(_request: web.Request) -> None:
    """Defers `100 Continue` to `_read`: a request that is refused needs no body."""


class _Routes:
    """`/healthz` and everything under `/v1/`."""

    def __init__(self, client: UpstreamClient | Replicas) -> None:
        self._client = client

    async def answer(self, request: web.Request) -> web.StreamResponse:
        if request.path == "/healthz" and request.method in ("GET", "HEAD"):
            return json_response({"status": "alive", **self._client.health})
        if not request.path.startswith("/v1/"):
            return error_response(404, "There is nothing at this path; the API is under /v1/.", "unknown_path")
        if request.method not in ("GET", "POST"):
            return error_response(405, "The API takes GET and POST.", "method_not_allowed")
        body = await _read(request)
        if body is None:
            text = f"The body is larger than {BODY_LIMIT // 1024 // 1024} MiB. Nothing was sent."
            refused = error_response(413, text, "request_too_large")
            refused.force_close()  # The rest of the body is not read.
            return refused
        return await self._serve(request, body)

    async def _serve(self, request: web.Request, body: bytes) -> web.StreamResponse:
        """If the caller leaves, aiohttp cancels this, which closes the upstream's connection: the engine stops."""
        stream = web.StreamResponse()
        try:
            answer = await self._client.send(request.method, request.rel_url.raw_path_qs, request.raw_headers, body)
            try:
                return await _pass_on(request, answer, stream)
            finally:
                answer.close()
        except ConnectionResetError:
            raise  # The caller is gone.
        except ClientError as error:
            _log.warning("%s", error)
            failed = _client_error(error)
        except Exception as error:
            # The type's name only: a message could quote content.
            _log.error("a request failed: %s", type(error).__name__)
            failed = error_response(500, "The proxy failed. Its log names the kind of error.", "internal_error")
        if stream.prepared:
            # aiohttp then closes the connection without the end of the stream, so no client takes the answer for whole.
            raise ConnectionAbortedError
        return failed


async def _read(request: web.Request) -> bytes | None:
    """The request's body, or `None` if it is too large."""
    if (request.content_length or 0) > BODY_LIMIT:
        return None
    if request.headers.get(hdrs.EXPECT, "").lower() == "100-continue":
        await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        request.writer.output_size = 0  # The answer has not begun.
    body = bytearray()
    async for data in request.content.iter_any():
        body += data
        if len(body) > BODY_LIMIT:
            return None
    return bytes(body)


async def _pass_on(request: web.Request, answer: Reply, stream: web.StreamResponse) -> web.StreamResponse:
    head = answer.head
    fields = [
        (name.decode("ascii"), value.decode("utf-8", "replace"))
        for name, value in head.fields
        if name not in _NOT_PASSED
    ]
    is_stream = any(name == "content-type" and value.lower().startswith("text/event-stream") for name, value in fields)
    # HTTP/1.0 has no chunks, so its clients could not tell a stream that was cut from a whole one.
    if not is_stream or request.version < HttpVersion11:
        # Whole, so that a fault anywhere in it is an error and not half an answer.
        whole = await _whole(answer)
        if answer.receipt_token is not None:
            fields.append((TRAILER.decode(), answer.receipt_token.decode()))
        return web.Response(body=whole, status=head.status, headers=fields)
    stream.set_status(head.status)
    stream.headers.extend(fields)
    await stream.prepare(request)
    while data := await answer.next():
        await stream.write(data)
    # A comment, which every client of server-sent events ignores.
    await stream.write(b": %b %b\n\n" % (TRAILER, answer.receipt_token or b""))
    await stream.write_eof()
    return stream


async def _whole(answer: Reply) -> bytes:
    body = bytearray()
    while data := await answer.next():
        body += data
        if len(body) > ANSWER_LIMIT:
            raise ResponseForged(f"The answer is larger than {ANSWER_LIMIT // 1024 // 1024} MiB and was not used.")
    return bytes(body)


def _client_error(error: ClientError) -> web.Response:
    status = 502
    headers: dict[str, str] = {}
    if isinstance(error, RequestRefused):
        status = error.status
    if isinstance(error, UpstreamRefused) and error.status in BUSY:
        status = error.status
        if error.retry_after is not None:
            headers[hdrs.RETRY_AFTER] = str(error.retry_after)
    if isinstance(error, NotVerified):
        headers["x-should-retry"] = "false"  # The SDKs' header: to ask again at once changes nothing.
    kind = "server_error" if status >= 500 else "rate_limit_error" if status == 429 else "invalid_request_error"
    return error_response(status, str(error), _CODES[type(error)], kind=kind, headers=headers)
