"""Verification of TDX quotes: real ones at their time, and each thing wrong with those of a fake Intel."""

import contextlib
import datetime
import hashlib
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given, settings
from hypothesis import strategies as st

from adytum.attestation.core.certificates import load_all
from adytum.attestation.core.checks import Checks
from adytum.attestation.core.errors import AttestationError, EvidenceError, Step, UnsupportedError, VerificationError
from adytum.attestation.core.limits import LIMITS
from adytum.attestation.core.trust import INTEL_SGX
from adytum.attestation.document.facts import CpuFacts, TdxFacts
from adytum.attestation.tdx.quote import TdxQuote
from adytum.attestation.tdx.verify import verify_tdx
from tests.unit.attestation.tdx.authority import NOW, Authority, Td, changed, pem
from tests.unit.attestation.tdx.test_quote import CASES, real_quote

INTEL = Authority()
OTHER = Authority()
WITHOUT_COLLATERAL = [
    "tdx.structure",
    "tdx.root",
    "tdx.qe.signature",
    "tdx.qe.identity",
    "tdx.attestation_key",
    "tdx.signature",
    "tdx.module",
]


def at(seconds: int) -> datetime.datetime:
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC)


def verified(
    quote: bytes,
    collateral: object = None,
    *,
    roots: frozenset[bytes] = INTEL.roots,
    now: datetime.datetime = NOW,
    checks: Checks | None = None,
) -> CpuFacts:
    data = json.dumps(collateral).encode() if isinstance(collateral, dict) else collateral
    return verify_tdx(quote, collateral=data, roots=roots, now=now, checks=checks or Checks())  # type: ignore[arg-type]


def real_collateral(vectors: Path, case: str) -> bytes | None:
    """As the verifier takes it. One capture has its parts in files of their own."""
    folder = vectors / "tdx" / case
    if (folder / "collateral.json").exists():
        return (folder / "collateral.json").read_bytes()
    if not (folder / "issuer_chains.json").exists():
        return None
    pck, tcb, *qe = json.loads((folder / "issuer_chains.json").read_text())
    info, identity = (folder / "tcbinfo.json").read_text(), (folder / "qeidentity.json").read_text()
    return json.dumps(
        {
            "pck_crl_issuer_chain": pck,
            "root_ca_crl": (folder / "root_crl.der").read_bytes().hex(),
            "pck_crl": (folder / "pck_crl.der").read_bytes().hex(),
            "tcb_info_issuer_chain": tcb,
            "tcb_info": _inner(info, "tcbInfo"),
            "tcb_info_signature": json.loads(info)["signature"],
            "qe_identity_issuer_chain": qe[0] if qe else tcb,
            "qe_identity": _inner(identity, "enclaveIdentity"),
            "qe_identity_signature": json.loads(identity)["signature"],
        }
    ).encode()


def _inner(text: str, name: str) -> str:
    """The value's own bytes: they are what is signed."""
    found = re.search(rf'"{name}":(\{{.*\}}),"signature"', text)
    assert found
    return found[1]


@pytest.mark.parametrize("case", CASES)
def test_real_quotes_without_collateral(vectors: Path, case: str) -> None:
    checks = Checks()
    proof = verified(real_quote(vectors, case), roots=INTEL_SGX, now=at(1771498731), checks=checks)
    says = json.loads((vectors / "tdx" / case / "case.json").read_text())
    assert proof.report_data.hex() == says["report_data"]
    assert proof.debug == (case == "v4-debug-td")
    assert (proof.tdx, proof.revocation_checked) == (TdxFacts(), False)
    assert proof.valid_until is not None
    assert [check.code for check in checks.passed] == WITHOUT_COLLATERAL
    assert [check.code for check in checks.not_given] == ["tdx.collateral"]
    assert at(1771498731) < proof.valid_until
    assert len(proof.measurement) == 48


WITH_COLLATERAL: list[tuple[str, int, str, str]] = [
    ("v4-uptodate-phala", 1750415547, "UpToDate", ""),
    ("v4-uptodate-phala", 1753006563, "tdx.collateral", "expired"),
    ("v4-uptodate-phala", 1738800000, "tdx.validity", "not on 2025-02-06"),
    ("v5-outdated-phala", 1771498731, "tdx.collateral", "No matching TCB level"),
    ("v4-spr-google", 1688083200, "tdx.collateral", "No matching TCB level"),
]


