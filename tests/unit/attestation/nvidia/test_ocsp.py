"""OCSP answers: NVIDIA's real ones at their times, and a fake NVIDIA's with one thing wrong in each."""

import contextlib
import datetime
import hashlib
import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509 import ocsp
from cryptography.x509.oid import ExtendedKeyUsageOID
from hypothesis import given, settings
from hypothesis import strategies as st

from adytum.attestation.core.certificates import load_all
from adytum.attestation.core.checks import Checks
from adytum.attestation.core.errors import AttestationError, EvidenceError
from adytum.attestation.core.limits import LIMITS
from adytum.attestation.nvidia.ocsp import Pair, check_ocsp, ocsp_request
from adytum.attestation.nvidia.rim import Rim
from tests.unit.attestation.nvidia.authority import NOW, issue
from tests.unit.attestation.nvidia.rim_authority import (
    DAY,
    GOOD,
    REVOKED,
    UNKNOWN,
    RimAuthority,
    answer,
    good_answers,
    refused,
    responder,
)

CASE = Path("nvidia-gpu") / "h100-550.90.07-full"
DEVICE_TIME = datetime.datetime(2025, 8, 21, 12, tzinfo=datetime.UTC)
RIM_TIME = datetime.datetime(2025, 10, 24, 12, tzinfo=datetime.UTC)
SECOND = datetime.timedelta(seconds=1)
DEVICE = ("gpu_certificate_l2", "gpu_certificate_l3", "gpu_certificate_l4")
DRIVER = ("gpu_rim_l2", "gpu_driver_rim_l3", "gpu_driver_rim_l4")
VBIOS = ("gpu_rim_l2", "gpu_driver_rim_l3", "gpu_vbios_l4")


def real(vectors: Path, *names: str) -> list[bytes]:
    return [(vectors / CASE / "ocsp" / f"{name}.der").read_bytes() for name in names]


def device_pairs(vectors: Path) -> list[Pair]:
    """All but leaf and root."""
    return list(pairwise(load_all((vectors / CASE / "chain.pem").read_bytes(), "the chain")[1:]))


def rim_pairs(vectors: Path, name: str) -> list[Pair]:
    return list(pairwise(Rim.parse((vectors / CASE / f"{name}_rim.xml").read_bytes()).chain))


def check(
    answers: Sequence[bytes], needed: Sequence[Pair], now: datetime.datetime = NOW
) -> tuple[bool, datetime.datetime | None]:
    return check_ocsp(answers, needed, now=now, checks=Checks())


# Real answers


def test_the_list_of_real_answers_is_complete(vectors: Path) -> None:
    assert {path.stem for path in (vectors / CASE / "ocsp").iterdir()} == {*DEVICE, *DRIVER, *VBIOS}


def test_real_answers_about_a_gpu(vectors: Path) -> None:
    checks = Checks()
    covered, until = check_ocsp(real(vectors, *DEVICE), device_pairs(vectors), now=DEVICE_TIME, checks=checks)
    assert covered
    assert until == datetime.datetime(2025, 8, 22, 6, 47, 7, tzinfo=datetime.UTC)
    assert [item.code for item in checks.passed] == ["gpu.ocsp"]
    assert not checks.not_given


@pytest.mark.parametrize(("name", "answers"), [("driver", DRIVER), ("vbios", VBIOS)])
def test_real_answers_about_a_manifests_signer(vectors: Path, name: str, answers: Sequence[str]) -> None:
    covered, until = check(real(vectors, *answers), rim_pairs(vectors, name), RIM_TIME)
    assert covered
    assert until is not None
    assert until.date() == datetime.date(2025, 10, 25)
    # Both manifests together need four different answers.
    both = rim_pairs(vectors, "driver") + rim_pairs(vectors, "vbios")
    assert check(real(vectors, *{*DRIVER, *VBIOS}), both, RIM_TIME)[0]
    assert not check(real(vectors, *answers), both, RIM_TIME)[0]


def test_real_answers_are_current_for_a_day(vectors: Path) -> None:
    needed, answers = device_pairs(vectors), real(vectors, *DEVICE)
    start = datetime.datetime(2025, 8, 21, 6, 47, 8, tzinfo=datetime.UTC)
    for now in (start, start + DAY - SECOND):
        assert check(answers, needed, now)[0]
    for now in (start - 2 * SECOND, start + DAY + SECOND, DEVICE_TIME - 365 * DAY, RIM_TIME):
        with refused("gpu.ocsp.validity"):
            check(answers, needed, now)


