"""A scripted backend: the real channel and real simulated evidence, with answers and faults that a test chooses.

It is a test double of the network's other end: it opens, signs and seals for real, so that a client that checks less
than it should is caught, and it records every byte of what came in the clear.
"""

import asyncio
import json
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import uvicorn

from adytum.attestation.collect.rounds import Collector, NoEndorsements, NoGpus
from adytum.attestation.document.evidence import Claims, ModelClaim
from adytum.attestation.simulated.device import SimulatedCpu
from adytum.inference.channel import keyconfig, ohttp
from adytum.inference.channel.errors import UnknownKey
from adytum.inference.channel.exchange import Exchange, InnerRequest
from adytum.inference.channel.openings import OhttpOpening
from adytum.inference.channel.padding import Padding
from adytum.inference.client.proxy.app import create_app
from adytum.inference.client.proxy.replicas import Replicas
from adytum.inference.client.proxy.run import serve
from adytum.inference.client.proxy.upstream import UpstreamClient
from adytum.inference.gateway.accounting.usage import Usage
from adytum.inference.gateway.exchange.notary import Notary
from adytum.inference.gateway.keys import KeyRing
from tests.serving import QuickServer

GATEWAY = "/.well-known/ohttp-gateway/fake"
API_KEY = "sk-canary-5d1c77aa"
WORDS = ["marzipan", "submarine", "periwinkle", "harmonium", "tangerine"]
OHTTP_KEY = "https://iana.org/assignments/http-problem-types#ohttp-key"
JSON = ((b"content-type", b"application/json"),)
SSE = ((b"content-type", b"text/event-stream; charset=utf-8"),)

Plain = tuple[int, dict[str, str], bytes]
"""An answer in the clear."""


