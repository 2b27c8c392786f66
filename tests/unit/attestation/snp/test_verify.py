"""SEV-SNP: every version and line by a fake AMD that signs for real, and each thing that may be wrong with its code."""

import datetime
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given, settings
from hypothesis import strategies as st

from adytum.attestation.core.certificates import load
from adytum.attestation.core.checks import Checks
from adytum.attestation.core.errors import AttestationError, EvidenceError, Step, UnsupportedError, VerificationError
from adytum.attestation.document.facts import CpuFacts
from adytum.attestation.snp.report import SnpReport
from adytum.attestation.snp.verify import verify_snp
from tests.unit.attestation.snp.authority import DAY, LEVELS, NOW, Processor, integer, text

GENOA = Processor()
MASKED = bytes(64)
ORDER = int("ffffffffffffffffffffffffffffffffffffffffffffffffc7634d81f4372ddf581a0db248b0a77aecec196accc52973", 16)


def check(
    processor: Processor = GENOA,
    report: bytes | None = None,
    certificates: tuple[bytes, ...] | None = None,
    pins: Any = None,
    now: datetime.datetime = NOW,
    crls: tuple[bytes, ...] = (),
    checks: Checks | None = None,
) -> CpuFacts:
    return verify_snp(
        processor.report() if report is None else report,
        processor.certificates if certificates is None else certificates,
        ark=processor.pins if pins is None else pins,
        now=now,
        checks=checks or Checks(),
        crls=crls,
    )


@pytest.mark.parametrize("version", [2, 3, 4, 5])
@pytest.mark.parametrize("kind", ["vcek", "vlek"])
@pytest.mark.parametrize("product", ["Milan", "Genoa", "Turin"])
def test_accepted(product: str, kind: str, version: int) -> None:
    processor = Processor(product, kind)
    checks = Checks()
    found = check(processor, processor.report(b"d" * 64, version, vmpl=2), checks=checks)
    assert (found.provider, found.report_data) == ("sev-snp", b"d" * 64)
    assert found.snp is not None
    assert (found.snp.product, found.snp.vek, found.snp.vmpl) == (product, kind, 2)
    assert found.snp.tcb == LEVELS | ({"fmc": 1} if product == "Turin" else {})
    assert found.snp.csp_id == ("CN=cc-fake.example.com" if kind == "vlek" else None)
    assert found.valid_until == NOW + 1000 * DAY
    assert not found.revocation_checked
    assert [check.code for check in checks.not_given] == ["snp.crl"]
    assert [check.code for check in checks.passed] == [
        "snp.structure", "snp.key", "snp.product", "snp.chain", "snp.signature", "snp.tcb",
        *(["snp.chip"] if kind == "vcek" else []),
    ]  # fmt: skip


def test_a_current_list_of_revoked_certificates() -> None:
    found = check(crls=(GENOA.crl(), GENOA.crl(99, until=NOW + 5 * DAY)))
    assert found.revocation_checked
    assert found.valid_until == NOW + 5 * DAY


def wrong(processor: Processor = GENOA, **arguments: Any) -> Callable[[], CpuFacts]:
    return lambda: check(processor, **arguments)


def with_scalars(r: int, s: int) -> bytes:
    return GENOA.report()[:0x2A0] + r.to_bytes(72, "little") + s.to_bytes(72, "little") + bytes(0x170)


FIRST, SECOND, ROOT = GENOA.certificates