@pytest.mark.parametrize("left_out", DEVICE)
def test_every_real_answer_is_needed(vectors: Path, left_out: str) -> None:
    checks = Checks()
    answers = real(vectors, *(name for name in DEVICE if name != left_out))
    covered, until = check_ocsp(answers, device_pairs(vectors), now=DEVICE_TIME, checks=checks)
    assert not covered
    assert until is not None
    assert [item.code for item in checks.not_given] == ["gpu.ocsp"]
    assert "1 certificates" in checks.not_given[0].says


def test_answers_about_others_do_not_count(vectors: Path) -> None:
    """They are passed over, out of date as they may be: a document has those of all its GPUs."""
    others = real(vectors, *DRIVER)
    assert check(others, device_pairs(vectors), DEVICE_TIME) == (False, None)
    assert check(others * 3 + real(vectors, *DEVICE), device_pairs(vectors), DEVICE_TIME)[0]


def test_requests_ask_for_what_real_answers_are_about(vectors: Path) -> None:
    for (certificate, issuer), der in zip(device_pairs(vectors), reversed(real(vectors, *DEVICE)), strict=True):
        request = ocsp.load_der_ocsp_request(ocsp_request(certificate, issuer))
        about = ocsp.load_der_ocsp_response(der)
        assert (request.serial_number, request.issuer_key_hash, request.issuer_name_hash) == (
            about.serial_number,
            about.issuer_key_hash,
            about.issuer_name_hash,
        )
        assert request.hash_algorithm.name == about.hash_algorithm.name == "sha384"
        assert not list(request.extensions)


@pytest.mark.slow
def test_every_byte_of_a_real_answer_counts(vectors: Path) -> None:
    """Every byte, changed in three ways; none is irrelevant."""
    (data,) = real(vectors, DEVICE[0])
    pair = device_pairs(vectors)[-1]
    assert check([data], [pair], DEVICE_TIME)[0]
    for offset in range(len(data)):
        for bit in (0x01, 0x04, 0x80):
            changed = data[:offset] + bytes([data[offset] ^ bit]) + data[offset + 1 :]
            covered = False
            with contextlib.suppress(AttestationError):
                covered = check([changed], [pair], DEVICE_TIME)[0]
            assert not covered, offset


def test_every_truncation_and_tail(vectors: Path) -> None:
    (data,) = real(vectors, DEVICE[0])
    pair = device_pairs(vectors)[-1]
    for end in range(len(data)):
        with pytest.raises(EvidenceError):
            check([data[:end]], [pair], DEVICE_TIME)
    for tail in (b"\0", b"\x30\x00", data):
        with pytest.raises(EvidenceError):
            check([data + tail], [pair], DEVICE_TIME)


# A fake NVIDIA


@pytest.fixture(scope="module")
def authority() -> RimAuthority:
    return RimAuthority()


@pytest.fixture(scope="module")
def pair(authority: RimAuthority) -> Pair:
    return authority.signer.certificate, authority.l3.certificate


def test_good_answers(authority: RimAuthority) -> None:
    needed = list(pairwise(authority.chain))
    answers = good_answers(authority.issuers)
    assert check(answers, needed) == (True, NOW + DAY)
    assert check(answers * 2, needed * 2) == (True, NOW + DAY)
    assert check(list(reversed(answers)), needed)[0]


def test_nothing_is_not_success(authority: RimAuthority, pair: Pair) -> None:
    good = answer(authority.signer.certificate, authority.l3)
    for answers, needed in (([], [pair]), ([], []), ([good], [])):
        checks = Checks()
        assert check_ocsp(answers, needed, now=NOW, checks=checks) == (False, None)
        assert not checks.passed
        assert [item.code for item in checks.not_given] == ["gpu.ocsp"]


@pytest.mark.parametrize("named_by", list(ocsp.OCSPResponderEncoding))
@pytest.mark.parametrize("algorithm", [hashes.SHA1(), hashes.SHA256(), hashes.SHA384()], ids=lambda item: item.name)
def test_forms_that_hold(
    authority: RimAuthority, pair: Pair, named_by: ocsp.OCSPResponderEncoding, algorithm: hashes.HashAlgorithm
) -> None:
    """By the issuer or by its responder, named by key or name, the certificate identified by any of the hashes."""
    about, issuer = authority.signer.certificate, authority.l3
    for data in (
        answer(about, issuer, named_by=named_by, identified_by=algorithm),
        answer(about, issuer, by=issuer, enclosed=[], named_by=named_by, identified_by=algorithm),
        answer(about, issuer, by=issuer, named_by=named_by, identified_by=algorithm),
    ):
        assert check([data], [pair]) == (True, NOW + DAY)


