"""`adytum proxy`: an OpenAI-compatible endpoint on this machine that verifies a backend before it sends anything.

Everything under `/v1/` is sealed, sent and opened. It serves programs on this machine, not web pages: a request whose
Host is a foreign name (DNS rebinding) or that a page of another origin makes is refused.
"""

import asyncio
import contextlib
import ipaddress
import json
import logging
import socket
from collections.abc import AsyncIterator, Callable, Sequence
from os import PathLike
from pathlib import Path

import click
import uvicorn
from starlette.applications import Starlette
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from adytum.attestation.core.errors import AttestationError
from adytum.attestation.core.trust import TrustRoots
from adytum.attestation.policy.policy import Policy
from adytum.inference.channel.limits import DEFAULT_LIMITS
from adytum.inference.channel.receipts import TRAILER
from adytum.inference.client.answers import BUSY
from adytum.inference.client.caller import Caller, Reply
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
from adytum.inference.client.replicas import Replicas
from adytum.inference.client.session import Upstream
from adytum.inference.client.workspace import Workspace

_log = logging.getLogger("adytum.proxy")
BODY_LIMIT = DEFAULT_LIMITS.message
"""Bytes of one request's body."""
ANSWER_LIMIT = 2 * DEFAULT_LIMITS.message
"""Bytes of an answer that is no stream."""
_LOOPBACK = frozenset(("localhost", "127.0.0.1", "[::1]"))
_GRACE_S = 5
# The proxy frames its own answer; the rest of the backend's header fields are the caller's.
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


class CannotStart(click.ClickException):
    """An option cannot be used as it is."""


def create_app(
    caller: Caller | Replicas,
    *,
    bound: str = "127.0.0.1",
    allow_hosts: Sequence[str] = (),
    allow_origins: Sequence[str] = (),
) -> ASGIApp:
    """The web application. `bound` is the address it listens on, `allow_hosts` are further names that callers may use
    for it, `allow_origins` the origins whose web pages may use it."""

    @contextlib.asynccontextmanager
    async def lifespan(_app: Starlette) -> AsyncIterator[None]:
        async with caller:
            first = asyncio.create_task(caller.first())
            yield
            first.cancel()

    app = Starlette(lifespan=lifespan)
    app.router.default = _Routes(caller)
    served: ASGIApp = app
    if allow_origins:
        served = CORSMiddleware(app, allow_origins, allow_methods=("GET", "POST"), allow_headers=("*",))
    return _Guard(served, bound, allow_hosts, frozenset(allow_origins))


class _Guard:
    """Refuses what a web page of somebody else's could send."""

    def __init__(self, app: ASGIApp, bound: str, hosts: Sequence[str], origins: frozenset[str]) -> None:
        self._app = app
        self._hosts = {*_LOOPBACK, _in_url(bound.lower()), *(_in_url(name.lower()) for name in hosts)}
        # Rebinding needs a name; who listens everywhere is reached by addresses that are not known beforehand.
        self._any_address = bound in ("0.0.0.0", "::")  # noqa: S104 - compared, not bound
        self._origins = origins

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and (refused := self._refuses(dict(scope["headers"]))):
            await _send_error(send, 403, refused, "forbidden", kind="permission_error")
            return
        await self._app(scope, receive, send)

    def _refuses(self, headers: dict[bytes, bytes]) -> str | None:
        name = _host_name(headers.get(b"host", b"").decode("latin-1"))
        if name not in self._hosts and not (self._any_address and _is_address(name)):
            return "This proxy answers to localhost and the address it listens on only. Use http://localhost:<port>/v1."
        origin = headers.get(b"origin")
        if origin is not None and origin.decode("latin-1") not in self._origins:
            return "This proxy does not serve web pages: the request's Origin is not allowed."
        if origin is None and headers.get(b"sec-fetch-site") in (b"cross-site", b"same-site"):
            return "This proxy does not serve web pages: the request comes from another site."
        return None


def _host_name(host: str) -> str:
    if host.startswith("["):
        return host.partition("]")[0].lower() + "]"
    return host.partition(":")[0].lower()


def _in_url(address: str) -> str:
    return f"[{address}]" if ":" in address and not address.startswith("[") else address


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name.strip("[]"))
    except ValueError:
        return False
    return True


