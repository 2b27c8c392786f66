"""Real SEV-SNP reports against AMD's pinned roots: what each says, and what may not be exchanged between them."""

import datetime
import json
from dataclasses import dataclass
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from adytum.attestation.core.checks import Checks
from adytum.attestation.core.errors import VerificationError
from adytum.attestation.core.trust import AMD_ARK
from adytum.attestation.document.facts import CpuFacts
from adytum.attestation.snp.report import SnpReport
from adytum.attestation.snp.verify import verify_snp

DAY = datetime.timedelta(days=1)
CURRENT = datetime.datetime(2025, 6, 1, tzinfo=datetime.UTC)
"""When the recorded lists of revoked certificates are current."""


@dataclass(frozen=True)
class Case:
    report: bytes
    chain: tuple[bytes, ...]
    begins: datetime.datetime
    ends: datetime.datetime
    roots: Path

    def check(self, *, now: datetime.datetime | None = None, crl: str | None = None) -> CpuFacts:
        crls = () if crl is None else (x509.load_pem_x509_crl((self.roots / crl).read_bytes()),)
        return verify_snp(
            self.report,
            self.chain,
            ark=AMD_ARK,
            now=now or self.begins + DAY,
            checks=Checks(),
            crls=[each.public_bytes(Encoding.DER) for each in crls],
        )


def case(vectors: Path, name: str, vek: str = "vcek") -> Case:
    folder = vectors / "sev-snp" / name
    about = json.loads((folder / "case.json").read_text())
    roots = folder.parent / "amd-roots"
    names = (f"{about['product'].lower()}_{part}.pem" for part in ("ask" if vek == "vcek" else "asvk", "ark"))
    above = (x509.load_pem_x509_certificate((roots / name).read_bytes()).public_bytes(Encoding.DER) for name in names)
    begins, ends = (datetime.datetime.fromisoformat(text) for text in about["vek_validity"])
    return Case(
        (folder / "report.bin").read_bytes(), ((folder / f"{vek}.der").read_bytes(), *above), begins, ends, roots
    )


def code(attempt: Case, **arguments: datetime.datetime) -> str:
    with pytest.raises(VerificationError) as rejected:
        attempt.check(**arguments)
    return rejected.value.code


@pytest.mark.parametrize(
    ("name", "product", "version"),
    [
        ("milan-v2-virtee", "Milan", 2),
        ("milan-v2-azure-hcl", "Milan", 2),
        ("milan-v2-trustee-badvceks", "Milan", 2),
        ("milan-v3-azure-2", "Milan", 3),
        ("milan-v3-dstack", "Milan", 3),
        ("genoa-v3-azure", "Genoa", 3),
        ("genoa-v3-microsoft", "Genoa", 3),
        ("genoa-v3-tsm-auxblob", "Genoa", 3),
        ("siena-v5-lunal", "Genoa", 5),
        ("turin-v5-microsoft", "Turin", 5),
    ],
)
def test_accepted_while_its_certificate_is_valid(name: str, product: str, version: int, vectors: Path) -> None:
    real = case(vectors, name)
    for now in (real.begins, real.ends):
        found = real.check(now=now)
        assert found.snp is not None
        assert (found.snp.product, found.snp.vek, found.snp.csp_id) == (product, "vcek", None)
        assert SnpReport.parse(real.report).version == version
        assert (found.valid_until, found.revocation_checked, found.debug) == (real.ends, False, False)
    for now in (real.begins - datetime.timedelta(seconds=1), real.ends + datetime.timedelta(seconds=1)):
        assert code(real, now=now) == "snp.chain.validity"


def test_a_guest_that_may_be_debugged_is_shown_as_one(vectors: Path) -> None:
    """AMD's hardware signed it; that a host may read this guest's memory is for the policy to refuse."""
    assert case(vectors, "milan-v2-google").check().debug


def test_turins_unknown_flag_is_shown(vectors: Path) -> None:
    found = case(vectors, "turin-v5-microsoft").check().snp
    assert found is not None
    assert found.flags == {"smt", "ecc", "alias_check_complete", "bit6"}
    assert found.tcb == {"fmc": 1, "bootloader": 1, "tee": 1, "snp": 4, "microcode": 81}


def test_a_providers_key(vectors: Path) -> None:
    found = case(vectors, "milan-v3-vlek-aws", "vlek").check().snp
    assert found is not None
    assert (found.vek, found.csp_id, found.vmpl) == ("vlek", "CN=cc-us-east-2.amazonaws.com", 1)
    assert found.chip_id == bytes(64)


@pytest.mark.parametrize("name", ["vcek-invalid-legacy", "vcek-invalid-new"])
def test_forged_certificates(name: str, vectors: Path) -> None:
    real = case(vectors, "milan-v2-trustee-badvceks")
    forged = (vectors / "sev-snp" / "milan-v2-trustee-badvceks" / f"{name}.der").read_bytes()
    assert code(Case(real.report, (forged, *real.chain[1:]), real.begins, real.ends, real.roots)) == "snp.chain.chain"


@pytest.mark.parametrize(
    ("report", "certificate", "expected"),
    [
        # Another chip's key; the same with a later report; another line's; and a key of the other kind.
        ("milan-v2-virtee", "milan-v2-azure-hcl", "snp.signature"),
        ("milan-v3-azure-2", "milan-v3-dstack", "snp.signature"),
        ("genoa-v3-azure", "siena-v5-lunal", "snp.signature"),
        ("genoa-v3-azure", "milan-v3-azure-2", "snp.product"),
        ("milan-v2-virtee", "genoa-v3-azure", "snp.signature"),
        ("milan-v3-vlek-aws", "milan-v3-azure-2", "snp.key"),
    ],
)
def test_another_machines_certificate(report: str, certificate: str, expected: str, vectors: Path) -> None:
    other = case(vectors, certificate)
    data = (vectors / "sev-snp" / report / "report.bin").read_bytes()
    assert code(Case(data, other.chain, other.begins, other.ends, other.roots)) == expected


def test_the_middle_certificate_for_the_other_kind_of_key(vectors: Path) -> None:
    """AMD signs chips' keys by the ASK and providers' keys by the ASVK, both under one ARK."""
    chip, provider = case(vectors, "milan-v3-azure-2"), case(vectors, "milan-v3-vlek-aws", "vlek")
    for one, other in ((chip, provider), (provider, chip)):
        chain = (one.chain[0], other.chain[1], one.chain[2])
        assert code(Case(one.report, chain, one.begins, one.ends, one.roots)) == "snp.chain.chain"


@pytest.mark.parametrize(
    ("name", "crl", "revoked"),
    [("milan-v3-azure-2", "milan_crl.pem", []), ("genoa-v3-azure", "genoa_crl.pem", [131073])],
)
def test_amds_lists_of_revoked_certificates(name: str, crl: str, revoked: list[int], vectors: Path) -> None:
    """Genoa's names an earlier ASK than the one of these chains."""
    real = case(vectors, name)
    found = real.check(now=CURRENT, crl=crl)
    listed = x509.load_pem_x509_crl((real.roots / crl).read_bytes())
    assert (found.revocation_checked, found.valid_until) == (True, listed.next_update_utc)
    assert [each.serial_number for each in listed] == revoked
    assert x509.load_der_x509_certificate(real.chain[1]).serial_number not in revoked