@pytest.mark.parametrize(("case", "seconds", "outcome", "says"), WITH_COLLATERAL)
def test_real_quotes_with_collateral(vectors: Path, case: str, seconds: int, outcome: str, says: str) -> None:
    pytest.importorskip("dcap_qvl", reason="needs the extra tdx")
    collateral = real_collateral(vectors, case)
    assert collateral is not None
    checks = Checks()
    if outcome.startswith("tdx."):
        with pytest.raises(VerificationError, match=says) as caught:
            verified(real_quote(vectors, case), collateral, roots=INTEL_SGX, now=at(seconds), checks=checks)
        assert (caught.value.step, caught.value.code) == (Step.CPU_REPORT, outcome)
        return
    proof = verified(real_quote(vectors, case), collateral, roots=INTEL_SGX, now=at(seconds), checks=checks)
    assert proof.tdx is not None
    assert (proof.tdx.status, proof.revocation_checked, proof.tdx.advisory_ids) == (outcome, True, ())
    assert proof.valid_until == datetime.datetime(2025, 7, 19, 10, 0, 35, tzinfo=datetime.UTC)
    assert [check.code for check in checks.passed] == [*WITHOUT_COLLATERAL, "tdx.collateral"]
    assert checks.not_given == []


def test_a_real_debug_domain_with_collateral(vectors: Path) -> None:
    pytest.importorskip("dcap_qvl", reason="needs the extra tdx")
    other = real_collateral(vectors, "v4-spr-google")  # The same kind of platform.
    with pytest.raises(VerificationError, match="Debug mode") as caught:
        verified(real_quote(vectors, "v4-debug-td"), other, roots=INTEL_SGX, now=at(1688083200))
    assert caught.value.code == "tdx.collateral"


def test_real_quotes_and_another_root(vectors: Path) -> None:
    for case in CASES:
        with pytest.raises(VerificationError) as caught:
            verified(real_quote(vectors, case), now=at(1771498731))
        assert caught.value.code == "tdx.root"


@pytest.mark.parametrize("td", [Td(), Td(version=5), Td(version=5, body_type=3)], ids=["4", "5", "5 with TDX 1.5"])
def test_fake_intel(td: Td) -> None:
    checks = Checks()
    quote = INTEL.quote(td)
    proof = verified(quote, checks=checks)
    assert (proof.provider, proof.report_data, proof.tdx) == ("tdx", td.report_data, TdxFacts())
    assert proof.measurement == hashlib.sha384(b"".join((td.mrtd, *td.rtmr))).digest()
    assert TdxQuote.parse(quote).td.mrtd == td.mrtd
    assert [check.code for check in checks.passed] == WITHOUT_COLLATERAL


@pytest.mark.parametrize("td", [Td(), Td(version=5), Td(version=5, body_type=3)], ids=["4", "5", "5 with TDX 1.5"])
@pytest.mark.parametrize("status", ["UpToDate", "SWHardeningNeeded", "ConfigurationNeeded", "OutOfDate"])
def test_fake_intel_with_collateral(td: Td, status: str) -> None:
    pytest.importorskip("dcap_qvl", reason="needs the extra tdx")
    proof = verified(INTEL.quote(td), INTEL.collateral(status, advisories=("INTEL-SA-00001",)))
    assert proof.tdx == TdxFacts(status, ("INTEL-SA-00001",), 17)
    assert proof.revocation_checked
    assert proof.valid_until == NOW + datetime.timedelta(days=30)


def test_the_measurement_covers_all_registers() -> None:
    td = Td()
    others = [changed(mrtd=b"x" * 48)]
    others += [changed(rtmr=tuple(b"x" * 48 if place == n else r for place, r in enumerate(td.rtmr))) for n in range(4)]
    values = {verified(INTEL.quote(each)).measurement for each in (td, *others)}
    assert len(values) == 6
    assert verified(INTEL.quote(changed(report_data=b"o" * 64))).measurement in values


