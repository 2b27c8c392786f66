"""Constant answers on the wire: a slow engine, a fast one, an error and a list cannot be told apart."""

import asyncio
import base64
import hashlib
import json
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pytest

from adytum.inference.channel import bhttp, ehbp, hpke, keyconfig, ohttp
from adytum.inference.channel.bhttp import Content, Trailers
from adytum.inference.channel.exchange import OuterHead
from adytum.inference.channel.receipts import TRAILER, Receipt
from adytum.inference.channel.shaping import Cells
from adytum.inference.core.config import parse
from adytum.inference.gateway.edge.app import GATEWAY_PATH
from adytum.inference.gateway.exchange.shaping import FIRST_SLOT_TICKS, Paced
from tests.serving import VirtualLoop
from tests.support import config_text, open_answer, seal
from tests.unit.channel.support import server_sent_events
from tests.unit.gateway.support import RunningGateway, event, running_gateway

MODEL = "demo/llama-awq"
CADENCE = 0.02
SIZE = 512
LEAST = 16
ATTEMPTS = 40
"""A busy machine is late now and then, but not so often in a row."""


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningGateway]:
    folder = tmp_path_factory.mktemp("gateway")
    shape = f'"constant"\ncadence_ms = {CADENCE * 1000:g}\nchunk_bytes = {SIZE}\nleast_chunks = {LEAST}'
    config = parse(config_text(port=0, runtime=folder, changes={"padding": shape}).encode())
    with running_gateway(config, folder) as running:
        yield running


@dataclass
class Seen:
    """What the network saw: the length of the head, the writes of the body and when they came, in seconds."""

    head: int
    sizes: list[int]
    times: list[float]
    body: bytes

    @property
    def shape(self) -> tuple[int, tuple[int, ...]]:
        return self.head, tuple(self.sizes)


def observe(gateway: RunningGateway, path: str, body: bytes, headers: dict[str, str]) -> Seen:
    """One request by hand. HTTP's own chunks are the gateway's writes; their times are those of the reads."""
    lines = [
        f"POST {path} HTTP/1.1",
        "Host: x",
        f"Content-Length: {len(body)}",
        *(f"{k}: {v}" for k, v in headers.items()),
    ]
    with socket.create_connection(("127.0.0.1", gateway.port), timeout=20) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        start = time.monotonic()
        connection.sendall("\r\n".join(lines).encode() + b"\r\n\r\n" + body)
        data, marks = b"", list[tuple[int, float]]()
        while not data.endswith(b"\r\n0\r\n\r\n"):
            piece = connection.recv(65_536)
            assert piece, data[:200]
            data += piece
            marks.append((len(data), time.monotonic() - start))
    head, _, rest = data.partition(b"\r\n\r\n")
    assert b"content-length" not in head.lower()
    seen = Seen(len(head), [], [], b"")
    at = len(head) + 4
    while (end := data.index(b"\r\n", at)) and (size := int(data[at:end], 16)):
        seen.sizes.append(size)
        seen.body += data[end + 2 : end + 2 + size]
        at = end + 2 + size + 2
        seen.times.append(next(when for length, when in marks if length >= at))
    assert rest
    return seen


def over_ohttp(
    gateway: RunningGateway, body: Any, media: ohttp.Media = ohttp.CHUNKED, **more: Any
) -> tuple[Seen, ohttp.RequestSealer]:
    sealer = ohttp.RequestSealer(media, gateway.configuration())
    sealed = seal(sealer, body, media=media, **more)
    return observe(gateway, GATEWAY_PATH, sealed, {"Content-Type": media.request}), sealer


def over_ehbp(gateway: RunningGateway, body: Any) -> Seen:
    _, _, raw = gateway.request("GET", "/.well-known/hpke-keys")
    key = keyconfig.KeyConfiguration.decode(raw).public_key
    enc, context = hpke.setup_sender(ehbp.SUITE, key, b"ehbp request")
    sealed = context.seal(json.dumps(body).encode())
    headers = {"Ehbp-Encapsulated-Key": enc.hex(), "Content-Type": "application/json"}
    return observe(gateway, "/v1/chat/completions", len(sealed).to_bytes(4, "big") + sealed, headers)


def chat(script: str = "hello", **more: Any) -> dict[str, Any]:
    return {"model": MODEL, "messages": [{"role": "user", "content": script}], **more}


