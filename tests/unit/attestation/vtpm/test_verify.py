"""Verification of SEV-SNP behind a paravisor: real captures, and a fake AMD with a software TPM."""

import datetime
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding

from adytum.attestation.core.certificates import load_all
from adytum.attestation.core.checks import Checks
from adytum.attestation.core.errors import AttestationError, EvidenceError, Step, VerificationError
from adytum.attestation.core.trust import AMD_ARK
from adytum.attestation.document.facts import CpuFacts
from adytum.attestation.vtpm.device import SnpVtpm
from adytum.attestation.vtpm.evidence import PROVIDER, VtpmReport, qualifying_data
from adytum.attestation.vtpm.verify import verify_vtpm
from tests.unit.attestation.vtpm.chip import NOW, Chip
from tests.unit.attestation.vtpm.software_tpm import (
    Paravisor,
    extend,
    hashed,
    hcl_report,
    make_attestation_key,
    runtime_data,
    software_tpm,
)
from tests.unit.attestation.vtpm.test_quote import PCRS, sign
from tests.unit.attestation.vtpm.test_quote import message as quote_message

REAL = {"milan-v3-quote": "milan", "milan-v3-quote-user-data": "milan", "genoa-v3-quote": "genoa"}
AT = datetime.datetime(2025, 9, 1, tzinfo=datetime.UTC)
OWN_CHECKS = [
    "vtpm.structure",
    "vtpm.runtime_data",
    "vtpm.quote.signature",
    "vtpm.quote.pcrs",
    "vtpm.user_data",
]


def real(vectors: Path, case: str) -> tuple[VtpmReport, tuple[bytes, ...]]:
    folder, roots = vectors / "azure-vtpm" / case, vectors / "sev-snp" / "amd-roots"
    files = (folder / "vcek.pem", roots / f"{REAL[case]}_ask.pem", roots / f"{REAL[case]}_ark.pem")
    chain = tuple(load_all(file.read_bytes(), file.name)[0].public_bytes(Encoding.DER) for file in files)
    report = VtpmReport(
        hcl=(folder / "hcl-report.bin").read_bytes().rstrip(b"\x00"),
        quote=(folder / "quote-message.bin").read_bytes(),
        signature=(folder / "quote-signature.bin").read_bytes(),
        pcrs=tuple(bytes.fromhex(pcr) for pcr in json.loads((folder / "pcrs.json").read_text())),
    )
    return report, chain


@pytest.mark.parametrize("case", REAL)
def test_real_captures(vectors: Path, case: str) -> None:
    """All holds but the last step: their quotes were not made for the hash of the user data, as ours are."""
    report, chain = real(vectors, case)
    checks = Checks()
    with pytest.raises(VerificationError) as caught:
        verify_vtpm(report.encode(), chain, ark=AMD_ARK, now=AT, checks=checks)
    assert (caught.value.step, caught.value.code) == (Step.CPU_REPORT, "vtpm.qualifying_data")
    assert [check.code for check in checks.passed if check.code.startswith("vtpm.")] == OWN_CHECKS
    assert "snp.signature" in [check.code for check in checks.passed]


CHIP = Chip()
TPM_KEY = rsa.generate_private_key(65537, 2048)
BINDING = bytes(range(64))


def made(
    *,
    user_data: bytes | None = BINDING,
    quoted: bytes = BINDING,
    runtime: bytes | None = None,
    report_data: bytes | None = None,
    vmpl: int = 0,
    chip: Chip = CHIP,
) -> VtpmReport:
    """Good evidence, but for what the test says."""
    data = runtime_data(TPM_KEY.public_key(), user_data)
    message = quote_message(data=qualifying_data(quoted))
    return VtpmReport(
        hcl=hcl_report(chip.sign(report_data or hashed(data), vmpl), runtime or data),
        quote=message,
        signature=sign(message, TPM_KEY),
        pcrs=PCRS,
    )


def verified(report: VtpmReport | bytes, checks: Checks | None = None) -> CpuFacts:
    data = report if isinstance(report, bytes) else report.encode()
    return verify_vtpm(data, CHIP.certificates, ark=CHIP.ark, now=NOW, checks=checks or Checks())


def test_accepted() -> None:
    checks = Checks()
    proof = verified(made(), checks)
    assert (proof.provider, proof.report_data, proof.pcrs) == (PROVIDER, BINDING, dict(enumerate(PCRS)))
    assert proof.measurement == b"m" * 48
    assert [check.code for check in checks.passed if check.code.startswith("vtpm.")] == [
        *OWN_CHECKS,
        "vtpm.qualifying_data",
    ]


OUR_HASH = hashed(runtime_data(TPM_KEY.public_key(), BINDING))[:32]
OTHER_RUNTIME = runtime_data(rsa.generate_private_key(65537, 2048).public_key(), BINDING)
OTHER_MESSAGE = quote_message(data=qualifying_data(BINDING), pcrs=PCRS[::-1])

