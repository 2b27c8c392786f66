"""Verification: what is accepted, and that every change to it is refused at its step."""

import copy
import dataclasses
import datetime
import hashlib
import json
from collections.abc import Callable

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from adytum.attestation.collect.rounds import Collector, NoEndorsements
from adytum.attestation.core.errors import (
    AttestationError,
    EvidenceError,
    PolicyError,
    Step,
    UnsupportedError,
    VerificationError,
)
from adytum.attestation.core.trust import TrustRoots
from adytum.attestation.document.binding import NonceTree, report_data
from adytum.attestation.document.evidence import CpuEvidence, Evidence, NonceProof
from adytum.attestation.policy.policy import Policy
from adytum.attestation.simulated.device import SimulatedCpu
from adytum.attestation.verifier.document import VerifiedEvidence
from tests.unit.attestation.support import (
    CLAIMS,
    NONCE,
    NONCES,
    NOW,
    START,
    OddCpu,
    changed,
    check,
    clock,
    document,
    with_claims,
)

MASKS = (0x01, 0x10, 0x80, 0xFF)
DOCUMENT = document()


def test_accepts_and_tells_what_it_accepted() -> None:
    cpu = SimulatedCpu(measurement=b"\x5a" * 48, clock=clock)
    data = document(cpu=cpu)
    verified = check(data)
    assert verified.claims == CLAIMS
    assert verified.provider == "simulated"
    assert verified.measurement == b"\x5a" * 48
    assert verified.facts.cpu.key_sha256 == cpu.key_sha256
    assert verified.verified_at == NOW
    assert verified.document_sha256 == hashlib.sha256(data).digest()
    assert verified.claims_sha256 == hashlib.sha256(CLAIMS.encode()).digest()


def test_a_second_implementation_of_the_report_is_accepted() -> None:
    assert check(document(cpu=OddCpu())).claims == CLAIMS


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_any_size_of_round(size: int) -> None:
    for nonce in NONCES[:size]:
        assert check(document(nonces=NONCES[:size], nonce=nonce), nonce=nonce).claims == CLAIMS


def flips(data: bytes) -> list[bytes]:
    return [data[:at] + bytes([data[at] ^ mask]) + data[at + 1 :] for at in range(len(data)) for mask in MASKS]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("claims", lambda e, f: [dataclasses.replace(e, claims=x) for x in f(e.claims)]),
        ("gpu", lambda e, f: [dataclasses.replace(e, gpu=x) for x in f(e.gpu)]),
        ("root", lambda e, f: [_nonces(e, root=x) for x in f(e.nonces.root)]),
        ("path 0", lambda e, f: [_nonces(e, path=(x, *e.nonces.path[1:])) for x in f(e.nonces.path[0])]),
        ("path end", lambda e, f: [_nonces(e, path=(*e.nonces.path[:-1], x)) for x in f(e.nonces.path[-1])]),
        ("report", lambda e, f: [_cpu(e, report=x) for x in f(e.cpu.report)]),
        ("certificate", lambda e, f: [_cpu(e, certificates=(x,)) for x in f(e.cpu.certificates[0])]),
    ],
)
def test_every_flipped_byte_of_every_field_is_refused(
    field: str, change: Callable[[Evidence, Callable[[bytes], list[bytes]]], list[Evidence]]
) -> None:
    variants = change(Evidence.parse(DOCUMENT), flips)
    assert len(variants) >= 2 * len(MASKS)
    for variant in variants:
        with pytest.raises(AttestationError):
            check(variant.encode())


def _nonces(evidence: Evidence, **changes: object) -> Evidence:
    return dataclasses.replace(evidence, nonces=dataclasses.replace(evidence.nonces, **changes))


def _cpu(evidence: Evidence, **changes: object) -> Evidence:
    return dataclasses.replace(evidence, cpu=dataclasses.replace(evidence.cpu, **changes))


