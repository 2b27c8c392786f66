"""Collected from fake machines that sign for real, then verified: every kind of machine, and each with one thing wrong.

The wrong thing is found at the step that owns it, whatever else the document has.
"""

import dataclasses
import hashlib
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from adytum.attestation.collect.rounds import Collector, CpuDevice, GpuDevices, NoGpus
from adytum.attestation.core.checks import Checks
from adytum.attestation.core.errors import AttestationError, EvidenceError, PolicyError, VerificationError
from adytum.attestation.core.trust import TrustRoots
from adytum.attestation.document.binding import gpu_nonce, report_data
from adytum.attestation.document.evidence import Claims, Collateral, CpuEvidence, Evidence
from adytum.attestation.nvidia.bundle import GpuEvidence, encode_bundle, parse_bundle
from adytum.attestation.policy.policy import Policy
from adytum.attestation.policy.rules import Cpu, Measurement
from adytum.attestation.tdx.device import Tdx
from adytum.attestation.tsm.device import Tsm
from adytum.attestation.verifier.document import VerifiedEvidence, verify
from adytum.attestation.verifier.pin import policy_from
from adytum.attestation.vtpm.device import SnpVtpm
from tests.unit.attestation.nvidia.authority import Authority, FakeGpu
from tests.unit.attestation.nvidia.rim_authority import REVOKED, RimAuthority, answer
from tests.unit.attestation.snp.authority import DAY, NOW, FakeSnp, Processor
from tests.unit.attestation.support import CLAIMS
from tests.unit.attestation.tdx.authority import Authority as Intel
from tests.unit.attestation.tdx.authority import Td
from tests.unit.attestation.tdx.configfs import configfs
from tests.unit.attestation.vtpm.software_tpm import Paravisor, make_attestation_key, software_tpm

NONCES = tuple(hashlib.sha256(b"%d" % number).digest() for number in range(5))
NONCE = NONCES[3]
START = int(NOW.timestamp())
NVIDIA, RIMS, INTEL = Authority(), RimAuthority(), Intel()
GENOA = Processor()
GPUS = tuple(FakeGpu(NVIDIA) for _ in range(4))
TRUST = TrustRoots(
    amd_ark=GENOA.pins,
    nvidia_device=NVIDIA.roots.nvidia_device,
    nvidia_rim=RIMS.roots,
    intel_sgx=INTEL.roots,
)


def manifests() -> tuple[bytes, ...]:
    """Driver and VBIOS, three measurements each, as the fake GPUs report them: index i is block i + 1."""
    return (
        RIMS.rim({index: [bytes([index + 1]) * 48] for index in (7, 8, 9)}),
        RIMS.rim({index: [bytes([index + 1]) * 48] for index in (0, 1, 20)}, version="96.00.9F.00.01"),
    )


def answers(gpus: Sequence[FakeGpu], **options: Any) -> tuple[bytes, ...]:
    times = {"since": NOW - DAY / 24, "until": NOW + DAY, **options}
    found = []
    for gpu in gpus:
        above = NVIDIA.above(gpu.architecture)
        issuers = (gpu.boot_rom, *above)
        found += [answer(below.certificate, issuer, **times) for below, issuer in pairwise(issuers)]
    found += [answer(below.certificate, issuer, **times) for below, issuer in pairwise(RIMS.issuers)]
    return tuple(found)


@dataclass
class Gpus:
    """The GPUs' port. Every field is one thing that may be otherwise."""

    gpus: Sequence[FakeGpu]
    cc: str = "on"
    devtools: bool = False
    nonce: Callable[[bytes], bytes] = lambda nonce: nonce

    def collect(self, nonce: bytes) -> bytes:
        return encode_bundle(
            [
                GpuEvidence(gpu.architecture, gpu.chain, gpu.report(self.nonce(nonce)), self.cc, self.devtools, "none")
                for gpu in self.gpus
            ]
        )


