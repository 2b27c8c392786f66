"""The measurements: the CPU time of one process for the events and requests that it carried."""

import asyncio
import time
from dataclasses import dataclass

from adytum.benchmarks.channel.arms import Arm, Connection, body
from adytum.benchmarks.processes import cpu, memory
from adytum.inference.channel import hpke
from adytum.inference.channel.hpke import AeadId, KdfId, KemId, Suite


@dataclass(frozen=True)
class Load:
    """Concurrent streams of `events` each, `batch` of them in one write, `gap_ms` between writes."""

    streams: int
    events: int
    gap_ms: int
    batch: int

    @property
    def few(self) -> int:
        """Events of the short answers: one write's, and at least a tenth of all."""
        return max(self.batch, self.events // 10)


async def chunks(arm: Arm, load: Load) -> tuple[float, float]:
    """(CPU seconds of the arm's process per event, events per second of wall time).

    The slope between answers with all events and with a few, so that the cost of the request itself is not included.
    """
    connections = await _connected(arm, load.streams)
    try:
        few, _ = await _streamed(arm, connections, load, load.few)
        many, wall = await _streamed(arm, connections, load, load.events)
    finally:
        _close(connections)
    return slope(few, many, load), load.streams * load.events / wall


def slope(few: float, many: float, load: Load) -> float:
    """CPU seconds per event, from the totals of all streams with few and with all their events."""
    return (many - few) / (load.streams * (load.events - load.few))


async def _streamed(arm: Arm, connections: list[Connection], load: Load, events: int) -> tuple[float, float]:
    """(CPU seconds, seconds of wall time) of one answer of `events` events on each connection."""
    requests = [arm.request(body(events, load.gap_ms, load.batch))[0] for _ in connections]
    before, start = cpu(arm.pid), time.perf_counter()
    await asyncio.gather(*map(_once, connections, requests))
    return cpu(arm.pid) - before, time.perf_counter() - start


async def opens(arm: Arm, requests: int, at_once: int) -> tuple[float, float]:
    """(CPU seconds per request with one event, requests per second of wall time), on kept-alive connections."""
    connections = await _connected(arm, at_once)
    rounds = [[arm.request(body(1, 0, 1))[0] for _ in range(requests // at_once)] for _ in connections]

    async def work(connection: Connection, mine: list[bytes]) -> None:
        for request in mine:
            await _once(connection, request)

    try:
        before, start = cpu(arm.pid), time.perf_counter()
        await asyncio.gather(*map(work, connections, rounds))
        used, wall = cpu(arm.pid) - before, time.perf_counter() - start
    finally:
        _close(connections)
    done = at_once * (requests // at_once)
    return used / done, done / wall


async def idle(arm: Arm, streams: int) -> tuple[float, float]:
    """Bytes per open stream that waits for its second event: the growth of (RSS, PSS)."""
    before = memory(arm.pid)
    connections: list[Connection] = []
    try:
        # A few at a time: the lasting memory counts, not a burst's.
        for at in range(0, streams, 50):
            some = await _connected(arm, min(50, streams - at))
            connections += some
            requests = [arm.request(body(2, 120_000, 1))[0] for _ in some]
            await asyncio.gather(*(c.begin(r) for c, r in zip(some, requests, strict=True)))
        await asyncio.sleep(1)
        after = memory(arm.pid)
    finally:
        _close(connections)
    await asyncio.sleep(1)
    return (after[0] - before[0]) / streams, (after[1] - before[1]) / streams


def kem(which: KemId) -> float:
    """CPU seconds of one decapsulation with its key schedule, which every request needs: the minimum of 30."""
    suite = Suite(which, KdfId.HKDF_SHA256, AeadId.AES_256_GCM)
    key = hpke.generate(which)
    return min(_thread_time(suite, key) for _ in range(30))


def _thread_time(suite: Suite, key: hpke.PrivateKey) -> float:
    enc, _ = hpke.setup_sender(suite, key.public_bytes, b"x")
    start = time.thread_time_ns()
    hpke.setup_recipient(suite, key, enc, b"x")
    return (time.thread_time_ns() - start) / 1e9


async def _connected(arm: Arm, count: int) -> list[Connection]:
    connections = [Connection(arm) for _ in range(count)]
    await asyncio.gather(*(connection.open() for connection in connections))
    return connections


async def _once(connection: Connection, request: bytes) -> None:
    await connection.begin(request)
    await connection.drain()


def _close(connections: list[Connection]) -> None:
    for connection in connections:
        connection.close()


def per_core(seconds: float) -> float:
    """Operations per second on one core, if one takes `seconds` of CPU."""
    return 1 / seconds if seconds > 0 else float("nan")
