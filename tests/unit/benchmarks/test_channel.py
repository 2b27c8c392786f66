"""The gate: what a chunk costs the channel, as a multiple of sealing the same bytes, measured in turns in one thread.

A ratio, not a time, so that a slow machine fails nothing; `channel_limits.json` has the limit.
"""

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from adytum.benchmarks.channel.engine import EVENT
from adytum.inference.channel import bhttp, ohttp
from adytum.inference.channel.bhttp import RequestHead
from adytum.inference.channel.exchange import Exchange
from adytum.inference.channel.openings import OhttpOpening
from adytum.inference.channel.padding import Padding
from adytum.inference.gateway.keys import KeyRing

LIMIT = json.loads((Path(__file__).parent / "channel_limits.json").read_text())[
    "sealed chunk over AES-GCM of the same bytes"
]
ROUNDS, CHUNKS = 25, 400


def exchange() -> Exchange:
    """An opened request whose streamed answer has begun."""
    keys = KeyRing(time.time, 3600, 600)
    sealer = ohttp.RequestSealer(ohttp.CHUNKED, keys.configurations[0])
    opening = OhttpOpening(ohttp.CHUNKED, keys.find, Padding.PAD)
    opening.feed(sealer.start() + sealer.final(bhttp.encode(RequestHead("POST", "https", "b", "/v1/x", ()), b"{}")))
    opened = opening.open()
    opened.request()
    opened.begin(200, ((b"content-type", b"text/event-stream"),))
    return opened


def ratio(data: Callable[[bytes], object]) -> float:
    """The median over rounds of (CPU of `data` over CPU of AES-GCM), each round's two beside each other."""
    key, nonce = AESGCM(bytes(32)), bytes(12)
    found = []
    for _ in range(ROUNDS):
        start = time.thread_time_ns()
        for _ in range(CHUNKS):
            data(EVENT)
        middle = time.thread_time_ns()
        for _ in range(CHUNKS):
            key.encrypt(nonce, EVENT, None)
        found.append((middle - start) / (time.thread_time_ns() - middle))
    return statistics.median(found)


@pytest.mark.usefixtures("untraced")
def test_a_chunk_costs_no_more_than_it_did() -> None:
    assert ratio(exchange().data) <= LIMIT


@pytest.mark.usefixtures("untraced")
def test_the_gate_sees_a_path_twice_as_slow() -> None:
    """Half as slow again is seen too on a quiet machine; on a busy one AES-GCM grows dearer beside it."""
    first, second = exchange(), exchange()

    def slow(event: bytes) -> None:
        first.data(event)
        second.data(event)

    assert ratio(slow) > LIMIT