@dataclass
class Vendors:
    """The endorsements' port."""

    found: Collateral = field(default_factory=Collateral)

    def collateral(self, cpu: CpuEvidence, gpu: bytes) -> Collateral:
        return self.found


@dataclass
class Machine:
    """One machine with what its vendors signed, and the policy that a client has for it."""

    cpu: CpuDevice
    gpus: GpuDevices
    collateral: Collateral
    policy: Policy
    cc_mode: str

    @property
    def claims(self) -> Claims:
        return dataclasses.replace(CLAIMS, cc_mode=self.cc_mode, issued_at=START, keys_expire_at=START + 3600)

    def document(self, nonce: bytes = NONCE) -> bytes:
        collector = Collector(self.cpu, self.gpus, Vendors(self.collateral))
        return collector.collect(self.claims, NONCES).document(nonce)


def check(machine: Machine, document: bytes | None = None, **options: Any) -> VerifiedEvidence:
    given = {"nonce": NONCE, "policy": machine.policy, "trust": TRUST, "now": NOW, **options}
    return verify(machine.document() if document is None else document, **given)


def policy(provider: str, gpus: int, measurement: bytes = b"m" * 48) -> Policy:
    """What `Policy.default` asks for, of this provider and number of GPUs."""
    production = Policy.default(frozenset({measurement}))
    asked = dataclasses.replace(production, cpu=Cpu(frozenset({provider})))
    if gpus:
        return dataclasses.replace(asked, gpu=type(asked.gpu)(gpus))
    return dataclasses.replace(asked, gpu=type(asked.gpu)("none"), cc_mode=type(asked.cc_mode)(frozenset({"none"})))


def snp(gpus: int = 0, cpu: CpuDevice | None = None) -> Machine:
    return Machine(
        cpu or FakeSnp(GENOA),
        Gpus(GPUS[:gpus]) if gpus else NoGpus(),
        Collateral(
            crls=(GENOA.crl(),),
            rims=manifests() if gpus else (),
            ocsp=answers(GPUS[:gpus]) if gpus else (),
        ),
        policy("sev-snp", gpus),
        "on" if gpus else "none",
    )


@pytest.fixture
def vtpm(tmp_path: Path) -> Iterator[Machine]:
    with software_tpm(tmp_path) as transport:
        key = make_attestation_key(transport)
        now = [1000.0]
        paravisor = Paravisor(transport, key, lambda data: GENOA.report(data), lambda: now[0])

        def sleep(seconds: float) -> None:
            now[0] += seconds

        device = SnpVtpm(lambda: GENOA.certificates, paravisor, clock=lambda: now[0], sleep=sleep)
        yield dataclasses.replace(snp(1, device), policy=policy("sev-snp-vtpm", 1))


@pytest.fixture
def tdx(tmp_path: Path) -> Machine:
    pytest.importorskip("dcap_qvl", reason="needs the extra tdx")
    import json

    def quote(data: bytes) -> bytes:
        return INTEL.quote(dataclasses.replace(Td(), report_data=data))

    from adytum.attestation.tdx.quote import TdxQuote

    measurement = TdxQuote.parse(quote(bytes(64))).td.measurement
    collateral = dataclasses.replace(snp(1).collateral, crls=(), tdx=json.dumps(INTEL.collateral()).encode())
    device = Tdx(Tsm(configfs(tmp_path, quote)))
    return Machine(device, Gpus(GPUS[:1]), collateral, policy("tdx", 1, measurement), "on")


@pytest.mark.parametrize("gpus", [0, 1, 4])
def test_snp(gpus: int) -> None:
    checks = Checks()
    machine = snp(gpus)
    found = check(machine, checks=checks)
    assert (found.provider, len(found.facts.gpus), found.claims) == ("sev-snp", gpus, machine.claims)
    assert checks.not_given == []
    assert all(gpu.rims_checked and gpu.revocation_checked for gpu in found.facts.gpus)
    assert found.valid_until == (NOW + DAY if gpus else NOW + 90 * DAY)
    for nonce in NONCES:
        check(machine, machine.document(nonce), nonce=nonce)