def test_the_count_of_unused_bits_in_a_certificates_signature_is_zero() -> None:
    """`cryptography` accepts 1 if the last bit is zero, so a byte outside the signature could be changed."""
    for _ in range(64):
        evidence = Evidence.parse(document())
        certificate = evidence.cpu.certificates[0]
        if certificate[-1] & 1:
            continue
        at = len(certificate) - len(x509.load_der_x509_certificate(certificate).signature) - 1
        assert certificate[at - 2] == 3  # BIT STRING, its length, then the count.
        assert certificate[at] == 0
        other = certificate[:at] + b"\x01" + certificate[at + 1 :]
        with pytest.raises(VerificationError, match="not DER"):
            check(_cpu(evidence, certificates=(other,)).encode())
        return
    raise AssertionError("64 signatures and none even: the generator is broken")


@pytest.mark.slow
def test_every_flipped_byte_of_the_document_is_refused() -> None:
    for at in range(len(DOCUMENT)):
        for mask in (0x01, 0x20):
            with pytest.raises(AttestationError):
                check(DOCUMENT[:at] + bytes([DOCUMENT[at] ^ mask]) + DOCUMENT[at + 1 :])


def test_every_flipped_byte_of_the_nonce_is_refused() -> None:
    for nonce in flips(NONCE):
        with pytest.raises(VerificationError) as refused:
            check(DOCUMENT, nonce=nonce)
        assert refused.value.step == Step.NONCE


@pytest.mark.parametrize("length", [0, 1, 31, 33, 64])
def test_a_nonce_has_32_bytes(length: int) -> None:
    with pytest.raises(VerificationError) as refused:
        check(DOCUMENT, nonce=b"n" * length)
    assert refused.value.step == Step.NONCE


@pytest.mark.parametrize("nonce", [b"", b"n" * 31, b"n" * 64])
def test_a_signed_round_over_a_nonce_of_another_length_is_refused(nonce: bytes) -> None:
    """No collector here makes one, so the tree of one leaf is written out."""
    root = hashlib.sha256(b"\0" + nonce).digest()
    claims = CLAIMS.encode()
    cpu = SimulatedCpu(clock=clock).report(report_data(root, claims, b"[]"))
    with pytest.raises(VerificationError, match="32 bytes") as refused:
        check(Evidence(claims, NonceProof(root, 0, 1, ()), cpu, b"[]").encode(), nonce=nonce)
    assert refused.value.step == Step.NONCE


def test_another_clients_nonce_of_the_same_round_is_refused() -> None:
    for other in NONCES:
        if other != NONCE:
            with pytest.raises(VerificationError) as refused:
                check(DOCUMENT, nonce=other)
            assert refused.value.step == Step.NONCE


def test_another_round_is_refused() -> None:
    """A fresh tree around the victim's nonce under a report that was made for other nonces."""
    old = Evidence.parse(document(nonces=NONCES[:3], nonce=NONCES[0]))
    new = Evidence.parse(document(nonces=(NONCE,)))
    with pytest.raises(VerificationError) as refused:
        check(dataclasses.replace(old, nonces=new.nonces).encode())
    assert refused.value.step == Step.BINDING


def _drop_path(evidence: Evidence) -> Evidence:
    return _nonces(evidence, path=evidence.nonces.path[1:])


@pytest.mark.parametrize(
    ("change", "step"),
    [
        (lambda e: _nonces(e, index=3), Step.NONCE),
        (lambda e: _nonces(e, index=7), Step.NONCE),
        (lambda e: _nonces(e, size=0), Step.NONCE),
        (lambda e: _nonces(e, size=5), Step.NONCE),
        (lambda e: _nonces(e, size=9), Step.NONCE),
        (_drop_path, Step.NONCE),
        (lambda e: _nonces(e, path=(*e.nonces.path, bytes(32))), Step.NONCE),
        (lambda e: _cpu(e, report=e.cpu.report[:-1]), Step.CPU_REPORT),
        (lambda e: _cpu(e, report=e.cpu.report + b"\0"), Step.CPU_REPORT),
        (lambda e: _cpu(e, report=b""), Step.CPU_REPORT),
        (lambda e: _cpu(e, certificates=()), Step.CPU_REPORT),
        (lambda e: _cpu(e, certificates=e.cpu.certificates * 2), Step.CPU_REPORT),
        (lambda e: _cpu(e, certificates=(e.cpu.certificates[0] + b"\0",)), Step.CPU_REPORT),
        (lambda e: _cpu(e, certificates=(b"",)), Step.CPU_REPORT),
        (lambda e: _cpu(e, report=e.cpu.report[:152] + bytes(96)), Step.CPU_REPORT),
        (lambda e: _cpu(e, report=e.cpu.report[:152] + b"\xff" * 96), Step.CPU_REPORT),
        (lambda e: _cpu(e, provider="sgx"), Step.CPU_REPORT),
        (lambda e: _cpu(e, provider="Simulated"), Step.CPU_REPORT),
        (lambda e: dataclasses.replace(e, claims=with_claims(replica="beta").encode()), Step.BINDING),
        (lambda e: dataclasses.replace(e, gpu=b"[ ]"), Step.BINDING),
        (lambda e: dataclasses.replace(e, gpu=b""), Step.BINDING),
        (lambda e: dataclasses.replace(e, gpu=b"null"), Step.BINDING),
    ],
)
def test_refused_at_its_step(change: Callable[[Evidence], Evidence], step: Step) -> None:
    with pytest.raises(VerificationError) as refused:
        check(changed(DOCUMENT, change))
    assert refused.value.step == step