@pytest.mark.parametrize(
    ("attempt", "code"),
    [
        (wrong(report=GENOA.report(signer_info=4)), "snp.key"),
        (wrong(report=GENOA.report(signer_info=7 << 2)), "snp.key"),
        (wrong(Processor(kind="vlek"), report=GENOA.report()), "snp.key"),
        (wrong(report=GENOA.report(cpuid=bytes([0x19, 0x01, 1]))), "snp.product"),
        (wrong(pins={}), "snp.product"),
        (wrong(pins={"Genoa": frozenset()}), "snp.product"),
        (wrong(pins={"Genoa": frozenset({bytes(32)})}), "snp.chain.root"),
        (wrong(pins=Processor("Milan").pins | {"Genoa": Processor("Milan").pins["Milan"]}), "snp.chain.root"),
        (wrong(certificates=(FIRST, Processor("Milan").certificates[1], ROOT)), "snp.chain.chain"),
        (wrong(certificates=(FIRST, Processor(kind="vlek").certificates[1], ROOT)), "snp.chain.chain"),
        (wrong(certificates=(FIRST, ROOT, ROOT)), "snp.chain.chain"),
        (wrong(certificates=(FIRST, SECOND, SECOND)), "snp.chain.root"),
        (wrong(Processor(middle_is_ca=False)), "snp.chain.ca"),
        (wrong(now=NOW + 1001 * DAY), "snp.chain.validity"),
        (wrong(now=NOW - 101 * DAY), "snp.chain.validity"),
        (wrong(Processor(until=NOW - DAY)), "snp.chain.validity"),
        (wrong(crls=(GENOA.crl(2),)), "snp.crl.revoked"),
        (wrong(crls=(GENOA.crl(1),)), "snp.crl.revoked"),
        (wrong(crls=(GENOA.crl(), GENOA.crl(2))), "snp.crl.revoked"),
        (wrong(crls=(GENOA.crl(by="vcek"),)), "snp.crl.signature"),
        (wrong(crls=(Processor("Milan").crl(),)), "snp.crl.signature"),
        (wrong(crls=(GENOA.crl(until=NOW - DAY / 2),)), "snp.crl.validity"),
        (wrong(crls=(GENOA.crl(from_=NOW + DAY),)), "snp.crl.validity"),
        (wrong(report=Processor().report()), "snp.signature"),
        (wrong(report=GENOA.report()[:0x2A0] + bytes(0x200)), "snp.signature"),
        (wrong(report=GENOA.report()[:0x2A0] + (b"\xff" * 48 + bytes(24)) * 2 + bytes(0x170)), "snp.signature"),
        (wrong(report=with_scalars(0, 1)), "snp.signature"),
        (wrong(report=with_scalars(1, 0)), "snp.signature"),
        (wrong(report=with_scalars(ORDER, 1)), "snp.signature"),
        (wrong(report=with_scalars(1, ORDER)), "snp.signature"),
        (wrong(report=with_scalars(1, 1)), "snp.signature"),
        (wrong(report=GENOA.report(tcb=bytes(8))), "snp.tcb"),
        (wrong(Processor(extensions={"3.8": integer(199)})), "snp.tcb"),
        (wrong(report=GENOA.report(chip_id=bytes(63) + b"\1")), "snp.chip"),
        (wrong(report=GENOA.report(chip_id=MASKED)), "snp.chip_masked"),
    ],
)  # fmt: skip
def test_rejected_with_its_code(attempt: Callable[[], CpuFacts], code: str) -> None:
    with pytest.raises(VerificationError) as rejected:
        attempt()
    assert (rejected.value.code, rejected.value.step) == (code, Step.CPU_REPORT)


def test_a_provider_key_with_a_chip() -> None:
    vlek = Processor(kind="vlek")
    with pytest.raises(VerificationError) as rejected:
        check(vlek, vlek.report(chip_id=bytes(63) + b"\1"))
    assert rejected.value.code == "snp.chip"


def test_turins_chip_has_eight_bytes_and_zeros() -> None:
    turin = Processor("Turin")
    with pytest.raises(VerificationError) as rejected:
        check(turin, turin.report(chip_id=turin.hwid[:8] + bytes(55) + b"\1"))
    assert rejected.value.code == "snp.chip"


@pytest.mark.parametrize(
    "extensions",
    [
        {"2": None},
        {"2": text("Rome")},
        {"2": b"\x16\x05Gen\x1ba"},
        {"2": b"\x0c\x05Genoa"},
        {"3.1": None},
        {"3.1": b""},
        {"3.1": b"\x02\x01\x80"},
        {"3.1": b"\x02\x02\x00\x09"},
        {"3.1": b"\x02\x02\x01\x00"},
        {"3.1": b"\x04\x01\x09"},
        {"3.8": b"\x02\x81\x01\x09"},
        {"4": None},
        {"4": bytes(63)},
        {"4": b"\x04\x40" + bytes(63)},
        {"5": text("both")},
    ],
)
def test_a_certificate_that_is_none_of_amds(extensions: dict[str, bytes | None]) -> None:
    with pytest.raises(EvidenceError):
        check(Processor(extensions=extensions))


def test_a_key_on_another_curve() -> None:
    processor = Processor(curve=ec.SECP256R1())
    with pytest.raises(EvidenceError, match="P-384"):
        check(processor, GENOA.report())


@pytest.mark.parametrize("certificates", [(), (FIRST,), (FIRST, SECOND), (FIRST, SECOND, ROOT, ROOT), (b"", b"", b"")])
def test_three_certificates(certificates: tuple[bytes, ...]) -> None:
    with pytest.raises(EvidenceError):
        check(certificates=certificates)


@pytest.mark.parametrize("crl", [b"", b"0", ROOT, GENOA.crl()[:-1]])
def test_a_list_that_cannot_be_read(crl: bytes) -> None:
    with pytest.raises(EvidenceError):
        check(crls=(crl,))


@pytest.mark.parametrize(
    ("at", "value"),
    [
        (0x00, 1), (0x00, 6), (0x34, 0), (0x34, 2), (0x30, 4), (0x0B, 4), (0x0A, 1),
        (0x48, 0x20), (0x48, 3 << 2), (0x4C, 1), (0x18B, 1), (0x1EB, 1), (0x1EF, 1), (0x1F8, 1), (0x29F, 1),
        (0x188, 0x17), (0x189, 0x20), (0x2D0, 1), (0x318, 1), (0x330, 1), (0x49F, 1),
    ],
)  # fmt: skip
def test_reserved_values(at: int, value: int) -> None:
    """Signed by the processor's own key all the same: the format refuses, not the signature."""
    data = bytearray(GENOA.report())
    data[at] = value
    signed = bytearray(GENOA.signed(data))
    signed[0x2A0:] = signed[0x2A0:] if at < 0x2A0 else data[0x2A0:]
    with pytest.raises(EvidenceError):
        check(report=bytes(signed))