def test_snp_behind_a_virtual_tpm(vtpm: Machine) -> None:
    found = check(vtpm)
    assert (found.provider, len(found.facts.gpus)) == ("sev-snp-vtpm", 1)
    assert found.facts.cpu.pcrs is not None
    assert len(found.facts.cpu.pcrs) == 24
    with pytest.raises(PolicyError) as refused:
        check(vtpm, policy=dataclasses.replace(vtpm.policy, pcrs=type(vtpm.policy.pcrs)({4: b"\1" * 32})))
    assert refused.value.claim == "pcrs"


def test_tdx(tdx: Machine) -> None:
    found = check(tdx)
    assert (found.provider, len(found.facts.gpus)) == ("tdx", 1)
    assert found.facts.cpu.tdx is not None
    assert found.facts.cpu.tdx.status == "UpToDate"
    with pytest.raises(PolicyError) as refused:
        check(dataclasses.replace(tdx, collateral=dataclasses.replace(tdx.collateral, tdx=None)))
    assert refused.value.claim == "tdx_status"


def replaced(machine: Machine, **changes: Any) -> Machine:
    return dataclasses.replace(machine, **changes)


def without(machine: Machine, **changes: Any) -> Machine:
    return replaced(machine, collateral=dataclasses.replace(machine.collateral, **changes))


class Splicing:
    """A CPU whose report was made for other claims, or another GPU's evidence."""

    provider = "sev-snp"

    def __init__(self, data: bytes) -> None:
        self._data = data

    def report(self, asked: bytes) -> CpuEvidence:
        return FakeSnp(GENOA).report(self._data)


ONE = snp(1)
ZEROS = {index: bytes(48) for index in range(1, 65)}


