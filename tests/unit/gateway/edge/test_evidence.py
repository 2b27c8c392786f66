"""Rounds of collection: one report for many, at most one at a time and per interval, and nothing without a bound."""

import asyncio
import hashlib
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import pytest

from adytum.attestation.collect.rounds import Collector, NoEndorsements, NoGpus
from adytum.attestation.core.errors import CollectionError
from adytum.attestation.document.evidence import CpuEvidence
from adytum.attestation.simulated.device import SimulatedCpu
from adytum.inference.gateway.edge.evidence import EvidenceBusy, EvidenceService, EvidenceUnavailable
from tests.unit.attestation.support import CLAIMS, check, clock


def nonce(number: int) -> bytes:
    return hashlib.sha256(b"%d" % number).digest()


@dataclass
class CountedCpu:
    """The simulated CPU, slow as hardware is; notes when it was asked, and whether twice at once."""

    seconds: float = 0.0
    asked: list[float] = field(default_factory=list)
    fails: bool = False
    busy: bool = False

    def __post_init__(self) -> None:
        self._cpu = SimulatedCpu(clock=clock)
        self.provider = self._cpu.provider

    def report(self, report_data: bytes) -> CpuEvidence:
        assert not self.busy, "two reports at once"
        self.busy = True
        self.asked.append(time.monotonic())
        time.sleep(self.seconds)
        self.busy = False
        if self.fails:
            raise CollectionError("the device does not answer")
        return self._cpu.report(report_data)


def service(cpu: CountedCpu, **limits: Any) -> EvidenceService:
    return EvidenceService(Collector(cpu, NoGpus(), NoEndorsements()), lambda: CLAIMS, **limits)