@pytest.mark.parametrize(
    ("cpu", "step"),
    [
        (OddCpu(magic=b"ADYTUM SIMULATED CPU REPORT v2"), Step.CPU_REPORT),
        (OddCpu(subject="a CPU"), Step.CPU_REPORT),
        (OddCpu(curve=ec.SECP256R1()), Step.CPU_REPORT),
        (OddCpu(issuer_signs=False), Step.CPU_REPORT),
        (OddCpu(not_after=NOW - datetime.timedelta(seconds=1)), Step.CPU_REPORT),
        (OddCpu(not_before=NOW + datetime.timedelta(seconds=1)), Step.CPU_REPORT),
        (OddCpu(copies=2), Step.CPU_REPORT),
        (OddCpu(copies=0), Step.CPU_REPORT),
        (OddCpu(suffix=b"\0"), Step.CPU_REPORT),
        (OddCpu(provider="none"), Step.CPU_REPORT),
        (OddCpu(report_data=b"x" * 64), Step.BINDING),
    ],
    # Named by hand: the representation holds times and addresses. Parallel runs need the same names in every process.
    ids=[
        "another magic",
        "another subject",
        "another curve",
        "signed by a stranger",
        "expired",
        "not yet valid",
        "two certificates",
        "no certificate",
        "trailing byte",
        "another provider",
        "another report data",
    ],
)
def test_validly_signed_and_still_wrong(cpu: OddCpu, step: Step) -> None:
    with pytest.raises(VerificationError) as refused:
        check(document(cpu=cpu))
    assert refused.value.step == step


@pytest.mark.parametrize("provider", ["sev-snp", "sev-snp-vtpm", "tdx"])
def test_a_report_under_another_providers_name_is_refused(provider: str) -> None:
    text = Policy.accept_simulated().to_toml().replace('cpu = ["simulated"]', f'cpu = ["{provider}"]')
    with pytest.raises((EvidenceError, UnsupportedError)):
        check(document(cpu=OddCpu(provider=provider)), policy=Policy.from_toml(text.encode()))


def test_an_unknown_provider_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="cannot verify") as refused:
        check(document(cpu=OddCpu(provider="sgx")))
    assert (refused.value.step, refused.value.code) == (Step.CPU_REPORT, "unsupported")


def test_another_keys_signature_is_refused() -> None:
    mine, other = Evidence.parse(document()), Evidence.parse(document())
    assert mine.cpu.report[:152] == other.cpu.report[:152]
    for evidence in (
        _cpu(mine, certificates=other.cpu.certificates),
        _cpu(mine, report=mine.cpu.report[:152] + other.cpu.report[152:]),
    ):
        with pytest.raises(VerificationError, match="signature") as refused:
            check(evidence.encode())
        assert refused.value.step == Step.CPU_REPORT