@pytest.mark.parametrize("reason", [None, *(r for r in x509.ReasonFlags if r is not x509.ReasonFlags.unspecified)])
def test_revoked_for_any_reason(authority: RimAuthority, pair: Pair, reason: x509.ReasonFlags | None) -> None:
    """A hold may end; while it lasts, it is a revocation."""
    data = answer(authority.signer.certificate, authority.l3, status=REVOKED, reason=reason)
    for answers in ([data], [answer(authority.signer.certificate, authority.l3), data], [data, data]):
        with refused("gpu.ocsp.revoked", reason.name if reason else "no reason"):
            check(answers, [pair])


def test_a_good_answer_behind_a_bad_one_does_not_help(authority: RimAuthority, pair: Pair) -> None:
    about, issuer = authority.signer.certificate, authority.l3
    good = answer(about, issuer)
    for bad, code in (
        (answer(about, issuer, status=UNKNOWN), "gpu.ocsp.unknown"),
        (answer(about, issuer, status=REVOKED), "gpu.ocsp.revoked"),
        (answer(about, issuer, since=NOW - 3 * DAY, until=NOW - DAY), "gpu.ocsp.validity"),
        (answer(about, issuer, by=responder(authority.ca)), "gpu.ocsp.signature"),
    ):
        for answers in ([bad], [bad, good], [good, bad]):
            with refused(code):
                check(answers, [pair])


def test_times(authority: RimAuthority, pair: Pair) -> None:
    about, issuer = authority.signer.certificate, authority.l3
    for since, until in (
        (NOW + SECOND, NOW + DAY),
        (NOW - DAY, NOW - SECOND),
        # Without an end it would never get old.
        (NOW - DAY, None),
    ):
        with refused("gpu.ocsp.validity"):
            check([answer(about, issuer, since=since, until=until)], [pair])
    assert check([answer(about, issuer, since=NOW, until=NOW)], [pair]) == (True, NOW)
    short = responder(issuer, until=NOW + DAY / 2)
    assert check([answer(about, issuer, by=short)], [pair]) == (True, NOW + DAY / 2)
    with refused("gpu.ocsp.validity", "responder"):
        check([answer(about, issuer, by=responder(issuer, until=NOW - SECOND))], [pair])


def test_who_may_answer(authority: RimAuthority, pair: Pair) -> None:
    about, issuer = authority.signer.certificate, authority.l3
    stranger = RimAuthority()
    good = responder(issuer)
    for by, enclosed in (
        # Without the purpose, or with others.
        (responder(issuer, usage=()), None),
        (responder(issuer, usage=(ExtendedKeyUsageOID.SERVER_AUTH,)), None),
        (responder(issuer, usage=(ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE,)), None),
        # Of another issuer: above, below, a stranger of the same name.
        (responder(authority.ca), None),
        (responder(authority.signer), None),
        (responder(stranger.l3), None),
        (stranger.l3, None),
        (authority.ca, None),
        # About itself.
        (authority.signer, None),
        # The responder's certificate is not in the answer, or another one is.
        (good, []),
        (good, [responder(issuer).certificate]),
    ):
        with refused("gpu.ocsp.signature"):
            check([answer(about, issuer, by=by, enclosed=enclosed)], [pair])
    # The right one is found among others.
    enclosed = [stranger.root.certificate, responder(issuer).certificate, good.certificate]
    assert check([answer(about, issuer, by=good, enclosed=enclosed)], [pair])[0]


def spliced(signed: bytes, other: bytes) -> bytes:
    """The one answer's statement with the other's signature."""
    one, two = (ocsp.load_der_ocsp_response(data) for data in (signed, other))
    assert len(one.tbs_response_bytes) == len(two.tbs_response_bytes)
    return other.replace(two.tbs_response_bytes, one.tbs_response_bytes)


def test_the_key_that_signed(authority: RimAuthority, pair: Pair) -> None:
    about, issuer = authority.signer.certificate, authority.l3
    good = responder(issuer)
    with refused("gpu.ocsp.signature", "is invalid"):
        data = answer(about, issuer, by=good)
        signature = ocsp.load_der_ocsp_response(data).signature
        check([data.replace(signature, signature[:-1] + bytes([signature[-1] ^ 1]))], [pair])
    with refused("gpu.ocsp.signature", "is invalid"):
        check([spliced(answer(about, issuer, by=good), answer(about, issuer, by=good, until=NOW + 9 * DAY))], [pair])
    # Other kinds of key and hash.
    for digest in (hashes.SHA224(), hashes.SHA512()):
        with refused("gpu.ocsp.signature", "ECDSA and SHA-384"):
            check([answer(about, issuer, by=good, digest=digest)], [pair])
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    usage = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.OCSP_SIGNING])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "RSA responder")]))
        .issuer_name(issuer.certificate.subject)
        .public_key(key.public_key())
        .serial_number(7)
        .not_valid_before(NOW - DAY)
        .not_valid_after(NOW + DAY)
        .add_extension(usage, critical=True)
        .sign(issuer.key, hashes.SHA384())
    )
    built = (
        ocsp.OCSPResponseBuilder()
        .add_response(about, issuer.certificate, hashes.SHA384(), GOOD, NOW - DAY, NOW + DAY, None, None)
        .certificates([certificate])
        .responder_id(ocsp.OCSPResponderEncoding.NAME, certificate)
        .sign(key, hashes.SHA384())
    )
    with refused("gpu.ocsp.signature", "ECDSA and SHA-384"):
        check([built.public_bytes(Encoding.DER)], [pair])