WRONG: list[tuple[str, Callable[[], VtpmReport]]] = [
    ("snp.signature", lambda: made(chip=Chip())),
    ("vtpm.vmpl", lambda: made(vmpl=1)),
    ("vtpm.vmpl", lambda: made(vmpl=3)),
    ("vtpm.runtime_data", lambda: made(runtime=OTHER_RUNTIME)),
    ("vtpm.runtime_data", lambda: made(report_data=bytes(64))),
    ("vtpm.runtime_data", lambda: made(report_data=BINDING)),
    ("vtpm.runtime_data", lambda: made(report_data=OUR_HASH + b"x" * 32)),
    ("vtpm.quote.signature", lambda: made(runtime=OTHER_RUNTIME, report_data=hashed(OTHER_RUNTIME))),
    ("vtpm.quote.signature", lambda: replace(made(), signature=bytes(256))),
    ("vtpm.quote.signature", lambda: replace(made(), quote=OTHER_MESSAGE)),
    ("vtpm.quote.pcrs", lambda: replace(made(), quote=OTHER_MESSAGE, signature=sign(OTHER_MESSAGE, TPM_KEY))),
    ("vtpm.quote.pcrs", lambda: replace(made(), pcrs=PCRS[::-1])),
    ("vtpm.user_data", lambda: made(user_data=None)),
    ("vtpm.qualifying_data", lambda: made(quoted=b"o" * 64)),
    ("vtpm.qualifying_data", lambda: made(user_data=b"o" * 64)),
    ("malformed", lambda: replace(made(), hcl=made().hcl + b"\x00")),
    ("malformed", lambda: replace(made(), hcl=made().hcl[:-1])),
    ("malformed", lambda: replace(made(), quote=b"")),
    ("malformed", lambda: replace(made(), pcrs=())),
]


@pytest.mark.parametrize(("code", "report"), WRONG, ids=[f"{n}-{code}" for n, (code, _) in enumerate(WRONG)])
def test_one_thing_wrong(code: str, report: Callable[[], VtpmReport]) -> None:
    with pytest.raises((VerificationError, EvidenceError)) as caught:
        verified(report())
    assert caught.value.code == code


def test_certificates_of_another_chip() -> None:
    other = Chip()
    for certificates, ark, code in (
        (other.certificates, CHIP.ark, "snp.chain.root"),
        (other.certificates, other.ark, "snp.signature"),
        (CHIP.certificates, {}, "snp.product"),
    ):
        with pytest.raises(VerificationError) as caught:
            verify_vtpm(made().encode(), certificates, ark=ark, now=NOW, checks=Checks())
        assert caught.value.code == code
    with pytest.raises(EvidenceError):
        verify_vtpm(made().encode(), (), ark=CHIP.ark, now=NOW, checks=Checks())


def test_parts_of_two_rounds() -> None:
    """Each part of the evidence for another binding, put in place of ours."""
    ours, theirs = made(), made(user_data=b"o" * 64, quoted=b"o" * 64)
    assert verified(theirs).report_data == b"o" * 64
    for spliced in (
        replace(ours, hcl=theirs.hcl),
        replace(ours, quote=theirs.quote, signature=theirs.signature),
        replace(ours, quote=theirs.quote),
        replace(ours, signature=theirs.signature),
    ):
        with pytest.raises(VerificationError):
            verified(spliced)


@pytest.mark.slow
def test_every_byte_of_the_parts_counts() -> None:
    """Each byte of the paravisor's report, changed, and every seventh of quote and registers. Not signed and without a
    meaning are the version (1 and 2 are the same), the request type, status and reserved bytes of the header."""
    report = made()
    accepted = set()
    for place in range(len(report.hcl)):
        other = bytearray(report.hcl)
        other[place] ^= 3
        try:
            proof = verified(replace(report, hcl=bytes(other)))
        except AttestationError:
            continue
        accepted.add(place)
        assert proof.report_data == BINDING
    assert accepted == {4, *range(12, 32)}
    joined = b"".join(report.pcrs)
    for part in (report.quote, report.signature, joined):
        for place in range(0, len(part), 7):
            other = bytearray(part)
            other[place] ^= 1 << place % 8
            changed = bytes(other)
            with pytest.raises(AttestationError):
                verified(
                    replace(report, quote=changed)
                    if part is report.quote
                    else replace(report, signature=changed)
                    if part is report.signature
                    else replace(report, pcrs=tuple(changed[at : at + 32] for at in range(0, len(changed), 32)))
                )


def test_from_the_device_to_the_verifier(tmp_path: Path) -> None:
    """A software TPM, a paravisor with a chip that signs, the device, the verifier."""
    now = [1000.0]

    def sleep(seconds: float) -> None:
        now[0] += seconds

    with software_tpm(tmp_path) as tpm:
        paravisor = Paravisor(tpm, make_attestation_key(tpm), CHIP.sign, lambda: now[0])
        cpu = SnpVtpm(lambda: CHIP.certificates, paravisor, clock=lambda: now[0], sleep=sleep)
        for binding in (BINDING, b"n" * 64):
            evidence = cpu.report(binding)
            assert evidence.provider == PROVIDER
            checks = Checks()
            proof = verify_vtpm(evidence.report, evidence.certificates, ark=CHIP.ark, now=NOW, checks=checks)
            assert proof.report_data == binding
            assert proof.snp is not None
            assert proof.snp.product == "Milan"
            assert proof.pcrs is not None
            assert proof.pcrs[17] == b"\xff" * 32
            assert len([check for check in checks.passed if check.code.startswith("vtpm.")]) == 6
        extend(tpm, 8, b"k" * 32)
        assert VtpmReport.parse(cpu.report(BINDING).report).pcrs[8] != proof.pcrs[8]
