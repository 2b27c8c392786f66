"""Fuzz targets: each is one sentence that must hold for any bytes. A target returns if it holds, else raises.

`python -m tests.fuzz TARGET` looks for bytes that break one, guided by coverage (needs atheris);
`test_corpus.py` runs what was found before, and random bytes, in the ordinary run.
"""

import asyncio
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from adytum.inference.channel import bhttp, ehbp, hpke, keyconfig, ohttp
from adytum.inference.channel.bhttp import Content, Event, RequestHead, ResponseHead, Trailers
from adytum.inference.channel.errors import ChannelError
from adytum.inference.channel.exchange import InnerRequest
from adytum.inference.channel.hpke import KemId
from adytum.inference.channel.keyconfig import KeyConfiguration
from adytum.inference.channel.limits import Limits
from adytum.inference.channel.receipts import Receipt
from adytum.inference.core.config import parse
from adytum.inference.gateway.admission import images
from adytum.inference.gateway.admission.admission import ROUTES, Admission, EngineCall
from adytum.inference.gateway.admission.rewrite import REFUSED
from adytum.inference.gateway.callers.callers import Callers
from adytum.inference.gateway.edge.evidence import EvidenceService
from adytum.inference.gateway.failures import Refused

LIMITS = Limits(message=4096, chunk=2048, frame=2064, chunks=64, control=512, field_lines=8, field_section=512)
_KEY = hpke.generate(KemId.X25519)
_CONFIGURATION = KeyConfiguration(1, KemId.X25519, _KEY.public_bytes)
_ROOT = Path(__file__).resolve().parents[2]
_ADMISSION = Admission(
    parse((_ROOT / "deploy" / "config" / "demo.toml").read_bytes()),
    Callers(None, clock=lambda: 0.0, monotonic=lambda: 0.0),
)


class Broken(Exception):
    """The sentence does not hold."""


def binary_http(data: bytes) -> None:
    """A message decodes the same whole and byte by byte, into events that encode to what decodes to them again; only a
    `ChannelError` escapes."""
    if not data:
        return
    kind: Any = "request" if data[0] & 1 else "response"
    data = data[1:]
    whole = _decoded(kind, (data,))
    if whole != _decoded(kind, (data[i : i + 1] for i in range(len(data)))):
        raise Broken("byte by byte it reads otherwise")
    if isinstance(whole, type):
        return
    head, content, trailers = whole
    if _decoded(kind, (bhttp.encode(head, content, trailers),)) != whole:
        raise Broken("the known-length form does not come back")
    indeterminate = bhttp.encode_head(head) + bhttp.encode_content(content) + bhttp.encode_end(trailers)
    if _decoded(kind, (indeterminate,)) != whole:
        raise Broken("the indeterminate form does not come back")


def ohttp_framing(data: bytes) -> None:
    """A chunked request, well sealed or changed, opens the same in any pieces to the plaintext that was sealed, or
    gives a `ChannelError`; it never opens to anything else."""
    plan = _Plan(data)
    sealer = ohttp.RequestSealer(ohttp.CHUNKED, _CONFIGURATION)
    plain, parts = b"", [sealer.start()]
    for size in plan.sizes():
        piece = plan.take(size)
        if piece:
            parts.append(sealer.chunk(piece))
            plain += piece
    last = plan.take(plan.byte())
    parts.append(sealer.final(last))
    _opens_or_fails(plan, parts, plain + last, lambda: ohttp.RequestOpener(ohttp.CHUNKED, _find, LIMITS))


def ehbp_framing(data: bytes) -> None:
    """The same for an EHBP body, whose end its protocol leaves open: it opens to a prefix of what was sealed, at a
    frame's boundary."""
    plan = _Plan(data)
    header, context = hpke.setup_sender(ehbp.SUITE, _KEY.public_bytes, b"ehbp request")
    plain, parts, ends = b"", [], {b""}
    for size in plan.sizes():
        piece = plan.take(size)
        if piece:
            sealed = context.seal(piece)
            parts.append(len(sealed).to_bytes(4, "big") + sealed)
            plain += piece
            ends.add(plain)
        else:
            parts.append(bytes(4))
    _opens_or_fails(plan, parts, ends, lambda: ehbp.RequestOpener(header.hex(), (_KEY,), LIMITS))


def json_admission(data: bytes) -> None:
    """Whatever a caller sends inside the seal, what reaches an engine is JSON with our `cache_salt` and no field that
    is refused, on a path of the list; anything else ends in `Refused`."""
    path, _, body = data.partition(b"\n")
    name = path.decode("latin-1")
    for text in (name, *ROUTES):
        try:
            asked = _ADMISSION.admit(InnerRequest("POST", text, ((b"content-type", b"application/json"),), body))
        except Refused as refused:
            json.loads(refused.refusal.body())
            continue
        if not isinstance(asked, EngineCall) or asked.path not in ROUTES:
            raise Broken("a path that is not on the list")
        document = json.loads(asked.body, object_pairs_hook=_unique)
        if len(document["cache_salt"]) != 64 or any(document.get(field) for field in REFUSED):
            raise Broken("a refused field, or no salt")


