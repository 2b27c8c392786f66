"""A closed-loop load of streamed chats, the same for both arms but for the seal.

Plaintext: HTTP to the engine's own Unix socket. Sealed: chunked Oblivious HTTP to the gateway. Both read the same way
with the same library, so the difference is what the channel and the gateway cost, the client's opening included.
"""

import asyncio
import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, Self

import aiohttp

from inference.channel import bhttp, keyconfig, ohttp
from inference.channel.bhttp import Content, RequestHead, ResponseHead
from inference.channel.keyconfig import KeyConfiguration

PATH = "/v1/chat/completions"


@dataclass
class Sample:
    """One request: times in seconds from its start, when each piece of the answer arrived."""

    arrivals: list[float] = field(default_factory=list)
    tokens: int = 0
    total: float = 0.0
    pieces: list[tuple[int, bytes]] | None = None
    """Where a list is given: each piece as it came, with the monotonic clock's nanoseconds."""

    @property
    def ttft(self) -> float:
        """Time to first token: to the first event with content."""
        return self.arrivals[0]

    @property
    def gaps(self) -> list[float]:
        """Between the arrivals of consecutive pieces with content."""
        return [b - a for a, b in zip(self.arrivals, self.arrivals[1:], strict=False)]


class Arm(Protocol):
    """A way to ask."""

    name: str

    async def ask(self, body: bytes, sample: Sample) -> None:
        """Sends one streamed chat and fills `sample`. Raises where the answer is not complete."""

    async def close(self) -> None: ...


class _Events:
    """Notes arrivals of content and the usage at the end, in what an SSE stream brings."""

    def __init__(self, sample: Sample, start: float) -> None:
        self._sample = sample
        self._start = start
        self._tail = b""
        self.done = False

    def feed(self, data: bytes) -> None:
        if self._sample.pieces is not None:
            self._sample.pieces.append((time.monotonic_ns(), data))
        if b'"content":' in data:
            self._sample.arrivals.append(time.perf_counter() - self._start)
        # The usage event and [DONE] come last: only the tail is ever parsed.
        self._tail = (self._tail + data)[-4096:]
        if b"data: [DONE]" in self._tail:
            self.done = True
            for line in self._tail.split(b"\n"):
                if b'"usage":{' in line and line.startswith(b"data: "):
                    self._sample.tokens = json.loads(line[6:])["usage"]["completion_tokens"]

    def finish(self) -> None:
        self._sample.total = time.perf_counter() - self._start
        if not self.done or not self._sample.tokens:
            raise RuntimeError("the answer is not complete")


class Plaintext:
    """To the engine's socket, or in the clear to `url`."""

    def __init__(self, socket: Path, url: str = "") -> None:
        self.name = "relay" if url else "plaintext"
        self._url = (url or "http://engine") + PATH
        connector = aiohttp.TCPConnector(limit=0) if url else aiohttp.UnixConnector(str(socket), limit=0)
        self._session = aiohttp.ClientSession(connector=connector)

    async def ask(self, body: bytes, sample: Sample) -> None:
        events = _Events(sample, time.perf_counter())
        headers = {"Content-Type": "application/json"}
        async with self._session.post(self._url, data=body, headers=headers) as answer:
            if answer.status != 200:
                raise RuntimeError(f"the engine answered {answer.status}")
            while data := await answer.content.readany():
                events.feed(data)
        events.finish()

    async def close(self) -> None:
        await self._session.close()


class Sealed:
    """To the gateway, chunked Oblivious HTTP with the best offered KEM or the one given."""

    name = "sealed"

    def __init__(self, url: str, configuration: KeyConfiguration) -> None:
        self._url = url
        self._configuration = configuration
        self._session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0))

    @classmethod
    async def connect(cls, url: str) -> Self:
        """With the announced keys. A load test of one's own backend; a client would take them from evidence."""
        async with aiohttp.ClientSession() as session, session.get(f"{url}/.well-known/ohttp-gateway") as answer:
            return cls(f"{url}/.well-known/ohttp-gateway", keyconfig.decode_list(await answer.read())[0])

    async def ask(self, body: bytes, sample: Sample) -> None:
        events = _Events(sample, time.perf_counter())
        sealer = ohttp.RequestSealer(ohttp.CHUNKED, self._configuration)
        head = RequestHead("POST", "https", "backend", PATH, ((b"content-type", b"application/json"),))
        sealed = sealer.start() + sealer.final(bhttp.encode(head, body))
        opener = sealer.response()
        decoder = bhttp.Decoder("response")
        headers = {"Content-Type": ohttp.CHUNKED.request}
        async with self._session.post(self._url, data=sealed, headers=headers) as answer:
            if answer.status != 200:
                raise RuntimeError(f"the gateway answered {answer.status}")
            while data := await answer.content.readany():
                self._events(decoder.feed(opener.feed(data)), events)
        self._events(decoder.feed(opener.finish()) + decoder.finish(), events)
        events.finish()

    @staticmethod
    def _events(found: list[Any], events: _Events) -> None:
        for event in found:
            if isinstance(event, Content):
                events.feed(event.data)
            elif isinstance(event, ResponseHead) and event.status != 200:
                raise RuntimeError(f"the backend answered {event.status}")

    async def close(self) -> None:
        await self._session.close()


@dataclass(frozen=True)
class Shape:
    """What is asked, how often, by how many at once."""

    model: str
    concurrency: int
    requests: int
    tokens: int
    prompt: str = "What is remote attestation?"

    def body(self) -> bytes:
        """The request; `ignore_eos` makes every answer equally long."""
        return json.dumps(
            {
                "model": self.model,
                "messages": [{"role": "user", "content": self.prompt}],
                "stream": True,
                "stream_options": {"include_usage": True},
                "temperature": 0,
                "max_tokens": self.tokens,
                "ignore_eos": True,
            }
        ).encode()


async def run(arm: Arm, shape: Shape) -> tuple[list[Sample], float]:
    """All requests of `shape` through `arm`, closed loop; the samples and the wall time in seconds."""
    body = shape.body()
    left = shape.requests
    samples: list[Sample] = []

    async def worker() -> None:
        nonlocal left
        while left > 0:
            left -= 1
            sample = Sample()
            await arm.ask(body, sample)
            samples.append(sample)

    start = time.perf_counter()
    await asyncio.gather(*(worker() for _ in range(shape.concurrency)))
    return samples, time.perf_counter() - start
