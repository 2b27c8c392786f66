"""Verification of one GPU: each thing that can be wrong with the reports of a fake NVIDIA."""

import contextlib
import datetime
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from hypothesis import given, settings
from hypothesis import strategies as st

from adytum.attestation.core.certificates import spki_sha256
from adytum.attestation.core.checks import Checks
from adytum.attestation.core.errors import AttestationError, EvidenceError, Step, VerificationError
from adytum.attestation.core.trust import TrustRoots
from adytum.attestation.document.facts import GpuFacts
from adytum.attestation.nvidia.chain import firmware
from adytum.attestation.nvidia.rim import Rim
from adytum.attestation.nvidia.verify import verify_gpu
from tests.unit.attestation.nvidia.authority import (
    FWIDS,
    NOW,
    SHA384,
    TCB_INFO,
    Authority,
    FakeGpu,
    blocks,
    der,
    issue,
    request,
    response,
    tcb_info,
)
from tests.unit.attestation.nvidia.rim_authority import REVOKED, RimAuthority, answer, good_answers
from tests.unit.attestation.nvidia.test_verify import BASIC, codes

NVIDIA = Authority()
OTHER = Authority()
MANIFESTS = RimAuthority()
ROOTS = replace(NVIDIA.roots, nvidia_rim=MANIFESTS.roots)
NONCE = bytes(range(32))
GPU = FakeGpu(NVIDIA)
DRIVER = {index: (bytes([index + 1]) * 48,) for index in range(30)}
"""What GPU's report has, in the manifest's counting."""
VBIOS = {index: (bytes([index + 1]) * 48,) for index in range(40, 50)}


def verified(
    report: bytes,
    chain: Sequence[bytes],
    *,
    nonce: bytes = NONCE,
    roots: TrustRoots = ROOTS,
    now: datetime.datetime = NOW,
    checks: Checks | None = None,
    rims: Sequence[bytes] = (),
    ocsp: Sequence[bytes] = (),
) -> GpuFacts:
    checks = Checks() if checks is None else checks
    return verify_gpu(report, chain, nonce=nonce, roots=roots, now=now, checks=checks, rims=rims, ocsp=ocsp)


def refused(gpu: FakeGpu = GPU, *, report: bytes | None = None, chain: Sequence[bytes] | None = None,
            now: datetime.datetime = NOW, nonce: bytes = NONCE, roots: TrustRoots = ROOTS,
            rims: Sequence[bytes] = (), ocsp: Sequence[bytes] = ()) -> str:  # fmt: skip
    """The code with which it is refused."""
    with pytest.raises(VerificationError) as caught:
        verified(
            gpu.report(NONCE) if report is None else report, gpu.chain if chain is None else chain,
            nonce=nonce, roots=roots, now=now, rims=rims, ocsp=ocsp,
        )  # fmt: skip
    assert caught.value.step is Step.GPU
    return caught.value.code


@pytest.mark.parametrize("architecture", ["hopper", "blackwell"])
def test_a_made_report(architecture: str) -> None:
    checks = Checks()
    gpu = FakeGpu(NVIDIA, architecture)
    found = verified(gpu.report(NONCE), gpu.chain, checks=checks)
    assert (found.architecture, found.fwid, found.cc_mode) == (architecture, gpu.fwid, "unknown")
    assert codes(checks) == ([*BASIC, "gpu.fwid"], ["gpu.rim", "gpu.ocsp"])


@pytest.mark.parametrize("nonce", [bytes(32), NONCE[:31], NONCE + b"\0", b"", NONCE[::-1]])
def test_another_nonce(nonce: bytes) -> None:
    assert refused(nonce=nonce) == "gpu.nonce"


def test_the_device_s_own_nonce_is_not_the_caller_s() -> None:
    body = request(bytes(32)) + response(blocks(GPU.measurements), GPU.opaque_data(), nonce=NONCE)
    assert refused(report=GPU.signed(body)) == "gpu.nonce"