def test_a_pinned_simulated_key() -> None:
    cpu = SimulatedCpu(clock=clock)
    data = document(cpu=cpu)
    assert check(data, trust=TrustRoots(simulated=frozenset({bytes(32), cpu.key_sha256}))).claims == CLAIMS
    for pins in (frozenset[bytes](), frozenset({bytes(32)})):
        with pytest.raises(VerificationError, match="pinned") as refused:
            check(data, trust=TrustRoots(simulated=pins))
        assert refused.value.step == Step.CPU_REPORT


class Gpus:
    """GPU evidence that is signed along with everything else, whatever it is."""

    def __init__(self, bundle: bytes) -> None:
        self.bundle = bundle

    def collect(self, nonce: bytes) -> bytes:
        return self.bundle


@pytest.mark.parametrize("bundle", [b'[{"report":"AA=="}]', b"[ ]", b"", b"null", b"{}", b"0", b"[[]]"])
def test_gpu_evidence_that_is_none_is_refused(bundle: bytes) -> None:
    data = Collector(SimulatedCpu(clock=clock), Gpus(bundle), NoEndorsements()).collect(CLAIMS, [NONCE]).document(NONCE)
    with pytest.raises(EvidenceError):
        check(data)


@pytest.mark.parametrize("mode", ["on", "devtools"])
def test_a_gpu_mode_without_gpu_evidence_is_refused(mode: str) -> None:
    with pytest.raises(VerificationError) as refused:
        check(document(with_claims(cc_mode=mode)))
    assert refused.value.step == Step.GPU


def test_simulated_evidence_needs_a_policy_that_names_it() -> None:
    for policy in (
        Policy.default(frozenset({bytes(48)})),
        Policy.from_toml(Policy.accept_simulated().to_toml().replace('cpu = ["simulated"]', 'cpu = ["tdx"]').encode()),
    ):
        with pytest.raises(PolicyError, match="proves nothing") as refused:
            check(DOCUMENT, policy=policy)
        assert refused.value.claim == "cpu"


def test_empty_models_under_a_valid_signature_are_refused() -> None:
    value = json.loads(CLAIMS.encode())
    value["models"] = []
    claims = json.dumps(value, sort_keys=True, separators=(",", ":")).encode()
    root = NonceTree([NONCE]).root
    cpu: CpuEvidence = SimulatedCpu(clock=clock).report(report_data(root, claims, b"[]"))
    with pytest.raises(EvidenceError, match="models is empty"):
        check(Evidence(claims, NonceProof(root, 0, 1, ()), cpu, b"[]").encode())


def test_time_needs_a_zone() -> None:
    with pytest.raises(ValueError, match="time zone"):
        check(DOCUMENT, now=NOW.replace(tzinfo=None))


def test_time_in_another_zone_is_the_same_time() -> None:
    east = datetime.timezone(datetime.timedelta(hours=9))
    assert check(DOCUMENT, now=NOW.astimezone(east)).claims == CLAIMS
    with pytest.raises(PolicyError):
        check(DOCUMENT, now=NOW.replace(tzinfo=east))


def test_only_verify_makes_verified_evidence() -> None:
    verified = check(DOCUMENT)
    fields = {field.name: getattr(verified, field.name) for field in dataclasses.fields(verified)}
    with pytest.raises(TypeError):
        VerifiedEvidence(**fields)
    with pytest.raises(TypeError, match="only"):
        VerifiedEvidence(token=object(), **fields)
    with pytest.raises((TypeError, ValueError)):
        dataclasses.replace(verified, facts=dataclasses.replace(verified.facts, claims=with_claims(replica="evil")))
    with pytest.raises(dataclasses.FrozenInstanceError):
        verified.claims = with_claims(replica="evil")  # type: ignore[misc]
    assert copy.copy(verified).claims == CLAIMS


def test_repr_is_short_and_names_what_it_is() -> None:
    text = repr(check(DOCUMENT))
    assert text.startswith("VerifiedEvidence(simulated, replica=alpha, document_sha256=")
    assert CLAIMS.key_configurations.hex() not in text
    assert len(text) < 200


def test_the_devices_own_time_is_judged_too() -> None:
    """Old claims cannot hide behind a new report, nor a new claim behind an old report."""
    for issued_at, name in ((START - 361, "report"), (START + 61, "report")):
        with pytest.raises(PolicyError, match=name):
            check(document(cpu=OddCpu(issued_at=issued_at)))