SHORT: dict[str, Any] = {
    "fast": chat(stream=True, events=40),
    "slow": chat(stream=True, events=12, gap=0.02),
    "one event": chat(stream=True, events=1),
    "none": chat(stream=True, events=0),
    "in two bursts": chat(stream=True, events=2, gap=0.15),
    "cut by its engine": chat("die mid-stream", stream=True, events=9),
    "whole": chat(),
    "an engine's refusal": chat("error"),
    "an engine that dies": chat("die"),
    "a model that is not there": chat() | {"model": "none"},
    "another model that is not there": chat(stream=True) | {"model": "none"},
}


@pytest.mark.parametrize("protocol", ["ohttp", "ehbp"])
def test_answers_that_fit_into_the_least_look_the_same(gateway: RunningGateway, protocol: str) -> None:
    def ask(body: Any) -> Seen:
        return over_ehbp(gateway, body) if protocol == "ehbp" else over_ohttp(gateway, body)[0]

    with ThreadPoolExecutor(len(SHORT)) as pool:
        seen = dict(zip(SHORT, pool.map(ask, SHORT.values()), strict=True))
    for name, one in seen.items():
        assert one.sizes == [SIZE] * LEAST, name
    assert len({one.shape for one in seen.values()}) == 1, seen


@pytest.mark.parametrize("name", ["fast", "slow", "none", "whole", "a model that is not there"])
def test_one_cell_leaves_at_each_tick(gateway: RunningGateway, name: str) -> None:
    for _ in range(ATTEMPTS):
        seen, _ = over_ohttp(gateway, SHORT[name])
        # From the opening, which comes a moment after sending, the first cell waits for the first slot.
        late = [when - CADENCE * (FIRST_SLOT_TICKS + at) for at, when in enumerate(seen.times)]
        assert min(late) > -0.001, "a cell left before its tick"
        if max(late) - min(late) < 0.5 * CADENCE:
            return
    pytest.fail(f"some cell was late each time: {late}")


def test_an_engine_that_is_slower_than_the_least_shows_a_doubled_number(gateway: RunningGateway) -> None:
    asked = [chat(stream=True, events=8, gap=gap) for gap in (0.05, 0.06, 0.07)]
    for _ in range(ATTEMPTS):
        with ThreadPoolExecutor(len(asked)) as pool:
            counts = {len(seen.sizes) for seen, _ in pool.map(lambda body: over_ohttp(gateway, body), asked)}
        # An engine that is held up for longer is slower than the next number too, and shows that.
        assert counts <= {2 * LEAST, 4 * LEAST, 8 * LEAST}
        if counts == {2 * LEAST}:
            return
    pytest.fail(f"never the same number for all: {counts}")


def test_a_whole_answer_that_takes_long_shows_its_slot_only(gateway: RunningGateway) -> None:
    for _ in range(ATTEMPTS):
        seen, _ = over_ohttp(gateway, chat("later", wait=0.1))
        assert seen.sizes == [SIZE] * LEAST
        assert seen.times[0] >= 2 * FIRST_SLOT_TICKS * CADENCE - 0.001
        if seen.times[0] < 3 * FIRST_SLOT_TICKS * CADENCE:
            return
    pytest.fail(f"never in the slot after: {seen.times[0]}")


def test_a_longer_whole_answer_has_a_doubled_number_of_cells(gateway: RunningGateway) -> None:
    seen, sealer = over_ohttp(gateway, chat(size=10_000))
    assert seen.sizes == [SIZE] * 2 * LEAST
    assert len(open_answer(sealer, seen.body).json()["pad"]) == 10_000


@pytest.mark.parametrize("name", ["fast", "slow", "in two bursts", "none"])
def test_the_client_reads_the_same_events_and_a_receipt_for_them(gateway: RunningGateway, name: str) -> None:
    body = SHORT[name]
    seen, sealer = over_ohttp(gateway, body)
    opener, decoder = sealer.response(), bhttp.Decoder("response")
    found = decoder.feed(opener.feed(seen.body) + opener.finish()) + decoder.finish()
    content = b"".join(item.data for item in found if isinstance(item, Content))
    events = b"".join(event(i) for i in range(body["events"])) + b"data: [DONE]\n\n"
    assert server_sent_events(content) == server_sent_events(events)
    trailers = next(item for item in found if isinstance(item, Trailers)).fields
    status, _, raw = gateway.request("GET", f"/.well-known/attestation?nonce={'00' * 32}")
    assert status == 200
    claims = json.loads(base64.b64decode(json.loads(raw)["claims"]))
    receipt = Receipt.verify(dict(trailers)[TRAILER], bytes.fromhex(claims["receipt_key"]))
    assert receipt.response == hashlib.sha256(content).digest()