def test_nothing_of_an_unsigned_report_is_judged() -> None:
    """A wrong nonce, a switch's field and a wrong firmware id: but the signature is wrong first."""
    forger = FakeGpu(NVIDIA, fwid=GPU.fwid[::-1], opaque={26: bytes(128)})
    assert refused(report=forger.report(bytes(32))) == "gpu.signature"


def chain_of(change: Callable[[list[bytes]], list[bytes]]) -> list[bytes]:
    return change(list(GPU.chain))


@pytest.mark.parametrize(
    ("chain", "code"),
    [
        (chain_of(lambda chain: [*chain[:4], OTHER.root.certificate.public_bytes(Encoding.DER)]), "gpu.chain.root"),
        (list(FakeGpu(OTHER).chain), "gpu.chain.root"),
        (chain_of(lambda chain: [chain[0], chain[2], chain[1], *chain[3:]]), "gpu.chain.chain"),
        (chain_of(lambda chain: [FakeGpu(NVIDIA).chain[0], *chain[1:]]), "gpu.chain.chain"),
        (chain_of(lambda chain: [chain[0], chain[0], *chain[2:]]), "gpu.chain.chain"),
        (chain_of(lambda chain: chain[::-1]), "gpu.chain.root"),
        (list(FakeGpu(NVIDIA).chain), "gpu.signature"),
    ],
)
def test_another_chain(chain: list[bytes], code: str) -> None:
    assert refused(chain=chain) == code


@pytest.mark.parametrize(
    "chain",
    [
        [],
        chain_of(lambda chain: chain[:1]),
        chain_of(lambda chain: chain[:4]),
        chain_of(lambda chain: chain[1:]),
        chain_of(lambda chain: [*chain, chain[4]]),
        chain_of(lambda chain: [chain[0][:-1], *chain[1:]]),
        chain_of(lambda chain: [chain[0] + b"\0", *chain[1:]]),
        chain_of(lambda chain: [b"", *chain[1:]]),
    ],
)
def test_a_chain_that_is_not_five_certificates(chain: list[bytes]) -> None:
    with pytest.raises(EvidenceError):
        verified(GPU.report(NONCE), chain)


def test_a_gpu_may_not_issue_certificates() -> None:
    """A leaf below another GPU's leaf: of five certificates, with a true root, and the issuer is no CA."""
    provisioner, identity, root = NVIDIA.above("hopper")
    leaf = issue("Fake device", provisioner, ca=False)
    below = issue("Fake GH100 FMC", leaf, ca=False, extensions={FWIDS: GPU.fwid})
    chain = [issuer.certificate.public_bytes(Encoding.DER) for issuer in (below, leaf, provisioner, identity, root)]
    forged = FakeGpu(NVIDIA)
    forged.key = below.key
    assert refused(report=forged.report(NONCE), chain=chain) == "gpu.chain.ca"


@pytest.mark.parametrize("years", [-2, 11])
def test_another_time(years: int) -> None:
    assert refused(now=NOW + datetime.timedelta(days=365 * years)) == "gpu.chain.validity"


def test_no_root_is_trusted() -> None:
    assert refused(roots=replace(ROOTS, nvidia_device=frozenset())) == "gpu.chain.root"
    assert refused(roots=TrustRoots()) == "gpu.chain.root"


def test_a_key_of_another_curve() -> None:
    gpu = FakeGpu(NVIDIA, curve=ec.SECP256R1())
    with pytest.raises(EvidenceError, match="P-384"):
        verified(gpu.report(NONCE), gpu.chain)


@pytest.mark.parametrize("signature", [bytes(96), b"\xff" * 96, bytes(48) + b"\1" * 48, b"\1" * 48 + bytes(48)])
def test_signatures_that_cannot_be(signature: bytes) -> None:
    assert refused(report=GPU.report(NONCE)[:-96] + signature) == "gpu.signature"