class _Routes:
    """`/healthz` and everything under `/v1/`."""

    def __init__(self, caller: Caller | Replicas) -> None:
        self._caller = caller

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        path: str = scope["path"]
        if path == "/healthz" and scope["method"] in ("GET", "HEAD"):
            await _send_json(send, 200, {"status": "alive", **self._caller.health})
        elif not path.startswith("/v1/"):
            await _send_error(send, 404, "There is nothing at this path; the API is under /v1/.", "unknown_path")
        elif scope["method"] not in ("GET", "POST"):
            await _send_error(send, 405, "The API takes GET and POST.", "method_not_allowed")
        else:
            await self._serve(scope, receive, send)

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = await _body(scope, receive, send)
        if body is None:
            return
        answering = asyncio.ensure_future(_Exchange(self._caller, send).run(scope, body))
        leaving = asyncio.ensure_future(_disconnect(receive))
        try:
            await asyncio.wait((answering, leaving), return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (answering, leaving):
                task.cancel()
            # Cancelling closes the upstream's connection, so that the engine stops.
            await asyncio.gather(answering, leaving, return_exceptions=True)


async def _body(scope: Scope, receive: Receive, send: Send) -> bytes | None:
    """The request's body, or `None` where it was too large (answered) or the caller is gone."""
    announced = dict(scope["headers"]).get(b"content-length", b"0")
    body = bytearray()
    more = True
    while more and len(body) <= BODY_LIMIT and not (announced.isdigit() and int(announced) > BODY_LIMIT):
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        body += message.get("body", b"")
        more = message.get("more_body", False)
    if more or len(body) > BODY_LIMIT:
        text = f"The body is larger than {BODY_LIMIT // 1024 // 1024} MiB. Nothing was sent."
        await _send_error(send, 413, text, "request_too_large", headers=((b"connection", b"close"),))
        return None
    return bytes(body)


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class _Exchange:
    """One request and its answer."""

    def __init__(self, caller: Caller | Replicas, send: Send) -> None:
        self._caller = caller
        self._send_on = send
        self._started = False

    async def run(self, scope: Scope, body: bytes) -> None:
        """Answers. Once an answer has begun, what goes wrong leaves it without its end: uvicorn then closes the
        connection, and no client takes it for whole."""
        try:
            await self._run(scope, body)
        except ClientError as error:
            _log.warning("%s", error)
            if not self._started:
                await _send_client_error(self._send, error)
        except Exception as error:
            # The type's name only: a message could quote content.
            _log.error("a request failed: %s", type(error).__name__)
            if not self._started:
                await _send_error(self._send, 500, "The proxy failed. Its log has the kind.", "internal_error")

    async def _run(self, scope: Scope, body: bytes) -> None:
        path = scope.get("raw_path", scope["path"].encode()).decode("latin-1")
        if scope["query_string"]:
            path += "?" + scope["query_string"].decode("latin-1")
        answer = await self._caller.send(scope["method"], path, tuple(scope["headers"]), body)
        try:
            await self._pass_on(answer)
        finally:
            answer.close()

    async def _pass_on(self, answer: Reply) -> None:
        head = answer.head
        fields = [(name, value) for name, value in head.fields if name not in _NOT_PASSED]
        if not any(
            name == b"content-type" and value.lower().startswith(b"text/event-stream") for name, value in fields
        ):
            # Whole, so that a fault anywhere in it is an error and not half an answer.
            whole = await _whole(answer)
            fields.append((b"content-length", str(len(whole)).encode()))
            if answer.receipt_token is not None:
                fields.append((TRAILER, answer.receipt_token))
            await self._start(head.status, fields)
            await self._send({"type": "http.response.body", "body": whole})
            return
        await self._start(head.status, fields)
        send = self._send_on
        while data := await answer.next():
            await send({"type": "http.response.body", "body": data, "more_body": True})
        # A comment, which every client of server-sent events passes over.
        receipt = b": %b %b\n\n" % (TRAILER, answer.receipt_token or b"")
        await send({"type": "http.response.body", "body": receipt})

    async def _start(self, status: int, fields: list[tuple[bytes, bytes]]) -> None:
        await self._send({"type": "http.response.start", "status": status, "headers": fields})

    async def _send(self, message: Message) -> None:
        self._started = True
        await self._send_on(message)


async def _whole(answer: Reply) -> bytes:
    body = bytearray()
    while data := await answer.next():
        body += data
        if len(body) > ANSWER_LIMIT:
            raise ResponseForged("The answer is larger than this proxy takes, and was not used.")
    return bytes(body)


async def _send_client_error(send: Send, error: ClientError) -> None:
    status = 502
    headers: list[tuple[bytes, bytes]] = []
    if isinstance(error, RequestRefused):
        status = error.status
    if isinstance(error, UpstreamRefused) and error.status in BUSY:
        status = error.status
        if error.retry_after is not None:
            headers.append((b"retry-after", str(error.retry_after).encode()))
    if isinstance(error, NotVerified):
        headers.append((b"x-should-retry", b"false"))  # The SDKs' word: asking again at once changes nothing.
    kind = "server_error" if status >= 500 else "rate_limit_error" if status == 429 else "invalid_request_error"
    await _send_error(send, status, str(error), _CODES[type(error)], kind=kind, headers=headers)


async def _send_error(
    send: Send,
    status: int,
    message: str,
    code: str,
    *,
    kind: str = "invalid_request_error",
    headers: Sequence[tuple[bytes, bytes]] = (),
) -> None:
    error = {"message": message, "type": kind, "param": None, "code": code}
    # "type" at the top is where Anthropic's clients look; OpenAI's ignore it.
    await _send_json(send, status, {"type": "error", "error": error}, headers)


async def _send_json(send: Send, status: int, document: object, headers: Sequence[tuple[bytes, bytes]] = ()) -> None:
    body = json.dumps(document).encode()
    own = ((b"content-type", b"application/json"), (b"content-length", str(len(body)).encode()))
    await send({"type": "http.response.start", "status": status, "headers": [*own, *headers]})
    await send({"type": "http.response.body", "body": body})


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._ready = ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._ready()


def run_proxy(
    *,
    upstreams: Sequence[str],
    policy_path: str | PathLike[str],
    host: str = "127.0.0.1",
    port: int = 9876,
    api_key: str | None = None,
    workspace: str | PathLike[str] | None = None,
    kem: str | None = None,
    ready: Callable[[str], None] | None = None,
    trust: TrustRoots | None = None,
    allow_hosts: Sequence[str] = (),
    allow_origins: Sequence[str] = (),
) -> None:
    """Serves until a signal. `ready` is called with the endpoint's URL once it listens. Raises `CannotStart`."""
    try:
        policy = Policy.from_toml(Path(policy_path))
        if policy.release.required != "none" and workspace is None:
            _log.warning("without a workspace no release is remembered: only the policy's minimum refuses older ones")
        record = Workspace(workspace).record if workspace is not None else None
        callers = [
            Caller(Upstream(url, policy=policy, trust=trust, kem=kem, record=record), api_key) for url in upstreams
        ]
        # One alone is asked whatever becomes of it: its own error says more than that nothing is left.
        caller = callers[0] if len(callers) == 1 else Replicas(callers)
        listening = _listen(host, port)
    except AttestationError as error:
        raise CannotStart(f"{policy_path}: {error}") from error
    except (ValueError, OSError) as error:
        raise CannotStart(str(error)) from error
    url = f"http://{_in_url(host)}:{listening.getsockname()[1]}/v1"
    if not _is_loopback(host):
        _log.warning("listening on %s: whoever reaches it may use it, and talks to it in the clear", host)

    def announce() -> None:
        _log.info("listening on %s for %s", url, ", ".join(upstreams))
        if ready is not None:
            ready(url)

    config = uvicorn.Config(
        create_app(caller, bound=host, allow_hosts=allow_hosts, allow_origins=allow_origins),
        loop="uvloop",
        http="httptools",
        ws="none",
        lifespan="on",
        access_log=False,
        log_config=None,
        # Its only errors here would be "returned without completing response", which is how a broken answer ends.
        log_level="critical",
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=65,
        timeout_graceful_shutdown=_GRACE_S,
    )
    with listening:
        _Server(config, announce).run(sockets=[listening])


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise CannotStart(f"cannot listen on {host} port {port} ({error.strerror}); choose another port") from error


def _is_loopback(host: str) -> bool:
    return host == "localhost" or (_is_address(host) and ipaddress.ip_address(host).is_loopback)