def test_what_a_report_says() -> None:
    policy = 1 << 16 | 1 << 17 | 1 << 18 | 1 << 19
    report = SnpReport.parse(GENOA.report(policy=policy, platform_info=0b11001001))
    assert (report.debug, report.migration) == (True, True)
    assert report.flags == {"smt", "rapl_disabled", "bit6", "tio"}
    plain = SnpReport.parse(GENOA.report(policy=1 << 17, platform_info=0))
    assert (plain.debug, plain.migration, plain.flags) == (False, False, frozenset())


def test_every_changed_byte_of_a_certificate_is_refused() -> None:
    """Each third byte and the ends of each; a change in none of them may pass."""
    for place, der in enumerate(GENOA.certificates):
        for at in sorted({*range(0, len(der), 3), len(der) - 1, len(der) - 2}):
            changed = der[:at] + bytes([der[at] ^ 0x04]) + der[at + 1 :]
            with pytest.raises(AttestationError):
                check(certificates=(*GENOA.certificates[:place], changed, *GENOA.certificates[place + 1 :]))


@pytest.mark.parametrize("place", [0, 1, 2])
def test_truncated_and_longer_certificates_are_malformed(place: int) -> None:
    der = GENOA.certificates[place]
    for cut in (*(der[:end] for end in range(len(der))), der + b"\0"):
        with pytest.raises(EvidenceError):
            check(certificates=(*GENOA.certificates[:place], cut, *GENOA.certificates[place + 1 :]))


def test_every_changed_byte_of_a_list_of_revoked_certificates_is_refused() -> None:
    crl = GENOA.crl(99)
    assert check(crls=(crl,)).revocation_checked
    for at in range(len(crl)):
        changed = crl[:at] + bytes([crl[at] ^ 0x01]) + crl[at + 1 :]
        with pytest.raises(AttestationError):
            check(crls=(changed,))


def test_truncated_and_longer_lists_are_malformed() -> None:
    crl = GENOA.crl(99)
    for cut in (*(crl[:end] for end in range(len(crl))), crl + b"\0"):
        with pytest.raises(EvidenceError):
            check(crls=(cut,))


@pytest.mark.parametrize(
    "only",
    [
        x509.DeltaCRLIndicator(1),
        x509.IssuingDistributionPoint(None, None, True, False, None, False, False),
        x509.UnrecognizedExtension(x509.ObjectIdentifier("1.2.3"), b"\5\0"),
    ],
    ids=["changes", "users", "unknown"],
)
def test_a_list_that_is_not_complete(only: x509.ExtensionType) -> None:
    with pytest.raises(UnsupportedError, match="complete"):
        check(crls=(GENOA.crl(only=only),))


@pytest.mark.slow
@pytest.mark.parametrize(("product", "version"), [("Milan", 2), ("Genoa", 3), ("Turin", 5)])
def test_every_changed_byte_of_a_report_is_refused(product: str, version: int) -> None:
    """None of the 1,184 is irrelevant: each is signed, a part of the signature, or has to be zero."""
    processor = Processor(product)
    report = processor.report(version=version)
    for at in range(len(report)):
        for bit in (0x01, 0x80):
            with pytest.raises(AttestationError):
                check(processor, report[:at] + bytes([report[at] ^ bit]) + report[at + 1 :])


def test_truncated_and_longer_reports_are_malformed() -> None:
    report = GENOA.report()
    for cut in (*(report[:end] for end in range(len(report))), report + b"\0", report + report):
        with pytest.raises(EvidenceError):
            check(report=cut)


def test_the_other_signature_of_the_same_report_holds() -> None:
    """ECDSA has two for each message, (r, s) and (r, n - s). So a signature, or a hash over one, names no report."""
    report = GENOA.report()
    other = ORDER - int.from_bytes(report[0x2E8:0x318], "little")
    assert check(report=report[:0x2E8] + other.to_bytes(48, "little") + report[0x318:]).report_data == bytes(64)


# The warning is what this test watches: the day on which it is an error.
@pytest.mark.filterwarnings("ignore:Parsed a serial number:cryptography.utils.CryptographyDeprecationWarning")
def test_serial_number_0_can_still_be_read(vectors: Path) -> None:
    """Every VEK has it, and the library warns that it will stop: why pyproject.toml caps its version."""
    seen = 0
    for path in sorted(vectors.glob("sev-snp/*/v?ek.der")):
        assert load(path.read_bytes(), "the VEK").serial_number == 0
        seen += 1
    assert seen == 12


@given(st.binary(max_size=1300))
def test_only_our_errors_escape(data: bytes) -> None:
    with pytest.raises(AttestationError):
        check(report=data)


@settings(deadline=None)
@given(st.integers(0, 1184), st.integers(0, 8), st.binary(max_size=8))
def test_a_spliced_report_is_refused(at: int, length: int, inserted: bytes) -> None:
    data = GENOA.report()
    spliced = data[:at] + inserted + data[at + length :]
    if spliced != data:
        with pytest.raises(AttestationError):
            check(report=spliced)
