"""Parsing of TDX quotes: the fields of real ones, and nothing but the package's errors for the rest."""

import contextlib
import json
import struct
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adytum.attestation.core.errors import AttestationError, EvidenceError, UnsupportedError
from adytum.attestation.core.limits import LIMITS
from adytum.attestation.tdx.quote import TdxQuote
from tests.unit.attestation.tdx.authority import Authority, Td, changed

CASES = ("v4-uptodate-phala", "v5-outdated-phala", "v4-spr-google", "v5-google", "v4-debug-td")
TEXT_TAIL = b"\nextra bytes(only for testing purpose)\n"
"""One of the captures ends in it."""


def real_quote(vectors: Path, case: str) -> bytes:
    return (vectors / "tdx" / case / "quote.bin").read_bytes().removesuffix(TEXT_TAIL)


@pytest.fixture(scope="module")
def made() -> bytes:
    return Authority().quote()


def test_the_list_of_cases_is_complete(vectors: Path) -> None:
    assert {path.name for path in (vectors / "tdx").iterdir() if path.is_dir()} == set(CASES)


@pytest.mark.parametrize("case", CASES)
def test_fields_of_real_quotes(vectors: Path, case: str) -> None:
    says = json.loads((vectors / "tdx" / case / "case.json").read_text())
    quote = TdxQuote.parse(real_quote(vectors, case))
    assert quote.version == says["quote_version"]
    assert quote.td.report_data.hex() == says["report_data"]
    assert quote.td.mrtd.hex() == says["mrtd"]
    assert quote.td.td_attributes.to_bytes(8, "little").hex() == says["td_attributes"]
    assert quote.td.tee_tcb_svn.hex() == says["tee_tcb_svn"]
    assert quote.td.debug == (case == "v4-debug-td")
    assert not quote.td.migratable
    assert (quote.td.tee_tcb_svn2 is not None) == (case.startswith("v5"))
    assert quote.pck_chain.rstrip().endswith(b"-----END CERTIFICATE-----")


def test_text_after_a_real_quote(vectors: Path) -> None:
    raw = (vectors / "tdx" / "v4-spr-google" / "quote.bin").read_bytes()
    assert raw.endswith(TEXT_TAIL)
    with pytest.raises(EvidenceError, match="follows the quote"):
        TdxQuote.parse(raw)


def test_fields_of_a_made_quote() -> None:
    td = Td(version=5, body_type=3, td_attributes=1 << 29)
    quote = TdxQuote.parse(Authority().quote(td))
    assert (quote.version, quote.body_type) == (5, 3)
    assert quote.td.rtmr == td.rtmr
    assert quote.td.xfam == 0x602E7
    assert quote.td.tee_tcb_svn2 == td.tee_tcb_svn
    assert quote.td.mrservicetd == bytes(48)
    assert quote.td.migratable
    assert not quote.td.debug
    assert quote.qe.svn == 7


@pytest.mark.parametrize("bit", range(8))
def test_any_bit_of_debug(bit: int) -> None:
    assert TdxQuote.parse(Authority().quote(changed(td_attributes=1 << bit))).td.debug


def test_zero_bytes_after_it(made: bytes) -> None:
    assert TdxQuote.parse(made + bytes(100)) == TdxQuote.parse(made.rstrip(b"\x00") + b"\x00")
    for tail in (b"\x01", b"\x00\x01", b"\x00" * 50 + b"\xff", b"\n"):
        with pytest.raises(EvidenceError, match="follows the quote"):
            TdxQuote.parse(made + tail)


def test_too_long(made: bytes) -> None:
    with pytest.raises(EvidenceError, match="more than"):
        TdxQuote.parse(made + bytes(LIMITS.report))


@pytest.mark.parametrize("td", [Td(tail=b""), Td(version=5, body_type=3, tail=b"")], ids=["4", "5"])
def test_truncated_anywhere(td: Td) -> None:
    quote = Authority().quote(td)
    TdxQuote.parse(quote)
    for size in range(len(quote)):
        with pytest.raises(EvidenceError):
            TdxQuote.parse(quote[:size])


@pytest.mark.parametrize(
    ("td", "says"),
    [
        (Td(version=3), "version 3"),
        (Td(version=6), "version 6"),
        (Td(key_type=3), "keys of type 3"),
        (Td(version=5, body_type=1), "bodies of type 1"),
        (Td(version=5, body_type=4), "bodies of type 4"),
    ],
    ids=str,
)
def test_what_this_version_cannot_verify(td: Td, says: str) -> None:
    with pytest.raises(UnsupportedError, match=says):
        TdxQuote.parse(Authority().quote(td))


def test_an_sgx_quote() -> None:
    with pytest.raises(EvidenceError, match="TEE type 0x0"):
        TdxQuote.parse(Authority().quote(Td(tee=0)))


def test_body_sizes_that_differ() -> None:
    quote = bytearray(Authority().quote(Td(version=5, body_type=2)))
    quote[48:54] = struct.pack("<HI", 2, 583)
    with pytest.raises(EvidenceError, match="583"):
        TdxQuote.parse(bytes(quote))


def test_lengths_inside_are_exact(made: bytes) -> None:
    """Each length, one less or one more than it is: never a quote that reads as if nothing had happened."""
    signature_data = 48 + 584
    certification = signature_data + 4 + 128
    authentication = certification + 6 + 384 + 64
    chain = authentication + 2 + 32
    for at, size in ((signature_data, 4), (certification + 2, 4), (authentication, 2), (chain + 2, 4)):
        value = int.from_bytes(made[at : at + size], "little")
        for other in (0, value - 1, value + 1, 2 ** (8 * size) - 1):
            with pytest.raises(AttestationError):
                TdxQuote.parse(made[:at] + other.to_bytes(size, "little") + made[at + size :])
    for at in (certification, chain):
        for kind in (1, 3, 4, 7):
            with pytest.raises(UnsupportedError, match=f"type {kind}"):
                TdxQuote.parse(made[:at] + kind.to_bytes(2, "little") + made[at + 2 :])


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_only_our_errors_escape(data: st.DataObject) -> None:
    """Invariant: whatever the bytes, parsing gives a quote or an `AttestationError`."""
    base = data.draw(st.sampled_from([b"", _BASE, _BASE_5]))
    at = data.draw(st.integers(0, len(base)))
    inserted = data.draw(st.binary(max_size=64))
    with contextlib.suppress(AttestationError):
        TdxQuote.parse(base[:at] + inserted + base[at + data.draw(st.integers(0, 64)) :])


_BASE = Authority().quote()
_BASE_5 = Authority().quote(Td(version=5, body_type=3))
