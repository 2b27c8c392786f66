"""What a wrong API key costs: the client's sealing against the gateway's opening, look-up and refusal.

    python -m adytum.benchmarks.parts.refusals [--repetitions 300]

One thread, no network. Both sides run this project's code; in C both would be cheaper. Microseconds of CPU time,
medians; sizes alternate, so that a slow moment of the machine affects all of them.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import TypeVar

from adytum.inference.channel import bhttp, ohttp
from adytum.inference.channel.bhttp import RequestHead
from adytum.inference.channel.exchange import Exchange
from adytum.inference.channel.hpke import KemId
from adytum.inference.channel.keyconfig import KeyConfiguration
from adytum.inference.channel.openings import OhttpOpening
from adytum.inference.channel.padding import Padding
from adytum.inference.gateway.callers.callers import Caller, Callers
from adytum.inference.gateway.exchange.reading import FIRST
from adytum.inference.gateway.failures import Refused
from adytum.inference.gateway.keys import KeyRing

_SIZES = (1024, 65_536, 1024 * 1024)
_PIECE = 16_384
"""Bytes; the client library splits a request into pieces of this size."""
_T = TypeVar("_T")


class _Bench:
    def __init__(self) -> None:
        self.keys = KeyRing(time.time, 3600, 600)
        known = tuple(Caller(name=f"caller-{i}", key_sha256=f"{i:064x}") for i in range(1, 1001))
        self.callers = Callers(known, clock=time.time, monotonic=time.monotonic)

    def client(self, configuration: KeyConfiguration, size: int) -> bytes:
        head = RequestHead("POST", "https", "b", "/v1/chat/completions", ((b"authorization", b"Bearer sk-wrong"),))
        sealer = ohttp.RequestSealer(ohttp.CHUNKED, configuration)
        message = bhttp.encode(head, bytes(size))
        pieces = [message[at : at + _PIECE] for at in range(0, len(message), _PIECE)]
        return b"".join((sealer.start(), *map(sealer.chunk, pieces[:-1]), sealer.final(pieces[-1])))

    def gateway(self, sealed: bytes) -> tuple[Exchange, Refused]:
        opening = OhttpOpening(ohttp.CHUNKED, self.keys.find, Padding.PAD)
        for at in range(0, len(sealed), FIRST):
            opening.feed(sealed[at : at + FIRST])
            if (fields := opening.fields()) is not None:
                break
        exchange = opening.open() if fields is None else opening.abandon()
        self.keys.spend(exchange.enc, exchange.recipient, lambda: None)
        try:
            self.callers.authenticate(fields or exchange.request().fields)
        except Refused as refused:
            return exchange, refused
        raise AssertionError("a wrong key was accepted")

    def refusal(self, exchange: Exchange, refused: Refused) -> bytes:
        refusal = refused.refusal
        return exchange.answer(refusal.status, refusal.fields(), refusal.body())[1]


def _timed(work: Callable[[], _T], times: list[float]) -> _T:
    start = time.thread_time_ns()
    done = work()
    times.append((time.thread_time_ns() - start) / 1000)
    return done


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--repetitions", type=int, default=300)
    repetitions = parser.parse_args().repetitions
    bench = _Bench()
    configurations = {item.kem: item for item in bench.keys.configurations}
    times: dict[tuple[KemId, int], tuple[list[float], list[float], list[float]]] = {
        (kem, size): ([], [], []) for kem in configurations for size in _SIZES
    }
    for _ in range(repetitions):
        for (kem, size), (sealing, opening, refusing) in times.items():
            sealed = _timed(partial(bench.client, configurations[kem], size), sealing)
            exchange, refused = _timed(partial(bench.gateway, sealed), opening)
            _timed(partial(bench.refusal, exchange, refused), refusing)
    print(f"{'KEM':<16} {'body':>9} {'client seals':>13} {'gateway opens':>14} {'refuses':>8} {'gateway/client':>15}")
    for (kem, size), columns in times.items():
        seals, opens, refuses = (statistics.median(column[len(column) // 10 :]) for column in columns)
        ratio = (opens + refuses) / seals
        print(f"{kem.name:<16} {size:>9,} {seals:>10.0f} us {opens:>11.0f} us {refuses:>5.0f} us {ratio:>15.2f}")


if __name__ == "__main__":
    main()
