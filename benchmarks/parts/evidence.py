"""Evidence for many clients: nonces answered per second of the gateway's CPU, and hardware reports used for them.

    python -m adytum.benchmarks.parts.evidence [--clients 64 512] [--seconds 5] [--collateral 0 70000]

A gateway's evidence service in a process of its own, with a simulated CPU whose report takes 5 ms (assumed, not
measured on hardware). Clients on keep-alive connections ask in a closed loop, each time with a new nonce.
`--collateral` adds the size of real documents (two manifests, OCSP answers, lists of revoked certificates).
"""

import argparse
import asyncio
import hashlib
import multiprocessing
import random
import time
from functools import partial
from multiprocessing.sharedctypes import Synchronized
from typing import cast

import uvicorn
import uvloop

from adytum.attestation.collect.rounds import Collector, NoGpus
from adytum.attestation.document.evidence import Claims, Collateral, CpuEvidence, ModelClaim
from adytum.attestation.simulated.device import SimulatedCpu
from adytum.benchmarks.processes import cpu_ticks
from adytum.inference.gateway.edge.evidence import EvidenceService

REPORT_S = 0.005


class _CountedCpu:
    """The simulated CPU at the pace of hardware."""

    def __init__(self, count: "Synchronized[int]") -> None:
        self._cpu = SimulatedCpu()
        self._count = count
        self.provider = self._cpu.provider

    def report(self, report_data: bytes) -> CpuEvidence:
        time.sleep(REPORT_S)
        self._count.value += 1
        return self._cpu.report(report_data)


class _Sized:
    """Collateral of a given size; its content does not matter here."""

    def __init__(self, size: int) -> None:
        self._collateral = Collateral(rims=(random.randbytes(size),)) if size else Collateral()

    def collateral(self, cpu: CpuEvidence, gpu: bytes) -> Collateral:
        return self._collateral


def _claims() -> Claims:
    now = int(time.time())
    return Claims(
        key_configurations=bytes(1300),
        ehbp_key_configuration=bytes(41),
        receipt_key=bytes(32),
        gateway_path="/.well-known/ohttp-gateway/bench",
        replica="bench",
        tls_spki_sha256=None,
        models=tuple(ModelClaim(f"demo/{i}", "generate", (), bytes(32)) for i in range(3)),
        configuration_sha256=bytes(32),
        padding="pad",
        sandbox="full",
        software_version="bench",
        cc_mode="none",
        issued_at=now,
        keys_expire_at=now + 3600,
    )


def _gateway(port: int, size: int, interval: float, count: "Synchronized[int]") -> None:
    async def serve() -> None:
        collector = Collector(_CountedCpu(count), NoGpus(), _Sized(size))
        evidence = EvidenceService(collector, _claims, interval=interval)
        options = uvicorn.Config(
            evidence.handle,
            port=port,
            interface="asgi3",  # uvicorn does not detect it for a bound method.
            loop="uvloop",
            http="httptools",
            ws="none",
            lifespan="off",
            log_level="critical",
        )
        await uvicorn.Server(options).serve()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(serve())


class _Client(asyncio.Protocol):
    """Asks, reads the answer by its length, asks again."""

    def __init__(self, number: int, latencies: list[float]) -> None:
        self._number = number
        self._latencies = latencies
        self._left = -1
        self._head = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._ask()

    def _ask(self) -> None:
        self._number += 1_000_000
        nonce = hashlib.sha256(b"%d" % self._number).hexdigest()
        self._left = -1
        self._asked = time.perf_counter()
        self._transport.write(f"GET /?nonce={nonce} HTTP/1.1\r\nHost: bench\r\n\r\n".encode())

    def data_received(self, data: bytes) -> None:
        if self._left < 0:
            self._head += data
            head, found, body = self._head.partition(b"\r\n\r\n")
            if not found:
                return
            if not head.startswith(b"HTTP/1.1 200"):
                raise SystemExit(f"the gateway answered {head[:40]!r}")
            self._left = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
            self._head, data = b"", body
        self._left -= len(data)
        if self._left == 0:
            self._latencies.append(time.perf_counter() - self._asked)
            self._ask()


async def _load(port: int, clients: int, seconds: float) -> list[float]:
    loop = asyncio.get_running_loop()
    latencies: list[float] = []
    transports = []
    for number in range(clients):
        transport, _ = await loop.create_connection(partial(_Client, number, latencies), "127.0.0.1", port)
        transports.append(transport)
    await asyncio.sleep(seconds)
    for transport in transports:
        transport.abort()
    return latencies


def main() -> None:
    """Runs every combination, each against a gateway of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, nargs="+", default=[64, 512, 2048])
    parser.add_argument("--collateral", type=int, nargs="+", default=[0, 70_000])
    parser.add_argument("--interval", type=float, default=0.0, help="seconds between two reports")
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--port", type=int, default=18081)
    options = parser.parse_args()
    spawn = multiprocessing.get_context("spawn")
    print(
        f"{'collateral':>10} {'clients':>8} {'nonces/s':>9} {'per core':>9} {'reports/s':>10} "
        f"{'nonces/report':>14} {'p50 ms':>7} {'p99 ms':>7}"
    )
    for size in options.collateral:
        for clients in options.clients:
            count = spawn.Value("i", 0)
            gateway = spawn.Process(target=_gateway, args=(options.port, size, options.interval, count), daemon=True)
            gateway.start()
            try:
                time.sleep(2)
                before, reports = cpu_ticks(gateway.pid or 0), count.value
                with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                    found = sorted(runner.run(_load(options.port, clients, options.seconds)))
                cpu, reports = cpu_ticks(gateway.pid or 0) - before, count.value - reports
            finally:
                gateway.terminate()
                gateway.join(10)
            print(
                f"{size:>10} {clients:>8} {len(found) / options.seconds:>9.0f} {len(found) / cpu:>9.0f} "
                f"{reports / options.seconds:>10.1f} {len(found) / max(1, reports):>14.0f} "
                f"{found[len(found) // 2] * 1000:>7.1f} {found[len(found) * 99 // 100] * 1000:>7.1f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
