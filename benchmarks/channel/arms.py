"""The requests to the gateway and to its peers, and a client that is cheap enough not to disturb the measurement.

Requests are sealed before the clock starts. The client reads an answer to its HTTP end without opening it. Before the
measurement, `check` opens one answer of each arm and counts its events.
"""

import asyncio
import json
import ssl
from collections.abc import Callable
from dataclasses import dataclass

from adytum.benchmarks.load.load import PATH
from adytum.inference.channel import bhttp, ehbp, hpke, ohttp
from adytum.inference.channel.bhttp import Content, RequestHead
from adytum.inference.channel.keyconfig import KeyConfiguration

Opener = Callable[[bytes, bytes], bytes]
"""Maps (the answer's head, its body without HTTP's framing) to its content."""
_END = b"\r\n0\r\n\r\n"


@dataclass(frozen=True)
class Arm:
    """One way to the engine. `request` returns the bytes to send, fresh each time, and what opens the answer."""

    name: str
    port: int
    pid: int
    request: Callable[[bytes], tuple[bytes, Opener]]
    context: ssl.SSLContext | None = None


def body(events: int, gap_ms: int, batch: int) -> bytes:
    """A chat for the synthetic engine."""
    asked = {
        "model": "latest",
        "messages": [{"role": "user", "content": "x" * 400}],
        "stream": True,
        "stream_options": {"include_usage": True},
        "max_tokens": events,
        "seed": gap_ms * 1000 + batch,
    }
    return json.dumps(asked).encode()


def post(path: str, content: bytes, content_type: str, extra: str = "") -> bytes:
    head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: {content_type}\r\n{extra}"
    return f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content


def plain(content: bytes) -> tuple[bytes, Opener]:
    """For the peers."""
    return post(PATH, content, "application/json"), lambda _, answer: answer


def oblivious(configuration: KeyConfiguration) -> Callable[[bytes], tuple[bytes, Opener]]:
    """Chunked Oblivious HTTP to this key."""

    def request(content: bytes) -> tuple[bytes, Opener]:
        sealer = ohttp.RequestSealer(ohttp.CHUNKED, configuration)
        head = RequestHead("POST", "https", "backend", PATH, ((b"content-type", b"application/json"),))
        sealed = sealer.start() + sealer.final(bhttp.encode(head, content))

        def opened(_: bytes, answer: bytes) -> bytes:
            opener, decoder = sealer.response(), bhttp.Decoder("response")
            found = decoder.feed(opener.feed(answer))
            found += decoder.feed(opener.finish()) + decoder.finish()
            return b"".join(item.data for item in found if isinstance(item, Content))

        return post("/.well-known/ohttp-gateway", sealed, ohttp.CHUNKED.request), opened

    return request


def ehbp_arm(configuration: KeyConfiguration) -> Callable[[bytes], tuple[bytes, Opener]]:
    """The Encrypted HTTP Body Protocol to this key."""

    def request(content: bytes) -> tuple[bytes, Opener]:
        enc, context = hpke.setup_sender(ehbp.SUITE, configuration.public_key, b"ehbp request")
        sealed = context.seal(content)

        def opened(head: bytes, answer: bytes) -> bytes:
            lines = [line.partition(b":") for line in head.split(b"\r\n")]
            nonce = next(value for name, _, value in lines if name.lower() == ehbp.RESPONSE_HEADER.encode())
            secret = context.export(b"ehbp response", 32)
            sequence = ehbp.response_sequence(secret, enc, bytes.fromhex(nonce.strip().decode()))
            at, found = 0, []
            while at < len(answer):
                length = int.from_bytes(answer[at : at + 4], "big")
                found.append(sequence.open(answer[at + 4 : at + 4 + length]) if length else b"")
                at += 4 + length
            return b"".join(found)

        framed = len(sealed).to_bytes(4, "big") + sealed
        header = f"{ehbp.REQUEST_HEADER}: {enc.hex()}\r\n"
        return post(PATH, framed, "application/json", header), opened

    return request


class Connection:
    """One kept connection."""

    def __init__(self, arm: Arm) -> None:
        self._arm = arm

    async def open(self) -> None:
        self._reader, self._writer = await asyncio.open_connection(
            "127.0.0.1", self._arm.port, ssl=self._arm.context, limit=1 << 20
        )

    async def begin(self, request: bytes) -> bytes:
        """Sends a request and returns the answer's head. Raises `RuntimeError` for any status but 200."""
        self._writer.write(request)
        head = await self._reader.readuntil(b"\r\n\r\n")
        if b" 200 " not in head[:16]:
            raise RuntimeError(f"{self._arm.name} answered {head[:80]!r}")
        return head

    async def drain(self, keep: bool = False) -> bytes:
        """Reads to the answer's end. Returns its bytes if `keep` is set, else none."""
        tail, kept = b"\r\n", []
        while not tail.endswith(_END):
            data = await self._reader.read(1 << 18)
            if not data:
                raise RuntimeError(f"{self._arm.name} cut an answer")
            tail = (tail + data)[-len(_END) :]
            if keep:
                kept.append(data)
        return b"".join(kept)

    def close(self) -> None:
        self._writer.transport.abort()


def _joined(data: bytes) -> bytes:
    """HTTP's chunks without their framing."""
    found, at = [], 0
    while length := int(data[at : (line := data.index(b"\r\n", at))], 16):
        found.append(data[line + 2 : line + 2 + length])
        at = line + 4 + length
    return b"".join(found)


async def check(arm: Arm) -> None:
    """Opens one whole answer of `arm`. Raises `RuntimeError` if it is not what the engine sent."""
    request, opened = arm.request(body(50, 1, 1))
    connection = Connection(arm)
    await connection.open()
    head = await connection.begin(request)
    answer = opened(head, _joined(await connection.drain(keep=True)))
    connection.close()
    # Peers may rewrite the JSON, so only the words count.
    events = answer.count(b'"content":"word"')
    if events != 50 or b"[DONE]" not in answer:
        raise RuntimeError(f"{arm.name} passed on {events} of 50 events")
