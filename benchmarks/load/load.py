"""Our own load generator: for arms that no maintained one reaches (EHBP, gateways of another shape), and to check one.

Plaintext: HTTP to the engine's own Unix socket. Sealed and Ehbp: to the gateway. All read answers the same way with the
same library, so the difference is the cost of the channel and the gateway, including the client's opening.
"""

import asyncio
import itertools
import json
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, Self

import aiohttp

from adytum.inference.channel import bhttp, ehbp, hpke, keyconfig, ohttp
from adytum.inference.channel.bhttp import Content, RequestHead, ResponseHead
from adytum.inference.channel.hpke import KemId
from adytum.inference.channel.keyconfig import KeyConfiguration

PATH = "/v1/chat/completions"
EMBEDDINGS = "/v1/embeddings"
_WORD = b'"content":'
_USAGE = b'"usage":{'
_LENGTH = 4


@dataclass
class Sample:
    """One request. `arrivals`: seconds from its start to each event of the answer with content."""

    arrivals: list[float] = field(default_factory=list)
    tokens: int = 0
    total: float = 0.0
    pieces: list[tuple[int, bytes]] | None = None
    """If it is a list: each piece as it arrived, with the monotonic clock's nanoseconds."""
    start: float = 0.0
    """The request's start, from the load's own start."""
    prompt_tokens: int = 0
    error: str = ""

    @property
    def ttft(self) -> float:
        """Time to first token: until the first event with content."""
        return self.arrivals[0]

    @property
    def gaps(self) -> list[float]:
        """Seconds between consecutive events with content; 0 between those that arrived together."""
        return [b - a for a, b in zip(self.arrivals, self.arrivals[1:], strict=False)]


class Arm(Protocol):
    """A way to send requests."""

    name: str

    async def ask(self, body: bytes, sample: Sample) -> None:
        """Sends one streamed chat and fills `sample`. Raises `RuntimeError` if the answer is not complete."""

    async def close(self) -> None: ...


class _Events:
    """Records the arrivals of content and the usage at the end, from an SSE stream or a whole JSON answer."""

    def __init__(self, sample: Sample, start: float, *, stream: bool = True) -> None:
        self._sample = sample
        self._start = start
        self._stream = stream
        self._tail = b""
        self.done = False

    def feed(self, data: bytes) -> None:
        if self._sample.pieces is not None:
            self._sample.pieces.append((time.monotonic_ns(), data))
        if not self._stream:
            self._tail += data
            return
        if words := data.count(_WORD):
            self._sample.arrivals += [time.perf_counter() - self._start] * words
        # The usage event and [DONE] come last, with padding before and after each.
        window, self._tail = self._tail + data, (self._tail + data)[-4096:]
        self.done = self.done or b"data: [DONE]" in window
        if not self._sample.tokens and (at := window.find(_USAGE)) >= 0 and (end := window.find(b"\n", at)) >= 0:
            usage = json.loads(window[window.rindex(b"data: ", 0, at) + 6 : end])["usage"]
            self._sample.tokens = usage["completion_tokens"]
            self._sample.prompt_tokens = usage.get("prompt_tokens", 0)

    def finish(self) -> None:
        self._sample.total = time.perf_counter() - self._start
        if not self._stream:
            answer = json.loads(self._tail)
            if not answer.get("data"):
                raise RuntimeError("the answer has no embeddings")
            self._sample.prompt_tokens = answer["usage"]["prompt_tokens"]
        elif not self.done or not self._sample.tokens:
            raise RuntimeError("the answer is not complete")


class Plaintext:
    """To the engine's socket, or in the clear to `url`. `path`: the API's path."""

    def __init__(self, socket: Path, url: str = "", *, path: str = PATH, api_key: str = "") -> None:
        self.name = "relay" if url else "plaintext"
        self._headers = {"Content-Type": "application/json"}
        if api_key:
            self._headers["Authorization"] = f"Bearer {api_key}"
        self._stream = path == PATH
        self._url = (url or "http://engine") + path
        connector = aiohttp.TCPConnector(limit=0) if url else aiohttp.UnixConnector(str(socket), limit=0)
        self._session = aiohttp.ClientSession(connector=connector)

    async def ask(self, body: bytes, sample: Sample) -> None:
        events = _Events(sample, time.perf_counter(), stream=self._stream)
        async with self._session.post(self._url, data=body, headers=self._headers) as answer:
            if answer.status != 200:
                raise RuntimeError(f"the engine answered {answer.status}")
            while data := await answer.content.readany():
                events.feed(data)
        events.finish()

    async def close(self) -> None:
        await self._session.close()


class Sealed:
    """To the gateway, chunked Oblivious HTTP with the best offered KEM or a given one."""

    name = "sealed"

    def __init__(self, url: str, configuration: KeyConfiguration, *, path: str = PATH, api_key: str = "") -> None:
        self._url = url
        self._configuration = configuration
        self._stream = path == PATH
        fields = [(b"content-type", b"application/json")]
        if api_key:
            fields.append((b"authorization", f"Bearer {api_key}".encode()))
        self._head = RequestHead("POST", "https", "backend", path, tuple(fields))
        self._session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0))

    @classmethod
    async def connect(cls, url: str, kem: KemId | None = None, *, path: str = PATH, api_key: str = "") -> Self:
        """With the announced keys, which is enough for a load test of one's own backend. A client takes them from
        verified evidence."""
        async with aiohttp.ClientSession() as session, session.get(f"{url}/.well-known/ohttp-gateway") as answer:
            found = [item for item in keyconfig.decode_list(await answer.read()) if kem in (None, item.kem)]
            if not found:
                raise RuntimeError(f"the gateway offers no {kem.name if kem else 'key'}")
            return cls(f"{url}/.well-known/ohttp-gateway", found[0], path=path, api_key=api_key)

    async def ask(self, body: bytes, sample: Sample) -> None:
        events = _Events(sample, time.perf_counter(), stream=self._stream)
        sealer = ohttp.RequestSealer(ohttp.CHUNKED, self._configuration)
        sealed = sealer.start() + sealer.final(bhttp.encode(self._head, body))
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