WRONG: list[tuple[str, Callable[[], bytes]]] = [
    ("tdx.root", OTHER.quote),
    ("tdx.root", lambda: INTEL.quote(chain=pem(INTEL.pck, INTEL.ca))),
    ("tdx.chain", lambda: INTEL.quote(chain=pem(INTEL.pck, INTEL.root))),
    ("tdx.chain", lambda: INTEL.quote(chain=pem(OTHER.pck, INTEL.ca, INTEL.root))),
    ("tdx.chain", lambda: INTEL.quote(chain=pem(INTEL.root))),
    ("tdx.pck", lambda: INTEL.quote(chain=pem(INTEL.plain, INTEL.ca, INTEL.root))),
    ("tdx.pck", lambda: INTEL.quote(chain=pem(INTEL.ca, INTEL.root))),
    ("tdx.pck", lambda: INTEL.quote(chain=pem(INTEL.tcb, INTEL.root))),
    ("tdx.qe.signature", lambda: INTEL.quote(qe_key=OTHER.pck_key)),
    ("tdx.qe.identity", lambda: INTEL.quote(changed(qe_signer=b"m" * 32))),
    ("tdx.qe.identity", lambda: INTEL.quote(changed(qe_product=1))),
    ("tdx.qe.identity", lambda: INTEL.quote(changed(qe_misc=1))),
    ("tdx.qe.identity", lambda: INTEL.quote(changed(qe_attributes=b"\x17" + bytes(15)))),
    ("tdx.qe.identity", lambda: INTEL.quote(changed(qe_attributes=b"\x05" + bytes(15)))),
    ("tdx.attestation_key", lambda: INTEL.quote(changed(qe_names_key=False))),
    ("tdx.module", lambda: INTEL.quote(changed(mrsignerseam=b"\x01" + bytes(47)))),
    ("tdx.module", lambda: INTEL.quote(changed(seam_attributes=1))),
    ("unsupported", lambda: INTEL.quote(changed(vendor=bytes(16)))),
    ("malformed", lambda: INTEL.quote(chain="")),
    ("malformed", lambda: INTEL.quote(chain=pem(*[INTEL.pck] * (LIMITS.certificates + 1)))),
]


@pytest.mark.parametrize(("code", "quote"), WRONG, ids=[f"{place}-{code}" for place, (code, _) in enumerate(WRONG)])
def test_one_thing_wrong(code: str, quote: Callable[[], bytes]) -> None:
    with pytest.raises((VerificationError, EvidenceError)) as caught:
        verified(quote())
    assert caught.value.code == code


def test_time() -> None:
    quote = INTEL.quote()
    for days in (-101, 1001):
        with pytest.raises(VerificationError) as caught:
            verified(quote, now=NOW + datetime.timedelta(days=days))
        assert caught.value.code == "tdx.validity"


def test_spliced_quotes() -> None:
    """The signature data of one quote under the body of another."""
    one, other = INTEL.quote(), INTEL.quote(changed(report_data=b"o" * 64))
    with pytest.raises(VerificationError) as caught:
        verified(other[:632] + one[632:])
    assert caught.value.code == "tdx.signature"


@pytest.mark.parametrize(
    ("collateral", "says"),
    [
        (lambda: INTEL.collateral(revoked=True), "certificate chain"),
        (lambda: INTEL.collateral("Revoked"), "Revoked"),
        (lambda: INTEL.collateral(by=OTHER), "root CA CRL"),
        (lambda: INTEL.collateral(days=0), "xpired"),
        (lambda: INTEL.collateral() | {"tcb_info": INTEL.collateral("OutOfDate")["tcb_info"]}, "ignature"),
        (lambda: INTEL.collateral() | {"tcb_info_signature": ""}, "Invalid key length"),
        (lambda: INTEL.collateral() | {"qe_identity": "{}"}, "."),
        (lambda: INTEL.collateral() | {"pck_crl": ""}, "."),
        (lambda: INTEL.collateral() | {"tcb_info_issuer_chain": ""}, "."),
    ],
    ids=[
        "revoked",
        "level revoked",
        "another authority",
        "expired",
        "swapped",
        "unsigned",
        "empty",
        "no crl",
        "no chain",
    ],
)
def test_collateral_that_is_wrong(collateral: Callable[[], dict[str, str]], says: str) -> None:
    pytest.importorskip("dcap_qvl", reason="needs the extra tdx")
    with pytest.raises(VerificationError, match=says) as caught:
        verified(INTEL.quote(), collateral())
    assert caught.value.code == "tdx.collateral"