def test_the_last_96_bytes_are_not_the_signature() -> None:
    """Someone who writes his own report and puts a true one's end behind it."""
    true = GPU.report(NONCE)
    with pytest.raises(EvidenceError, match="after its signature"):
        verified(FakeGpu(OTHER).report(NONCE) + true, GPU.chain)
    with pytest.raises(EvidenceError, match="after its signature"):
        verified(true + true[-96:], GPU.chain)


@pytest.mark.parametrize("architecture", ["hopper", "blackwell"])
def test_another_firmware_than_the_certificate_s(architecture: str) -> None:
    gpu = FakeGpu(NVIDIA, architecture, opaque={20: bytes(48)})
    assert refused(gpu) == "gpu.fwid"


def test_a_driver_that_reports_no_firmware() -> None:
    checks = Checks()
    gpu = FakeGpu(NVIDIA, opaque={20: None})
    assert verified(gpu.report(NONCE), gpu.chain, checks=checks).fwid == gpu.fwid
    assert codes(checks) == (BASIC, ["gpu.fwid", "gpu.rim", "gpu.ocsp"])


@pytest.mark.parametrize(
    "extensions",
    [
        {},
        {FWIDS: bytes(60), TCB_INFO: tcb_info(bytes(48))},
        {FWIDS: bytes(47)},
        {TCB_INFO: b""},
        {TCB_INFO: der(0x30)},
        {TCB_INFO: tcb_info()},
        {TCB_INFO: tcb_info(bytes(47))},
        {TCB_INFO: tcb_info(bytes(48)) + b"\0"},
        {TCB_INFO: tcb_info(bytes(48)) + der(0x05)},
        {TCB_INFO: tcb_info(bytes(48)) * 2},
        {TCB_INFO: tcb_info(bytes(48))[:-1]},
        {TCB_INFO: b"\x31" + tcb_info(bytes(48))[1:]},
        {TCB_INFO: der(0x30, der(0x80, b"NVIDIA"))},
        {TCB_INFO: der(0x30, *[der(0xA6, der(0x30, SHA384, der(4, bytes(48))))] * 2)},
        {TCB_INFO: der(0x30, der(0xA6, der(0x31, SHA384, der(4, bytes(48)))))},
        {TCB_INFO: der(0x30, der(0xA6, der(0x30, SHA384, der(4, bytes(48)), der(4, bytes(48)))))},
        {TCB_INFO: der(0x30, der(0xA6, der(0x30, SHA384)))},
        {TCB_INFO: b"\x30\x80" + bytes(4)},
        {TCB_INFO: b"\x30\x84" + bytes(4)},
        {TCB_INFO: b"\x30\x82\x01"},
    ],
)
def test_a_certificate_without_one_firmware(extensions: dict[str, bytes]) -> None:
    gpu = FakeGpu(NVIDIA, extensions=extensions)
    with pytest.raises(EvidenceError, match="certificate"):
        verified(gpu.report(NONCE), gpu.chain)


@pytest.mark.parametrize("kind", [3, 6])
def test_a_report_without_versions(kind: int) -> None:
    gpu = FakeGpu(NVIDIA, opaque={kind: None})
    with pytest.raises(EvidenceError):
        verified(gpu.report(NONCE), gpu.chain)


# Manifests and revocation


def manifests(
    driver: Mapping[int, Sequence[bytes]] = DRIVER, vbios: Mapping[int, Sequence[bytes]] = VBIOS
) -> list[bytes]:
    return [MANIFESTS.rim(driver), MANIFESTS.rim(vbios, version=GPU.vbios_version)]


def answers() -> list[bytes]:
    """About everything that NVIDIA's service answers for."""
    chain = good_answers((GPU.boot_rom, *NVIDIA.above("hopper")))
    return chain + good_answers(MANIFESTS.issuers)