@dataclass
class Fake:
    """The scripted backend. Fields are its script; the lists are what it saw."""

    keys: KeyRing = field(default_factory=lambda: KeyRing(time.time, 3600, 600))
    port: int = 0
    gap: float = 0.0
    """Seconds between two events of a stream."""
    forget: int = 0
    """This many requests are answered as if their key were unknown."""
    plain: Plain | None = None
    """Answers every sealed request in the clear."""
    evidence: Plain | None = None
    """Answers every request for evidence."""
    claims: Callable[[Claims], Claims] = lambda claims: claims
    change: Callable[[int, bytes], bytes] | None = None
    """Returns what is written in place of the n-th write of an answer's body."""
    stop_at: int | None = None
    """The n-th write and all that follow are omitted."""
    clean_stop: bool = True
    """Whether an answer that was stopped still ends as HTTP requires."""
    seen: list[str] = field(default_factory=list)
    """Method and path of each outer request, in order."""
    outer: list[dict[str, str]] = field(default_factory=list)
    """Header fields of each outer sealed request."""
    inner: list[InnerRequest] = field(default_factory=list)
    sealed_bytes: list[int] = field(default_factory=list)
    kems: list[int] = field(default_factory=list)
    left: threading.Event = field(default_factory=threading.Event)
    """Set when a caller left before its answer's end."""
    writes: int = 0
    """Number of writes of the last answer."""

    def __post_init__(self) -> None:
        self.notary = Notary({"fake/chat": bytes(32)}, time.time)
        self._collector = Collector(cpu=SimulatedCpu(), gpus=NoGpus(), endorsements=NoEndorsements())

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def evidence_asked(self) -> int:
        return sum("attestation" in line for line in self.seen)

    @property
    def requests(self) -> int:
        """Number of sealed requests that arrived, opened or not."""
        return sum("ohttp-gateway" in line for line in self.seen)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        assert scope["type"] == "http"
        self.seen.append(f"{scope['method']} {scope['path']}")
        if scope["path"] == "/.well-known/attestation":
            await _plain(send, self.evidence or (200, {"content-type": "application/json"}, self._document(scope)))
            return
        headers = {k.decode(): v.decode() for k, v in scope["headers"]}
        self.outer.append(headers)
        assert scope["path"] == GATEWAY
        opening = OhttpOpening(ohttp.CHUNKED, self.keys.find, Padding.PAD)
        body = b""
        while True:
            message = await receive()
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        self.sealed_bytes.append(len(body))
        self.kems.append(int.from_bytes(body[1:3], "big"))
        if self.plain is not None:
            await _plain(send, self.plain)
            return
        try:
            if self.forget:
                self.forget -= 1
                raise UnknownKey("scripted")
            opening.feed(body)
            exchange = opening.open()
        except UnknownKey:
            problem = {"type": OHTTP_KEY, "title": "The key is not held.", "status": 422}
            await _plain(send, (422, {"content-type": "application/problem+json"}, json.dumps(problem).encode()))
            return
        request = exchange.request()
        self.inner.append(request)
        answering = asyncio.ensure_future(self._answer(exchange, request, send))
        leaving = asyncio.ensure_future(_gone(receive))
        await asyncio.wait((answering, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not answering.done():
            self.left.set()
        answering.cancel()
        leaving.cancel()
        await asyncio.gather(answering, leaving, return_exceptions=True)

    def _document(self, scope: Any) -> bytes:
        nonce = bytes.fromhex(scope["query_string"].decode().removeprefix("nonce="))
        claims = Claims(
            key_configurations=keyconfig.encode_list(self.keys.configurations),
            ehbp_key_configuration=None,
            receipt_key=self.notary.public_key,
            gateway_path=GATEWAY,
            replica="fake",
            tls_spki_sha256=None,
            models=(ModelClaim("fake/chat", "generate", (), bytes(32)),),
            configuration_sha256=bytes(32),
            padding="pad",
            sandbox="full",
            software_version="test",
            cc_mode="none",
            issued_at=int(time.time()),
            keys_expire_at=int(self.keys.expires_at),
        )
        return self._collector.collect(self.claims(claims), [nonce]).document(nonce)

    async def _answer(self, exchange: Exchange, request: InnerRequest, send: Any) -> None:
        started = False
        # Counted per answer: one that its client has left may still be writing.
        written = 0
        async for head, data in self._writes(exchange, request):
            if not started:
                await send({"type": "http.response.start", "status": head.status, "headers": list(head.headers)})
                started = True
            if self.stop_at is not None and written >= self.stop_at:
                if self.clean_stop:
                    await send({"type": "http.response.body", "body": b""})
                return
            if self.change is not None:
                data = self.change(written, data)
            written += 1
            self.writes = written
            await send({"type": "http.response.body", "body": data, "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    async def _writes(self, exchange: Exchange, request: InnerRequest) -> AsyncIterator[tuple[Any, bytes]]:
        answer = script(request)
        if isinstance(answer, tuple):
            status, document = answer
            closing = self.notary.closing(exchange, status)
            head, data = exchange.answer(status, JSON, json.dumps(document).encode(), closing)
            # In three writes, so that a whole answer can be cut and changed like a stream.
            third = len(data) // 3
            for piece in (data[:third], data[third : 2 * third], data[2 * third :]):
                yield head, piece
            return
        head, data = exchange.begin(200, SSE)
        yield head, data
        for item in answer:
            await asyncio.sleep(self.gap)
            yield head, exchange.data(item)
        yield head, exchange.end(self.notary.closing(exchange, 200, "fake/chat", Usage(3, 0, 5)))


async def _plain(send: Any, answer: Plain) -> None:
    status, headers, body = answer
    raw = [(k.encode(), v.encode()) for k, v in headers.items()]
    raw.append((b"content-length", str(len(body)).encode()))
    await send({"type": "http.response.start", "status": status, "headers": raw})
    await send({"type": "http.response.body", "body": body})


async def _gone(receive: Any) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def script(request: InnerRequest) -> tuple[int, Any] | list[bytes]:
    """The scripted engine's answer: a status and a document, or the events of a stream."""
    path = request.path.partition("?")[0]
    body = json.loads(request.body) if request.body else {}
    if path == "/v1/models":
        return 200, {"object": "list", "data": [{"id": "fake/chat", "object": "model", "created": 0, "owned_by": "x"}]}
    if path == "/v1/embeddings":
        data = [{"object": "embedding", "index": 0, "embedding": [0.25, 0.5]}]
        return 200, {"object": "list", "model": "m", "data": data, "usage": {"prompt_tokens": 1, "total_tokens": 1}}
    if path == "/v1/messages":
        return _messages(bool(body.get("stream")))
    if "status" in body:
        return body["status"], {"error": {"message": "x", "type": "server_error", "param": None, "code": None}}
    if path != "/v1/chat/completions":
        return 404, {"error": {"message": "unknown path", "type": "not_found_error", "param": None, "code": None}}
    if body.get("stream"):
        pieces = [_delta(word) for word in WORDS] + [_delta("", "stop")]
        return [*(b"data: " + json.dumps(piece).encode() + b"\n\n" for piece in pieces), b"data: [DONE]\n\n"]
    content = "x" * body["size"] if "size" in body else " ".join(WORDS)
    message = {"role": "assistant", "content": content}
    choice = {"index": 0, "finish_reason": "stop", "message": message}
    return 200, {"id": "c", "object": "chat.completion", "created": 0, "model": "fake/chat", "choices": [choice]}


def _delta(word: str, reason: str | None = None) -> dict[str, Any]:
    choice = {"index": 0, "delta": {"content": word}, "finish_reason": reason}
    return {"id": "c", "object": "chat.completion.chunk", "created": 0, "model": "fake/chat", "choices": [choice]}


def _messages(stream: bool) -> tuple[int, Any] | list[bytes]:
    usage = {"input_tokens": 1, "output_tokens": 2}
    message: dict[str, Any] = {"id": "m", "type": "message", "role": "assistant", "model": "fake/chat", "usage": usage}
    message |= {
        "content": [{"type": "text", "text": " ".join(WORDS)}],
        "stop_reason": "end_turn",
        "stop_sequence": None,
    }
    if not stream:
        return 200, message
    events: list[dict[str, Any]] = [
        {"type": "message_start", "message": {**message, "content": [], "stop_reason": None}},
        {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
        *({"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": w}} for w in WORDS),
        {"type": "content_block_stop", "index": 0},
        {"type": "message_delta", "delta": {"stop_reason": "end_turn", "stop_sequence": None}, "usage": usage},
        {"type": "message_stop"},
    ]
    return [f"event: {event['type']}\ndata: {json.dumps(event)}\n\n".encode() for event in events]


def chat(stream: bool = False, **more: Any) -> dict[str, Any]:
    """A chat request's body."""
    messages = [{"role": "user", "content": "quixotic zeppelin"}]
    return {"model": "fake/chat", "messages": messages, "stream": stream, **more}


@contextmanager
def serving(app: Any, *, lifespan: str = "off") -> Iterator[int]:
    """Serves an ASGI application on loopback in a thread; yields its port."""
    config = uvicorn.Config(app, port=0, http="httptools", lifespan=lifespan, access_log=False, log_level="critical")  # type: ignore[arg-type]
    server = QuickServer(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    deadline = time.monotonic() + 20
    while not server.started:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    try:
        yield server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.end()
        thread.join(20)


@contextmanager
def running_fake(**script: Any) -> Iterator[Fake]:
    """A scripted backend."""
    fake = Fake(**script)
    with serving(fake) as port:
        fake.port = port
        yield fake


@contextmanager
def running_proxy(client: UpstreamClient | Replicas, **options: Any) -> Iterator[str]:
    """The proxy for what `client` asks, served in a thread; yields its origin. `grace_s` is also an option."""
    grace = {"grace_s": options.pop("grace_s", 0.2)}
    loop = asyncio.new_event_loop()
    started, stop = threading.Event(), asyncio.Event()
    with socket.create_server(("127.0.0.1", 0), backlog=128) as listening:
        serving = serve(create_app(client, **options), listening, started.set, stop, **grace)
        thread = threading.Thread(target=loop.run_until_complete, args=(serving,), daemon=True)
        thread.start()
        assert started.wait(20)
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            loop.call_soon_threadsafe(stop.set)
            thread.join(20)
    loop.close()


def with_claims(**changes: Any) -> Callable[[Claims], Claims]:
    """For `Fake.claims`."""
    return lambda claims: replace(claims, **changes)