def test_an_answer_is_about_one_certificate_of_one_issuer(authority: RimAuthority, pair: Pair) -> None:
    """The same serial number from another issuer is another certificate; so is another number."""
    other = issue("Fake CA", authority.root)
    twin = issue("Fake leaf", other, ca=False)
    about, issuer = authority.signer.certificate, authority.l3
    for data in (
        answer(twin.certificate, other),
        answer(about, other, by=responder(other)),
        answer(about, authority.ca),
        answer(twin.certificate, issuer),
        # A hash that this version does not compute.
        answer(about, issuer, identified_by=hashes.SHA512()),
    ):
        assert check([data], [pair]) == (False, None)


def test_answers_that_are_none(pair: Pair) -> None:
    for status in ocsp.OCSPResponseStatus:
        if status is ocsp.OCSPResponseStatus.SUCCESSFUL:
            continue
        data = ocsp.OCSPResponseBuilder.build_unsuccessful(status).public_bytes(Encoding.DER)
        with refused("gpu.ocsp.status", status.name):
            check([data], [pair])
    for data in (
        b"",
        b"\x00",
        b"\x30\x00",
        json.dumps({}).encode(),
        b"\x30\x03\x0a\x01\x00",
        b"\x30\x84" + b"\xff" * 8,
    ):
        with pytest.raises(EvidenceError):
            check([data], [pair])


def test_requests_carry_no_nonce(authority: RimAuthority) -> None:
    request = ocsp.load_der_ocsp_request(ocsp_request(authority.chain[0], authority.chain[1]))
    assert request.serial_number == authority.chain[0].serial_number
    name = authority.chain[1].subject.public_bytes()
    assert request.issuer_name_hash == hashlib.sha384(name).digest()
    assert not list(request.extensions)


FUZZED = RimAuthority()
ANSWER = answer(FUZZED.signer.certificate, FUZZED.l3)
PAIR = (FUZZED.signer.certificate, FUZZED.l3.certificate)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200))
def test_only_our_error_escapes_from_any_bytes(data: bytes) -> None:
    with contextlib.suppress(AttestationError):
        assert check([data], [PAIR]) == (False, None)


@settings(max_examples=500, deadline=None)
@given(st.integers(0, len(ANSWER) - 1), st.binary(min_size=1, max_size=6))
def test_only_our_error_escapes_from_a_changed_answer(at: int, put: bytes) -> None:
    """Of the same length, so that the outer lengths still hold."""
    changed = (ANSWER[:at] + put + ANSWER[at + len(put) :])[: len(ANSWER)]
    with contextlib.suppress(AttestationError):
        assert check([changed], [PAIR])[0] == (changed == ANSWER)


def test_a_responder_with_a_key_that_no_library_reads(authority: RimAuthority, pair: Pair) -> None:
    """The certificates in an answer are not signed: anyone can put one there."""
    data = answer(authority.signer.certificate, authority.l3)
    curve = bytes.fromhex("06052b81040022")
    assert data.count(curve) == 1
    for other in (bytes.fromhex("06052b8104000a"), bytes.fromhex("06052b81040099")):
        with pytest.raises(EvidenceError):
            check([data.replace(curve, other)], [pair])


def test_certificates_in_an_answer_are_few(authority: RimAuthority, pair: Pair) -> None:
    about, issuer = authority.signer.certificate, authority.l3
    good, other = responder(issuer), responder(authority.ca)
    for more, expected in ((LIMITS.certificates - 1, True), (LIMITS.certificates, False)):
        data = answer(about, issuer, by=good, enclosed=[*[other.certificate] * more, good.certificate])
        if expected:
            assert check([data], [pair])[0]
            continue
        with pytest.raises(EvidenceError, match="more than 8 certificates"):
            check([data], [pair])