def test_everything_is_given() -> None:
    checks = Checks()
    found = verified(GPU.report(NONCE), GPU.chain, rims=manifests(), ocsp=answers(), checks=checks)
    assert (found.rims_checked, found.measurements_matched, found.revocation_checked) == (True, 40, True)
    assert NOW < found.valid_until <= NOW + datetime.timedelta(days=1)
    passed = [*BASIC, "gpu.fwid", "gpu.rim", "gpu.rim", "gpu.measurements", "gpu.ocsp"]
    assert codes(checks) == (passed, [])


def test_manifests_that_are_read_already() -> None:
    rims = [Rim.parse(data) for data in manifests()]
    found = verify_gpu(GPU.report(NONCE), GPU.chain, nonce=NONCE, roots=ROOTS, now=NOW, checks=Checks(), rims=rims)
    assert found.measurements_matched == 40


@pytest.mark.parametrize("place", range(6))
def test_one_answer_is_missing(place: int) -> None:
    checks = Checks()
    given = answers()
    assert len(given) == 6
    del given[place]
    found = verified(GPU.report(NONCE), GPU.chain, rims=manifests(), ocsp=given, checks=checks)
    assert not found.revocation_checked
    assert codes(checks)[1] == ["gpu.ocsp"]


def test_a_revoked_certificate() -> None:
    hold = answer(GPU.boot_rom.certificate, NVIDIA.above("hopper")[0], status=REVOKED,
                  reason=x509.ReasonFlags.certificate_hold)  # fmt: skip
    assert refused(ocsp=[hold]) == "gpu.ocsp.revoked"
    assert refused(ocsp=[*answers(), hold]) == "gpu.ocsp.revoked"
    assert refused(ocsp=[hold, *answers()]) == "gpu.ocsp.revoked"


@pytest.mark.parametrize("given", [[0], [1]])
def test_one_manifest_is_compared_and_is_not_enough(given: list[int]) -> None:
    checks = Checks()
    both = manifests()
    found = verified(GPU.report(NONCE), GPU.chain, rims=[both[place] for place in given], checks=checks)
    assert (found.rims_checked, found.measurements_matched) == (False, len((DRIVER, VBIOS)[given[0]]))
    assert codes(checks)[1] == ["gpu.rim", "gpu.ocsp"]


@pytest.mark.parametrize("place", [1, 15, 30, 41, 50])
def test_a_measurement_differs(place: int) -> None:
    gpu = FakeGpu(NVIDIA, measurements={**GPU.measurements, place: b"x" * 48})
    with pytest.raises(VerificationError, match=f"measurements {place} ") as caught:
        verified(gpu.report(NONCE), gpu.chain, rims=manifests())
    assert caught.value.code == "gpu.measurements"


def test_a_measurement_is_missing() -> None:
    gpu = FakeGpu(NVIDIA, measurements={n: value for n, value in GPU.measurements.items() if n != 7})
    assert refused(gpu, rims=manifests()) == "gpu.measurements"


def test_measurements_in_another_order() -> None:
    """Each digest has its index: the same 64 values, two of them exchanged."""
    swapped = {**GPU.measurements, 1: GPU.measurements[2], 2: GPU.measurements[1]}
    assert refused(FakeGpu(NVIDIA, measurements=swapped), rims=manifests()) == "gpu.measurements"


@pytest.mark.parametrize(("on", "code"), [(True, "gpu.measurements"), (False, None)])
def test_the_video_decoder_s_measurement_counts_where_it_is_on(on: bool, code: str | None) -> None:
    gpu = FakeGpu(NVIDIA, nvdec0_on=on)
    rims = manifests(driver={**DRIVER, 35: (b"x" * 48,)})
    if code:
        assert refused(gpu, rims=rims) == code
    else:
        assert verified(gpu.report(NONCE), gpu.chain, rims=rims).measurements_matched == 40


def test_a_report_that_does_not_say_whether_the_decoder_is_on() -> None:
    gpu = FakeGpu(NVIDIA, opaque={11: None})
    with pytest.raises(EvidenceError, match="decoder"):
        verified(gpu.report(NONCE), gpu.chain, rims=manifests())


