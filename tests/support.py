"""Helpers that several test packages use: the demo's configuration changed, and a client that seals by hand."""

import hashlib
import http.client
import json
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adytum.inference.channel import bhttp, keyconfig, ohttp
from adytum.inference.channel.bhttp import Content, RequestHead, ResponseHead
from adytum.inference.channel.hpke import KemId
from adytum.inference.gateway.edge.app import GATEWAY_PATH

ROOT = Path(__file__).resolve().parent.parent


def config_text(
    *, port: int, runtime: Path, api_keys: list[str] | None = None, changes: dict[str, str] | None = None
) -> str:
    """The demo's configuration on another port and folder. `changes`: whole lines by their name."""
    text = (ROOT / "deploy" / "config" / "demo.toml").read_text()
    lines = {"port": str(port), "runtime_directory": f'"{runtime}"', **(changes or {})}
    if api_keys:
        digests = ", ".join(f'"{hashlib.sha256(key.encode()).hexdigest()}"' for key in api_keys)
        lines["authentication"] = f'"keys"\nkey_sha256 = [{digests}]'
    for name, value in lines.items():
        text, count = re.subn(rf"(?m)^{name} = .*$", lambda _, n=name, v=value: f"{n} = {v}", text)
        assert count == 1, name
    return text


def backend_command(config: Path) -> list[str]:
    """`adytum serve`, whose coverage is counted if this run's is."""
    module = "tests.counted" if "COVERAGE_PROCESS_CONFIG" in os.environ else "adytum.inference"
    return [sys.executable, "-m", module, "serve", "--config", str(config)]


@dataclass
class Wire:
    """The backend on a port of loopback, as the network sees it."""

    port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def configuration(self, kem: KemId = KemId.MLKEM768_X25519) -> keyconfig.KeyConfiguration:
        """The announced configuration, fetched as a client does."""
        status, _, body = self.request("GET", GATEWAY_PATH)
        assert status == 200
        return next(item for item in keyconfig.decode_list(body) if item.kem is kem)

    def request(
        self, method: str, path: str, body: bytes = b"", headers: dict[str, str] | None = None
    ) -> tuple[int, dict[str, str], bytes]:
        """A plain HTTP request."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        try:
            connection.request(method, path, body or None, headers or {})
            answer = connection.getresponse()
            return answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read()
        finally:
            connection.close()


@dataclass
class Answer:
    """An opened answer."""

    status: int
    fields: bhttp.Fields
    content: bytes
    wire: bytes

    def json(self) -> Any:
        return json.loads(self.content)


def sealed_chat(
    gateway: Wire,
    body: Any,
    *,
    path: str = "/v1/chat/completions",
    method: str = "POST",
    media: ohttp.Media = ohttp.CHUNKED,
    kem: KemId = KemId.MLKEM768_X25519,
    fields: bhttp.Fields = (),
) -> Answer:
    """One sealed request, opened by hand. `body`: bytes, or anything for JSON."""
    sealer = ohttp.RequestSealer(media, gateway.configuration(kem))
    status, headers, wire = gateway.request(
        "POST", GATEWAY_PATH, seal(sealer, body, path, method, media, fields), {"Content-Type": media.request}
    )
    assert status == 200, (status, wire)
    assert headers["content-type"] == media.response
    return open_answer(sealer, wire)


def seal(
    sealer: ohttp.RequestSealer,
    body: Any,
    path: str = "/v1/chat/completions",
    method: str = "POST",
    media: ohttp.Media = ohttp.CHUNKED,
    fields: bhttp.Fields = (),
) -> bytes:
    """The sealed request's bytes."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    fields = ((b"content-type", b"application/json"), *fields)
    message = bhttp.encode(RequestHead(method, "https", "backend", path, fields), content)
    return sealer.start() + sealer.final(message) if media.chunked else sealer.whole(message)


def open_answer(sealer: ohttp.RequestSealer, wire: bytes) -> Answer:
    """Opens a whole answer's bytes. Raises `ChannelError`."""
    opener = sealer.response()
    decoder = bhttp.Decoder("response")
    events = decoder.feed(opener.feed(wire)) + decoder.feed(opener.finish()) + decoder.finish()
    head = events[0]
    assert isinstance(head, ResponseHead)
    return Answer(head.status, head.fields, b"".join(e.data for e in events if isinstance(e, Content)), wire)