class Ehbp:
    """To the gateway with the Encrypted HTTP Body Protocol, whose only KEM is X25519."""

    name = "ehbp"

    def __init__(self, url: str, public_key: bytes, *, path: str = PATH, api_key: str = "") -> None:
        self._url = url + path
        self._key = public_key
        self._stream = path == PATH
        self._headers = {"Content-Type": "application/json"}
        if api_key:
            self._headers["Authorization"] = f"Bearer {api_key}"
        self._session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0))

    @classmethod
    async def connect(cls, url: str, *, path: str = PATH, api_key: str = "") -> Self:
        """With the announced key, like `Sealed.connect`."""
        async with aiohttp.ClientSession() as session, session.get(f"{url}/.well-known/hpke-keys") as answer:
            key = ehbp_configuration(await answer.read()).public_key
        return cls(url, key, path=path, api_key=api_key)

    async def ask(self, body: bytes, sample: Sample) -> None:
        events = _Events(sample, time.perf_counter(), stream=self._stream)
        enc, context = hpke.setup_sender(ehbp.SUITE, self._key, b"ehbp request")
        frame = context.seal(body)
        headers = {**self._headers, ehbp.REQUEST_HEADER: enc.hex()}
        async with self._session.post(
            self._url, data=len(frame).to_bytes(_LENGTH, "big") + frame, headers=headers
        ) as answer:
            if answer.status != 200 or ehbp.RESPONSE_HEADER not in answer.headers:
                raise RuntimeError(f"the gateway answered {answer.status}")
            nonce = bytes.fromhex(answer.headers[ehbp.RESPONSE_HEADER])
            sequence = ehbp.response_sequence(context.export(b"ehbp response", 32), enc, nonce)
            buffer = b""
            while data := await answer.content.readany():
                buffer += data
                while len(buffer) >= _LENGTH and len(buffer) >= (end := _LENGTH + int.from_bytes(buffer[:4], "big")):
                    events.feed(sequence.open(buffer[_LENGTH:end]))
                    buffer = buffer[end:]
        if buffer:
            raise RuntimeError("the answer ends inside a frame")
        events.finish()

    async def close(self) -> None:
        await self._session.close()


def ehbp_configuration(announced: bytes) -> KeyConfiguration:
    """What `/.well-known/hpke-keys` announces. Raises `RuntimeError` if its suite is unknown here."""
    configuration = KeyConfiguration.decode(announced)
    if configuration is None:
        raise RuntimeError("the gateway's EHBP key is of a suite that this client does not know")
    return configuration


def body(path: str, model: str, prompt: str, tokens: int, salt: str = "") -> bytes:
    """A request as `vllm bench serve` makes it. `ignore_eos` makes all answers equally long.

    `salt`: for vLLM's prefix cache, so that a chat is computed anew. The gateway replaces it with its own.
    """
    if path == EMBEDDINGS:
        return json.dumps({"model": model, "input": prompt, "truncate_prompt_tokens": -1}).encode()
    content = [{"type": "text", "text": prompt}]
    return json.dumps(
        {
            "model": model,
            "messages": [{"role": "user", "content": content}],
            "stream": True,
            "stream_options": {"include_usage": True},
            "temperature": 0,
            "max_completion_tokens": tokens,
            "ignore_eos": True,
            **({"cache_salt": salt} if salt else {}),
        }
    ).encode()


async def closed(arm: Arm, bodies: Sequence[bytes], concurrency: int) -> tuple[list[Sample], float]:
    """Sends all requests, `concurrency` at a time. Returns the samples and the wall time in seconds."""
    left = iter(bodies)
    samples: list[Sample] = []
    start = time.perf_counter()

    async def worker() -> None:
        for item in left:
            samples.append(await _one(arm, item, start))

    await asyncio.gather(*(worker() for _ in range(concurrency)))
    return samples, time.perf_counter() - start


async def poisson(arm: Arm, bodies: Sequence[bytes], rate: float, seed: int) -> tuple[list[Sample], float]:
    """Sends all requests, at the times of a Poisson process of `rate` per second, however many are unanswered.

    As in `vllm bench serve`, the times are stretched so that the last is at (requests / rate) seconds, which makes the
    load the same in each repetition.
    """
    rng = random.Random(seed)
    due = list(itertools.accumulate(rng.expovariate(1.0) for _ in bodies))
    start = time.perf_counter()
    asked = []
    for item, when in zip(bodies, due, strict=True):
        await asyncio.sleep(max(0.0, start + when * len(bodies) / rate / due[-1] - time.perf_counter()))
        asked.append(asyncio.create_task(_one(arm, item, start)))
    samples = await asyncio.gather(*asked)
    return list(samples), time.perf_counter() - start


async def _one(arm: Arm, item: bytes, start: float) -> Sample:
    sample = Sample(start=time.perf_counter() - start)
    try:
        await arm.ask(item, sample)
    except (RuntimeError, aiohttp.ClientError, ValueError) as error:
        sample.error = f"{type(error).__name__}: {error}"
    return sample