def test_manifests_that_name_one_measurement_both() -> None:
    assert refused(rims=manifests(vbios={**VBIOS, 3: DRIVER[3]})) == "gpu.rim.overlap"


def test_manifests_that_name_nothing() -> None:
    with pytest.raises(EvidenceError, match="no active measurement"):
        verified(GPU.report(NONCE), GPU.chain, rims=manifests(driver={}))
    with pytest.raises(EvidenceError, match="no active measurement"):
        verified(GPU.report(NONCE), GPU.chain, rims=manifests(vbios={}))


def test_nothing_is_left_to_compare() -> None:
    """One manifest, and it only names the measurement that is excused."""
    assert refused(rims=[MANIFESTS.rim({35: (b"x" * 48,)})]) == "gpu.measurements"


def test_two_manifests_of_one_kind() -> None:
    """The second of two could hide what the first says."""
    driver, vbios = manifests()
    loose = MANIFESTS.rim({0: DRIVER[0]})
    for rims in ([driver, loose, vbios], [loose, driver, vbios], [driver, vbios, vbios]):
        with pytest.raises(EvidenceError, match="two manifests"):
            verified(GPU.report(NONCE), GPU.chain, rims=rims)


def test_a_manifest_by_another_signer() -> None:
    forged = RimAuthority()
    assert refused(rims=[forged.rim(DRIVER), manifests()[1]]) == "gpu.rim.chain.root"
    assert refused(rims=[manifests()[0], forged.rim(VBIOS, version=GPU.vbios_version)]) == "gpu.rim.chain.root"


def test_each_root_is_for_its_own_purpose() -> None:
    """NVIDIA's root for devices signs no manifests, and its root for manifests makes no GPU."""
    misused = RimAuthority(root=NVIDIA.root)
    assert refused(rims=[misused.rim(DRIVER), manifests()[1]]) == "gpu.rim.chain.root"
    gpu = FakeGpu(Authority(root=MANIFESTS.root))
    assert refused(gpu) == "gpu.chain.root"


def test_a_manifest_of_another_architecture() -> None:
    checks = Checks()
    rims = [MANIFESTS.rim({0: (bytes(48),)}, product="GB100"), manifests()[1]]
    assert not verified(GPU.report(NONCE), GPU.chain, rims=rims, checks=checks).rims_checked
    assert "gpu.rim" in codes(checks)[1]


def test_a_manifest_that_cannot_be_read() -> None:
    for data in (b"", b"<a/>", b"\xff", manifests()[0][:-1]):
        with pytest.raises(EvidenceError):
            verified(GPU.report(NONCE), GPU.chain, rims=[data])


def test_a_switch_s_report_signed_by_a_gpu() -> None:
    gpu = FakeGpu(NVIDIA, opaque={26: bytes(128)})
    assert refused(gpu) == "unsupported"


# Anything at all


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_only_our_errors_escape(data: st.DataObject) -> None:
    original = GPU.report(NONCE)
    report = bytearray(original)
    chain = [bytearray(item) for item in GPU.chain]
    for part in data.draw(st.lists(st.sampled_from([report, *chain]), min_size=1, max_size=3)):
        at = data.draw(st.integers(0, len(part) - 1))
        part[at : at + data.draw(st.integers(0, 4))] = data.draw(st.binary(max_size=4))
    with contextlib.suppress(AttestationError):
        found = verified(bytes(report), [bytes(item) for item in chain])
        # The drawn bytes were what was there before.
        assert found.key_sha256 == spki_sha256(GPU.certificates[0])
        assert (bytes(report), tuple(map(bytes, chain))) == (original, GPU.chain)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=80))
def test_any_firmware_extension_is_read_or_refused(value: bytes) -> None:
    leaf = issue("leaf", None, ca=False, extensions={TCB_INFO: value}, key=GPU.key)
    with contextlib.suppress(EvidenceError):
        assert len(firmware(leaf.certificate)[1]) == 48