def image_size(data: bytes) -> None:
    """Bytes are an image of four kinds with a size, or `BadImage`. Bytes after an image, like the salt, change neither,
    and the beginning of an image has its size or none."""
    found = _image(data)
    if found is None:
        return
    if found.kind not in ("png", "jpeg", "gif", "webp") or not found.pixels > 0:
        raise Broken("an image without a kind or a size")
    if _image(data + b"5a" * 32) != found:
        raise Broken("bytes after it change it")
    if _image(data[: len(data) // 2]) not in (None, found):
        raise Broken("its beginning reads otherwise")


def evidence_query(data: bytes) -> None:
    """A query that is not `nonce=` and 64 lower-case hexadecimal digits is answered 400 with the fixed text, and no
    device is asked."""
    asyncio.run(_asks(data))


def key_list(data: bytes) -> None:
    """A list of key configurations reads to configurations that encode to what reads to them, or is refused whole."""
    try:
        found = keyconfig.decode_list(data)
    except ChannelError:
        return
    if found and tuple(keyconfig.decode_list(keyconfig.encode_list(tuple(found)))) != tuple(found):
        raise Broken("it does not come back")


def receipt(data: bytes) -> None:
    """No bytes that the key has not signed are a receipt; only a `ChannelError` escapes."""
    try:
        Receipt.verify(data, _SIGNER)
    except ChannelError:
        return
    raise Broken("a forged receipt")


TARGETS: dict[str, Callable[[bytes], None]] = {
    target.__name__: target
    for target in (
        *(binary_http, ohttp_framing, ehbp_framing, json_admission),
        *(image_size, evidence_query, key_list, receipt),
    )
}
_SIGNER = bytes.fromhex("d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a")
"""A public key of RFC 8032, 7.1, whose private one is not used here."""


def _decoded(kind: Any, pieces: Any) -> Any:
    """(head, content, trailers), or the type of the error."""
    decoder = bhttp.Decoder(kind, LIMITS)
    events: list[Event] = []
    try:
        for piece in pieces:
            events += decoder.feed(piece)
        events += decoder.finish()
    except ChannelError as error:
        return type(error)
    heads = [event for event in events if isinstance(event, RequestHead | ResponseHead)]
    if len(heads) != 1 or heads[0] is not events[0]:
        raise Broken("not one head, first")
    content = b"".join(event.data for event in events if isinstance(event, Content))
    trailers = next((event.fields for event in events if isinstance(event, Trailers)), ())
    return heads[0], content, trailers


class _Plan:
    """Turns a fuzzer's bytes into a message and what the network does to it."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def byte(self) -> int:
        self._at += 1
        return self._data[self._at - 1] if self._at <= len(self._data) else 0

    def take(self, size: int) -> bytes:
        self._at += size
        return self._data[self._at - size : self._at]

    def sizes(self) -> Iterator[int]:
        for _ in range(self.byte() % 6):
            yield self.byte() * 5

    def bend(self, parts: list[bytes]) -> bytes:
        """The parts as they arrive: left, swapped, doubled, dropped, or with bytes changed, cut off, added."""
        parts = list(parts)
        for _ in range(self.byte() % 4):
            way, at = self.byte() % 7, self.byte()
            if way in (0, 1, 2) and len(parts) > 1:
                at %= len(parts)
                if way == 0:
                    parts[at], parts[at - 1] = parts[at - 1], parts[at]
                elif way == 1:
                    parts.insert(at, parts[at])
                else:
                    del parts[at]
            elif way in (3, 4):
                whole = bytearray(b"".join(parts))
                if whole:
                    place = (at * 256 + self.byte()) % len(whole)
                    whole[place] ^= self.byte() if way == 3 else 1 << self.byte() % 8
                parts = [bytes(whole)]
            elif way == 5:
                whole = bytearray(b"".join(parts))
                parts = [bytes(whole[: len(whole) - at])]
            else:
                parts.append(self.take(at))
        return b"".join(parts)


def _opens_or_fails(plan: _Plan, parts: list[bytes], plain: bytes | set[bytes], opener: Callable[[], Any]) -> None:
    honest = b"".join(parts)
    wire = plan.bend(parts)
    step = plan.byte() + 1
    found = _opened(opener(), (wire,))
    if found != _opened(opener(), (wire[i : i + step] for i in range(0, len(wire), step))):
        raise Broken("in pieces it opens otherwise")
    allowed = plain if isinstance(plain, set) else {plain}
    if isinstance(found, bytes) and found not in allowed:
        raise Broken("it opened to what was not sealed")
    whole = plain if isinstance(plain, bytes) else max(plain, key=len)
    if wire == honest and isinstance(found, type) and whole and len(whole) <= LIMITS.message:
        raise Broken("an honest message was refused")


def _opened(opener: Any, pieces: Any) -> bytes | type:
    try:
        for piece in pieces:
            opener.feed(piece)
        plain: bytes = opener.finish()[0]
        return plain
    except ChannelError as error:
        return type(error)


def _image(data: bytes) -> images.Image | None:
    try:
        return images.read(data)
    except images.BadImage:
        return None


def _find(key_id: int) -> Any:
    if key_id != 1:
        raise ohttp.UnknownKey("no such key")
    return _CONFIGURATION, _KEY


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({name for name, _ in pairs}) != len(pairs):
        raise Broken("a name stands twice")
    return dict(pairs)


class _NeverAsked:
    def collect(self, claims: object, nonces: object) -> Any:
        raise Broken("a device was asked")


async def _asks(query: bytes) -> None:
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        return {"type": "http.request", "body": b"", "more_body": False}

    service = EvidenceService(_NeverAsked(), lambda: None, refusal_seconds=0)  # type: ignore[arg-type, return-value]
    scope: Any = {"type": "http", "method": "GET", "path": "/", "query_string": query, "headers": []}
    is_good = len(query) == 70 and query[:6] == b"nonce=" and not set(query[6:]) - set(b"0123456789abcdef")
    if is_good:
        return
    await service.handle(scope, receive, send)
    if sent[0]["status"] != 400 or b"A nonce of 64" not in sent[1]["body"]:
        raise Broken("another answer than the fixed one")