@pytest.mark.parametrize(
    ("machine", "code"),
    [
        # The CPU.
        (replaced(snp(), cpu=FakeSnp(GENOA, policy=1 << 17 | 1 << 19)), "policy.debug"),
        (replaced(snp(), cpu=FakeSnp(GENOA, policy=1 << 17 | 1 << 18)), "policy.migration"),
        (replaced(snp(), cpu=FakeSnp(GENOA, vmpl=1)), "policy.vmpl"),
        (replaced(snp(), cpu=FakeSnp(GENOA, measurement=b"n" * 48)), "policy.measurement"),
        (replaced(snp(), cpu=FakeSnp(GENOA, tcb=bytes(8))), "snp.tcb"),
        (replaced(snp(), cpu=FakeSnp(Processor("Milan"))), "snp.product"),
        (replaced(snp(), cpu=FakeSnp(GENOA, signer_info=4)), "snp.key"),
        (replaced(snp(), cpu=Splicing(bytes(64))), "binding.report_data"),
        (without(snp(), crls=()), "policy.cpu_revocation"),
        (without(snp(), crls=(GENOA.crl(2),)), "snp.crl.revoked"),
        # The GPUs.
        (replaced(ONE, gpus=NoGpus()), "gpu.absent"),
        (replaced(ONE, gpus=NoGpus(), cc_mode="none"), "policy.gpu"),
        (replaced(ONE, gpus=Gpus(GPUS[:2])), "policy.gpu"),
        (replaced(ONE, gpus=Gpus((GPUS[0], GPUS[0]))), "gpu.duplicate"),
        (replaced(ONE, gpus=Gpus(GPUS[:1], nonce=lambda nonce: bytes(32))), "gpu.nonce"),
        (replaced(ONE, gpus=Gpus(GPUS[:1], cc="off")), "gpu.mode"),
        (replaced(ONE, gpus=Gpus(GPUS[:1], devtools=True)), "gpu.mode"),
        (replaced(ONE, gpus=Gpus(GPUS[:1], devtools=True), cc_mode="devtools"), "policy.cc_mode"),
        (replaced(ONE, gpus=Gpus(GPUS[:1], cc="off"), cc_mode="off"), "policy.cc_mode"),
        (replaced(ONE, gpus=Gpus((FakeGpu(Authority()),))), "gpu.chain.root"),
        (replaced(ONE, gpus=Gpus((FakeGpu(NVIDIA, opaque={20: bytes(48)}),))), "gpu.fwid"),
        (replaced(ONE, gpus=Gpus((FakeGpu(NVIDIA, measurements=ZEROS),))), "gpu.measurements"),
        (without(ONE, rims=()), "policy.gpu_rims"),
        (without(ONE, rims=manifests()[:1]), "policy.gpu_rims"),
        (without(ONE, rims=(manifests()[0].replace(b'"r1"', b'"r2"'), manifests()[1])), "gpu.rim.digest"),
        (without(ONE, ocsp=()), "policy.gpu_revocation"),
        (without(ONE, ocsp=answers(GPUS[:1])[1:]), "policy.gpu_revocation"),
        (without(ONE, ocsp=answers(GPUS[1:2])), "policy.gpu_revocation"),
        (without(ONE, ocsp=answers(GPUS[:1], status=REVOKED)), "gpu.ocsp.revoked"),
        (without(ONE, ocsp=answers(GPUS[:1], until=NOW - DAY / 48)), "gpu.ocsp.validity"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_one_thing_wrong(machine: Machine, code: str) -> None:
    with pytest.raises((VerificationError, PolicyError)) as refused:
        check(machine)
    assert refused.value.code == code


def test_a_revoked_certificate_of_one_gpu_among_four() -> None:
    machine = snp(4)
    bad = answer(GPUS[2].boot_rom.certificate, NVIDIA.above("hopper")[0], status=REVOKED, since=NOW, until=NOW + DAY)
    with pytest.raises(VerificationError) as refused:
        check(without(machine, ocsp=(*machine.collateral.ocsp, bad)))
    assert refused.value.code == "gpu.ocsp.revoked"


def test_splicing() -> None:
    """Parts of two genuine documents of one machine, in every combination: only the whole ones hold."""
    machine = snp(1)
    mine, other = (Evidence.parse(machine.document(NONCE)) for _ in range(2))
    later = replaced(machine)
    second = Evidence.parse(
        Collector(later.cpu, later.gpus, Vendors(later.collateral))
        .collect(dataclasses.replace(later.claims, replica="beta"), [NONCE])
        .document(NONCE)
    )
    parts = ("claims", "nonces", "cpu", "gpu")
    accepted = 0
    for mask in range(1 << len(parts)):
        taken = {part: getattr(second if mask >> place & 1 else mine, part) for place, part in enumerate(parts)}
        try:
            check(machine, dataclasses.replace(mine, **taken).encode())
        except AttestationError:
            continue
        accepted += 1
        assert mask in (0, 15)
    assert accepted == 2
    assert other.claims == mine.claims


def test_a_swapped_key_configuration() -> None:
    machine = snp(1)
    evidence = Evidence.parse(machine.document())
    claims = dataclasses.replace(machine.claims, key_configurations=b"mine")
    with pytest.raises(VerificationError) as refused:
        check(machine, dataclasses.replace(evidence, claims=claims.encode()).encode())
    assert refused.value.code == "binding.report_data"


def test_a_replayed_document_and_an_expired_round() -> None:
    machine = snp(1)
    document = machine.document()
    with pytest.raises(VerificationError) as refused:
        check(machine, document, nonce=hashlib.sha256(b"another").digest())
    assert refused.value.code == "nonce.other"
    with pytest.raises(PolicyError) as late:
        check(machine, document, now=NOW + DAY / 12)
    assert late.value.code == "policy.maximum_age_s"


def test_gpu_evidence_is_for_these_claims_alone() -> None:
    """A GPU's genuine answer for other claims, under a CPU report that covers it: the GPU's nonce differs."""
    machine = snp(1)
    honest = Evidence.parse(machine.document())
    foreign = dataclasses.replace(machine.claims, replica="beta").encode()
    bundle = Gpus(GPUS[:1]).collect(gpu_nonce(honest.nonces.root, foreign))
    cpu = FakeSnp(GENOA).report(report_data(honest.nonces.root, honest.claims, bundle))
    with pytest.raises(VerificationError) as refused:
        check(machine, dataclasses.replace(honest, gpu=bundle, cpu=cpu).encode())
    assert refused.value.code == "gpu.nonce"


@pytest.mark.slow
def test_every_flipped_byte_of_a_document_is_refused_or_irrelevant() -> None:
    """Every 37th byte: the stride falls on every field. The one irrelevant kind: white space around the base64 of a
    manifest signer's certificate, which the signature leaves out."""
    machine = snp(1)
    document = machine.document()
    irrelevant = 0
    for at in range(0, len(document), 37):
        changed = document[:at] + bytes([document[at] ^ 1]) + document[at + 1 :]
        try:
            found = check(machine, changed)
        except AttestationError:
            continue
        irrelevant += 1
        assert found.claims == machine.claims
        for before, after in zip(machine.collateral.rims, Evidence.parse(changed).collateral.rims, strict=True):
            assert b"".join(before.split()) == b"".join(after.split())
    assert irrelevant < 10


def test_a_policy_from_evidence_accepts_it_and_nothing_less(vtpm: Machine) -> None:
    for machine in (snp(), snp(4), vtpm):
        made, verified = policy_from(machine.document(), nonce=NONCE, trust=TRUST, now=NOW, checks=Checks())
        read = Policy.from_toml(made.to_toml().encode())
        assert read == made
        check(machine, policy=read)
        assert verified.provider in made.cpu.accepted
    one = snp(1)
    made, _ = policy_from(one.document(), nonce=NONCE, trust=TRUST, now=NOW, checks=Checks())
    for worse, claim in (
        (replaced(one, cpu=FakeSnp(GENOA, measurement=b"n" * 48)), "measurement"),
        (replaced(one, cpu=FakeSnp(Processor(levels={**GENOA.levels, "microcode": 199}))), "minimum_tcb"),
        (replaced(one, cpu=FakeSnp(GENOA, vmpl=1)), "vmpl"),
        (replaced(one, gpus=Gpus((FakeGpu(NVIDIA, driver_version="550.90.06"),))), "gpu_driver"),
        (without(one, rims=()), "gpu_rims"),
        (without(one, ocsp=()), "gpu_revocation"),
        (without(one, crls=()), "cpu_revocation"),
        (snp(), "gpu"),
    ):
        with pytest.raises(PolicyError) as refused:
            check(worse, policy=made)
        assert refused.value.claim == claim


def test_a_policy_from_evidence_that_does_not_hold() -> None:
    machine = snp(1)
    for other in (NONCES[0], bytes(32)):
        with pytest.raises(VerificationError):
            policy_from(machine.document(), nonce=other, trust=TRUST, now=NOW, checks=Checks())


@pytest.mark.usefixtures("untraced")
def test_a_whole_document_takes_less_than_50_ms() -> None:
    """SNP, one GPU, both manifests, all collateral. About 20 ms on the machine where this was written."""
    machine = snp(1)
    document = machine.document()
    times = []
    for _ in range(9):
        # Of the processor: it waits for nothing, and a busy machine does not count.
        start = time.thread_time()
        check(machine, document)
        times.append(time.thread_time() - start)
    assert statistics.median(times) < 0.05, times


def test_an_empty_list_of_gpus_is_no_bundle() -> None:
    assert len(parse_bundle(Gpus(GPUS[:1]).collect(bytes(32)))) == 1
    for data in (b"[]", b"[ ]", b"{}", b""):
        with pytest.raises(EvidenceError):
            parse_bundle(data)
    with pytest.raises(ValueError, match="1 to 16"):
        encode_bundle([])


def test_reference_values_of_nothing() -> None:
    """An empty set of accepted measurements accepts none."""
    machine = snp()
    with pytest.raises(PolicyError) as refused:
        check(machine, policy=dataclasses.replace(machine.policy, measurement=Measurement(frozenset())))
    assert refused.value.claim == "measurement"