def run(scenario: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(scenario())  # type: ignore[arg-type]


def test_those_who_wait_share_the_next_report() -> None:
    cpu = CountedCpu(seconds=0.05)
    evidence = service(cpu)

    async def scenario() -> None:
        first = asyncio.create_task(evidence.document(nonce(0)))
        await asyncio.sleep(0.01)
        rest = await asyncio.gather(*(evidence.document(nonce(i)) for i in range(1, 300)))
        for number, document in enumerate([await first, *rest]):
            check(document, nonce=nonce(number))

    run(scenario)
    assert len(cpu.asked) == 2


def test_the_first_of_a_quiet_time_does_not_wait() -> None:
    async def seconds() -> float:
        evidence = service(CountedCpu(), interval=0.2)
        started = time.monotonic()
        await evidence.document(nonce(0))
        return time.monotonic() - started

    # On a busy machine it may take that long now and then.
    assert any(asyncio.run(seconds()) < 0.15 for _ in range(40))


def test_one_round_per_interval() -> None:
    cpu = CountedCpu()
    evidence = service(cpu, interval=0.2)

    async def scenario() -> None:
        for number in range(4):
            check(await evidence.document(nonce(number)), nonce=nonce(number))

    run(scenario)
    assert len(cpu.asked) == 4
    # A timer may fire a little early.
    assert all(b - a > 0.19 for a, b in zip(cpu.asked, cpu.asked[1:], strict=False))


def test_a_full_round_refuses_one_more_and_then_goes_on() -> None:
    cpu = CountedCpu(seconds=0.1)
    evidence = service(cpu, round_nonces=8)

    async def scenario() -> None:
        running = asyncio.create_task(evidence.document(nonce(0)))
        await asyncio.sleep(0.02)
        waiting = [asyncio.create_task(evidence.document(nonce(i))) for i in range(1, 9)]
        await asyncio.sleep(0)
        with pytest.raises(EvidenceBusy):
            await evidence.document(nonce(9))
        same = asyncio.create_task(evidence.document(nonce(8)))  # No further nonce, so no further place.
        for number, task in enumerate([running, *waiting]):
            check(await task, nonce=nonce(number))
        check(await same, nonce=nonce(8))
        check(await evidence.document(nonce(9)), nonce=nonce(9))

    run(scenario)


def test_a_device_that_fails_is_told_to_all_and_asked_again() -> None:
    cpu = CountedCpu(fails=True)
    evidence = service(cpu)

    async def scenario() -> None:
        answers = await asyncio.gather(*(evidence.document(nonce(i)) for i in range(5)), return_exceptions=True)
        assert [type(answer) for answer in answers] == [EvidenceUnavailable] * 5
        cpu.fails = False
        check(await evidence.document(nonce(1)), nonce=nonce(1))

    run(scenario)


def test_one_who_goes_away_takes_nobody_along() -> None:
    cpu = CountedCpu(seconds=0.05)
    evidence = service(cpu)

    async def scenario() -> None:
        leaving = asyncio.create_task(evidence.document(nonce(1)))
        staying = asyncio.create_task(evidence.document(nonce(1)))
        await asyncio.sleep(0.01)
        leaving.cancel()
        check(await staying, nonce=nonce(1))

    run(scenario)


class Client:
    """An ASGI client; `reads` is whether it takes what is sent."""

    def __init__(self, nonce_: bytes, reads: bool = True) -> None:
        self.scope: Any = {"type": "http", "query_string": b"nonce=" + nonce_.hex().encode(), "headers": []}
        self.status = 0
        self.body = b""
        self._reads = asyncio.Event()
        if reads:
            self._reads.set()

    async def send(self, message: Any) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
        else:
            await self._reads.wait()
            self.body += message["body"]


async def _nothing() -> Any:
    await asyncio.Event().wait()


def test_clients_that_do_not_read_are_bounded_and_let_go() -> None:
    evidence = service(CountedCpu(), clients=3, send_seconds=0.3, refusal_seconds=0.05)

    async def scenario() -> None:
        stuck = [Client(nonce(i), reads=False) for i in range(3)]
        tasks = [asyncio.create_task(evidence.handle(client.scope, _nothing, client.send)) for client in stuck]
        await asyncio.sleep(0.1)
        refused = Client(nonce(3))
        asked = time.monotonic()
        await evidence.handle(refused.scope, _nothing, refused.send)
        assert time.monotonic() - asked > 0.04, (
            "a refusal is late, so that asking again at once does not flood the gateway"
        )
        assert refused.status == 503
        assert b"Too many clients" in refused.body
        assert all(isinstance(end, TimeoutError) for end in await asyncio.gather(*tasks, return_exceptions=True))
        served = Client(nonce(4))
        await evidence.handle(served.scope, _nothing, served.send)
        assert served.status == 200
        check(served.body, nonce=nonce(4))

    run(scenario)


def test_a_large_rounds_answers_let_others_run() -> None:
    """Between two of a round's answers something else gets its turn: the longest pause is far below the whole."""
    evidence = service(CountedCpu(seconds=0.05))

    async def scenario() -> None:
        pauses: list[float] = []

        async def inference() -> None:
            while True:
                before = time.monotonic()
                await asyncio.sleep(0.001)
                pauses.append(time.monotonic() - before)

        async def ask(number: int) -> None:
            client = Client(nonce(number))
            await evidence.handle(client.scope, _nothing, client.send)
            assert client.status == 200

        first = asyncio.create_task(ask(0))
        await asyncio.sleep(0.01)
        asking = [asyncio.create_task(ask(number)) for number in range(1, 3000)]
        await first
        ticking = asyncio.create_task(inference())
        started = time.monotonic()
        await asyncio.gather(*asking)
        whole = time.monotonic() - started
        ticking.cancel()
        assert len(pauses) > 20
        assert sorted(pauses)[-3] < whole / 4, (sorted(pauses)[-5:], whole)

    run(scenario)


@pytest.mark.parametrize("query", [b"", b"nonce=", b"nonce=" + b"0" * 63, b"nonce=" + b"A" * 64, b"nonce=" + b"0" * 65])
def test_without_a_nonce(query: bytes) -> None:
    cpu = CountedCpu()

    async def scenario() -> None:
        client = Client(nonce(0))
        client.scope["query_string"] = query
        await service(cpu).handle(client.scope, _nothing, client.send)
        assert client.status == 400

    run(scenario)
    assert cpu.asked == []


def test_documents_of_a_round_share_their_bytes() -> None:
    """So that a flood costs memory for proofs, not for documents."""
    evidence = service(CountedCpu(seconds=0.02))

    async def scenario() -> None:
        rounds = await asyncio.gather(*(evidence.collected(nonce(i)) for i in range(20)))
        pieces = [round_.pieces(nonce(i)) for i, round_ in enumerate(rounds)]
        assert len({id(round_) for round_ in rounds}) == 1
        assert len({(id(before), id(after)) for before, _, after in pieces}) == 1
        assert len({proof for _, proof, _ in pieces}) == 20
        assert max(len(proof) for _, proof, _ in pieces) < 1024

    run(scenario)