@pytest.mark.parametrize("attributes", [1, 0x10], ids=["debug", "profiling"])
def test_debug_is_shown_and_refused_with_collateral(attributes: int) -> None:
    pytest.importorskip("dcap_qvl", reason="needs the extra tdx")
    quote = INTEL.quote(changed(td_attributes=attributes))
    assert verified(quote).debug
    with pytest.raises(VerificationError) as caught:
        verified(quote, INTEL.collateral())
    assert caught.value.code == "tdx.collateral"


def test_another_chain_in_the_collateral_changes_nothing() -> None:
    pytest.importorskip("dcap_qvl", reason="needs the extra tdx")
    collateral = INTEL.collateral() | {"pck_certificate_chain": pem(OTHER.pck, OTHER.ca, OTHER.root)}
    assert verified(INTEL.quote(), collateral).tdx == TdxFacts("UpToDate", (), 17)


@pytest.mark.parametrize(
    "collateral",
    [
        b"", b"{", b"[]", b"null", b"\xff", b"{}", b"[" * 100_000, b" " * (LIMITS.tdx_collateral + 1),
        json.dumps({**INTEL.collateral(), "pck_crl": "zz"}).encode(),
        json.dumps({**INTEL.collateral(), "tcb_info": 1}).encode(),
        json.dumps({**INTEL.collateral(), "tcb_info": "\ud800"}).encode(),
        json.dumps({**INTEL.collateral(), "more": ""}).encode(),
        json.dumps({name: text for name, text in INTEL.collateral().items() if name != "pck_crl"}).encode(),
        json.dumps(INTEL.collateral()).encode()[:-1] + b',"tcb_info":"{}"}',
    ],
    ids=range(14),
)  # fmt: skip
def test_collateral_that_is_malformed(collateral: bytes) -> None:
    with pytest.raises(EvidenceError):
        verified(INTEL.quote(), collateral)


def test_collateral_that_is_too_long() -> None:
    with pytest.raises(EvidenceError, match="more than"):
        verified(INTEL.quote(), INTEL.collateral() | {"tcb_info": "x" * LIMITS.tdx_collateral})


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """None in `sys.modules` is how Python itself says that a module is not there."""
    monkeypatch.setitem(sys.modules, "dcap_qvl", None)
    with pytest.raises(UnsupportedError, match=re.escape("pip install 'adytum[tdx]'")):
        verified(INTEL.quote(), INTEL.collateral())
    assert verified(INTEL.quote()).tdx == TdxFacts()


@pytest.mark.slow
def test_every_byte_counts() -> None:
    """Each byte of a quote, changed. Accepted is only what is not signed and means the same: the type and place of
    line ends in the PEM text, and text around its blocks, which give the same certificates."""
    quote = INTEL.quote(Td(tail=b""))
    chain_at = quote.index(b"-----BEGIN")
    same = load_all(TdxQuote.parse(quote).pck_chain, "")
    accepted = []
    for place in range(len(quote)):
        other = bytearray(quote)
        other[place] ^= 1 << (place % 8)
        try:
            verified(bytes(other))
        except AttestationError:
            continue
        accepted.append(place)
        assert load_all(TdxQuote.parse(bytes(other)).pck_chain, "") == same
    assert all(place >= chain_at for place in accepted)
    assert len(accepted) < 100


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_only_our_errors_escape(data: st.DataObject) -> None:
    """Invariant: whatever the quote and the collateral, verification gives a proof or an `AttestationError`."""
    pytest.importorskip("dcap_qvl", reason="needs the extra tdx")
    name = data.draw(st.sampled_from(sorted(_COLLATERAL)))
    text = _COLLATERAL[name]
    place, size = data.draw(st.integers(0, len(text))), data.draw(st.integers(0, 40))
    piece = data.draw(st.text(max_size=20) | st.text(alphabet="0123456789abcdef", max_size=20))
    collateral = {**_COLLATERAL, name: text[:place] + piece + text[place + size :]}
    with contextlib.suppress(AttestationError):
        verified(_QUOTE, collateral)


_COLLATERAL = INTEL.collateral()
_QUOTE = INTEL.quote()


def test_a_curve_that_is_not_p256() -> None:
    """The fake's provisioning key on another curve: refused before its signature is looked at."""
    other = Authority(pck_key=ec.generate_private_key(ec.SECP384R1()))
    with pytest.raises(VerificationError) as caught:
        verified(other.quote(qe_key=other.ca_key), roots=other.roots)
    assert caught.value.code == "tdx.pck"