def test_a_whole_form_answer_leaves_in_cells_too(gateway: RunningGateway) -> None:
    seen, sealer = over_ohttp(gateway, chat(), ohttp.WHOLE)
    assert seen.sizes == [SIZE] * LEAST
    assert open_answer(sealer, seen.body).json()["said"] == "hello"


def test_an_engine_that_is_cut_is_told_in_the_last_cells(gateway: RunningGateway) -> None:
    seen, sealer = over_ohttp(gateway, SHORT["cut by its engine"])
    events = server_sent_events(open_answer(sealer, seen.body).content)
    assert [data for _, data, _ in events][:2] == [event(i)[6:-2].decode() for i in range(2)]
    assert json.loads(events[-1][1])["error"]["code"] == "engine_failed"


def test_the_engine_is_free_before_the_last_cell_left(gateway: RunningGateway) -> None:
    pool = gateway.sealed._engines
    sealer = ohttp.RequestSealer(ohttp.CHUNKED, gateway.configuration())
    sealed = seal(sealer, SHORT["one event"])
    head = f"POST {GATEWAY_PATH} HTTP/1.1\r\nHost: x\r\nContent-Type: {ohttp.CHUNKED.request}\r\n"
    with socket.create_connection(("127.0.0.1", gateway.port), timeout=20) as connection:
        connection.sendall(head.encode() + f"Content-Length: {len(sealed)}\r\n\r\n".encode() + sealed)
        data, free_at = b"", None
        while not data.endswith(b"\r\n0\r\n\r\n"):
            data += connection.recv(1)
            if free_at is None and pool.in_progress(MODEL) == 0:
                free_at = len(data)
    assert free_at is not None
    assert free_at < len(data) - SIZE, "it was held until the last cell"


def test_a_client_that_leaves_ends_the_generation(gateway: RunningGateway) -> None:
    aborted = gateway.engine.aborted
    sealer = ohttp.RequestSealer(ohttp.CHUNKED, gateway.configuration())
    sealed = seal(sealer, chat(stream=True, events=10_000, gap=0.01))
    head = f"POST {GATEWAY_PATH} HTTP/1.1\r\nHost: x\r\nContent-Type: {ohttp.CHUNKED.request}\r\n"
    with socket.create_connection(("127.0.0.1", gateway.port), timeout=20) as connection:
        connection.sendall(head.encode() + f"Content-Length: {len(sealed)}\r\n\r\n".encode() + sealed)
        assert connection.recv(65_536)
    until = time.monotonic() + 20
    while gateway.engine.aborted == aborted and time.monotonic() < until:
        time.sleep(0.01)
    assert gateway.engine.aborted == aborted + 1


@pytest.mark.slow
def test_a_fast_engine_waits_for_its_cells(gateway: RunningGateway) -> None:
    """More than the cells take in that time stays with the engine, not in the gateway."""
    seen, sealer = over_ohttp(gateway, chat(stream=True, events=500))
    events = server_sent_events(open_answer(sealer, seen.body).content)
    assert len(events) == 501
    assert len(seen.sizes) == 4 * LEAST
    assert set(seen.sizes) == {SIZE}


def test_a_tick_that_was_missed_is_not_made_up_for() -> None:
    async def run() -> list[float]:
        loop, sent = asyncio.get_running_loop(), list[float]()

        async def send(message: Any) -> None:
            sent.append(loop.time())
            if len(sent) == 3:
                await asyncio.sleep(0.11)  # A client that does not read.

        paced = Paced(send, Cells(256, 4, 0.02))
        await paced.whole((OuterHead(200, ()), bytes(256 * 8)))
        return sent

    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        sent = runner.run(run())
    assert len(sent) == 9
    gaps = [b - a for a, b in pairwise(sent[1:])]
    assert max(gaps) > 0.1
    assert min(gaps) > 0.0199, "cells left together"
