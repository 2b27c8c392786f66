"""Collecting: one report for a whole round, and failures that arrive as our own error."""

import os

import pytest

from adytum.attestation.collect.rounds import Collector, NoEndorsements, NoGpus, Round
from adytum.attestation.core.errors import CollectionError, EvidenceError
from adytum.attestation.core.limits import LIMITS
from adytum.attestation.document.binding import NonceTree, gpu_nonce
from adytum.attestation.document.evidence import CpuEvidence, Evidence
from adytum.attestation.simulated.device import SimulatedCpu
from tests.unit.attestation.support import CLAIMS, NONCE, NONCES, check, clock, with_claims


class CountingCpu(SimulatedCpu):
    """Counts reports; signs for real."""

    reports = 0

    def report(self, report_data: bytes) -> CpuEvidence:
        self.reports += 1
        return super().report(report_data)


def collect(nonces: list[bytes]) -> Round:
    return Collector(SimulatedCpu(clock=clock), NoGpus(), NoEndorsements()).collect(CLAIMS, nonces)


def test_one_report_serves_fifty_clients() -> None:
    cpu = CountingCpu(clock=clock)
    nonces = [os.urandom(32) for _ in range(50)]
    collected = Collector(cpu, NoGpus(), NoEndorsements()).collect(CLAIMS, nonces)
    documents = {nonce: collected.document(nonce) for nonce in nonces}
    assert cpu.reports == 1
    assert len(set(documents.values())) == 50
    assert len({Evidence.parse(data).cpu.report for data in documents.values()}) == 1
    for nonce, data in documents.items():
        assert check(data, nonce=nonce).claims == CLAIMS


def test_a_nonce_of_another_round_gets_no_document() -> None:
    collected = collect([NONCES[0]])
    for nonce in (NONCES[1], b""):
        with pytest.raises(CollectionError):
            collected.document(nonce)


def test_a_nonce_given_twice_counts_once() -> None:
    collected = collect([NONCES[0], NONCES[1], NONCES[0]])
    evidence = Evidence.parse(collected.document(NONCES[1]))
    assert evidence.nonces.size == 2
    assert check(collected.document(NONCES[0]), nonce=NONCES[0]).claims == CLAIMS


@pytest.mark.parametrize("nonces", [[], [b"short"], [NONCE, b"x" * 33]])
def test_rounds_refused(nonces: list[bytes]) -> None:
    with pytest.raises(CollectionError):
        collect(nonces)


def test_the_largest_round_verifies_and_one_more_is_refused() -> None:
    nonces = [number.to_bytes(32, "big") for number in range(LIMITS.round + 1)]
    with pytest.raises(CollectionError):
        collect(nonces)
    collected = collect(nonces[:-1])
    for nonce in (nonces[0], nonces[LIMITS.round // 2], nonces[-2]):
        assert check(collected.document(nonce), nonce=nonce).claims == CLAIMS


def test_claims_that_no_verifier_reads_are_never_signed() -> None:
    cpu = CountingCpu(clock=clock)
    with pytest.raises(EvidenceError):
        Collector(cpu, NoGpus(), NoEndorsements()).collect(with_claims(models=()), [NONCE])
    assert cpu.reports == 0


def test_the_gpus_are_asked_with_the_bound_nonce() -> None:
    asked: list[bytes] = []

    class Gpus:
        def collect(self, nonce: bytes) -> bytes:
            asked.append(nonce)
            return b"[]"

    Collector(SimulatedCpu(clock=clock), Gpus(), NoEndorsements()).collect(CLAIMS, list(NONCES))
    assert asked == [gpu_nonce(NonceTree(NONCES).root, CLAIMS.encode())]


def test_a_failing_device_gives_no_document() -> None:
    class Broken:
        provider = "broken"

        def report(self, report_data: bytes) -> CpuEvidence:
            raise CollectionError("the device does not answer")

    with pytest.raises(CollectionError, match="does not answer"):
        Collector(Broken(), NoGpus(), NoEndorsements()).collect(CLAIMS, [NONCE])


@pytest.mark.parametrize("length", [0, 63, 65])
def test_the_simulated_cpu_takes_64_bytes(length: int) -> None:
    with pytest.raises(CollectionError):
        SimulatedCpu(clock=clock).report(b"x" * length)


def test_the_simulated_cpu_makes_its_key_at_start_and_does_not_show_it() -> None:
    one, two = SimulatedCpu(clock=clock), SimulatedCpu(clock=clock)
    assert one.key_sha256 != two.key_sha256
    assert repr(one) == "SimulatedCpu()"


def test_simulated_is_written_all_over_it() -> None:
    evidence = SimulatedCpu(clock=clock).report(bytes(64))
    assert evidence.provider == "simulated"
    assert b"SIMULATED" in evidence.report
    assert b"SIMULATED" in evidence.certificates[0]
