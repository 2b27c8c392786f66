"""Parsing of the paravisor's reports."""

import base64
import contextlib
import hashlib
import json
import struct
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from hypothesis import given, settings
from hypothesis import strategies as st

from adytum.attestation.core.errors import AttestationError, EvidenceError, UnsupportedError
from adytum.attestation.core.limits import LIMITS
from adytum.attestation.vtpm.hcl import HclReport
from tests.unit.attestation.vtpm.software_tpm import hashed, hcl_report, jwk_number, runtime_data

KEY = rsa.generate_private_key(65537, 2048).public_key()
RUNTIME = runtime_data(KEY, b"u" * 64)
SNP = b"\x03" + bytes(0x4F) + hashed(RUNTIME) + bytes(1184 - 0x90)
REPORT = hcl_report(SNP, RUNTIME)
REAL = {
    "azure-vtpm/milan-v3-quote": "",
    "azure-vtpm/milan-v3-quote-user-data": (
        "982f5c6e45df0ed3f10b6f60b02f0c8390e281300f3805e2279c16168cd6ae9aa398f647caa2338748cd0fd9f5f819ef"
    ),
    "azure-vtpm/genoa-v3-quote": "",
    "sev-snp/milan-v2-azure-hcl": "",
    "sev-snp/genoa-v3-azure": "",
}
"""Case, and the user data in hexadecimal without the zero bytes that fill it up."""


def report(runtime: dict[str, object] | bytes) -> bytes:
    return hcl_report(SNP, runtime if isinstance(runtime, bytes) else json.dumps(runtime).encode())


def test_the_list_of_cases_is_complete(vectors: Path) -> None:
    assert {path.parent.relative_to(vectors).as_posix() for path in vectors.glob("*/*/hcl-report.bin")} == set(REAL)


@pytest.mark.parametrize(("case", "user_data"), REAL.items())
def test_real_reports(vectors: Path, case: str, user_data: str) -> None:
    data = (vectors / case / "hcl-report.bin").read_bytes()
    hcl = HclReport.parse(data)
    assert hcl.whole
    assert hcl.user_data == bytes.fromhex(user_data).ljust(64, b"\x00")
    assert hcl.attestation_key.key_size == 2048
    assert hcl.report_data == hashlib.sha256(hcl.runtime_data).digest() + bytes(32)
    assert len(data) == 2600
    assert data == hcl.encoded.ljust(2600, b"\x00")
    snp = vectors / case / "report.bin"
    if snp.exists():
        assert snp.read_bytes() == hcl.snp_report


def test_a_made_report() -> None:
    hcl = HclReport.parse(REPORT + bytes(9))
    assert (hcl.encoded, hcl.snp_report, hcl.runtime_data, hcl.user_data) == (REPORT, SNP, RUNTIME, b"u" * 64)
    assert hcl.attestation_key.public_numbers() == KEY.public_numbers()
    assert hcl.whole


@pytest.mark.parametrize(("hash_type", "method"), [(1, hashlib.sha256), (2, hashlib.sha384), (3, hashlib.sha512)])
def test_hash_types(hash_type: int, method: type) -> None:
    digest = method(RUNTIME).digest().ljust(64, b"\x00")  # type: ignore[attr-defined]
    snp = SNP[:0x50] + digest + SNP[0x90:]
    assert HclReport.parse(hcl_report(snp, RUNTIME, hash_type=hash_type)).whole
    assert HclReport.parse(hcl_report(SNP, RUNTIME, hash_type=hash_type)).whole == (hash_type == 1)


@pytest.mark.parametrize("place", range(0x50, 0x90))
def test_all_of_the_report_data_counts(place: int) -> None:
    snp = bytearray(SNP)
    snp[place] ^= 1
    assert not HclReport.parse(hcl_report(bytes(snp), RUNTIME)).whole


def test_truncated_anywhere() -> None:
    for size in range(len(REPORT)):
        with pytest.raises(EvidenceError):
            HclReport.parse(REPORT[:size])


@pytest.mark.parametrize("tail", [b"\x01", b"\x00\x01", b"{}", b" "])
def test_bytes_after_it(tail: bytes) -> None:
    with pytest.raises(EvidenceError, match="follows"):
        HclReport.parse(REPORT + tail)


def test_every_byte_counts() -> None:
    """Each byte, changed. Accepted with the same content: the version (1 and 2 are the same) and the request type,
    status and reserved bytes of the header, which nothing reads. The SNP report and what its hash covers are other
    content, which verification holds against signatures."""
    original = HclReport.parse(REPORT)
    same, torn = set(), set()
    for place in range(len(REPORT)):
        for mask in (1, 3, 0x80):
            other = bytearray(REPORT)
            other[place] ^= mask
            try:
                hcl = HclReport.parse(bytes(other))
            except AttestationError:
                continue
            if (hcl.snp_report, hcl.runtime_data, hcl.report_data) == (SNP, RUNTIME, original.report_data):
                same.add(place)
            else:
                torn.add(place)
                assert hcl.snp_report != SNP or not hcl.whole
    assert same == {4, *range(12, 32)}
    assert set(range(32, 1216)) <= torn
    assert not torn & set(range(1216, 1228))


@pytest.mark.parametrize(
    ("place", "value", "error"),
    [
        (0, 0x41424344, EvidenceError),
        (4, 3, UnsupportedError),
        (4, 0, UnsupportedError),
        (8, len(REPORT) - 1, EvidenceError),
        (8, len(REPORT) + 1, EvidenceError),
        (1216, 19 + len(RUNTIME), EvidenceError),
        (1220, 2, UnsupportedError),
        (1224, 0, UnsupportedError),
        (1224, 4, UnsupportedError),
        (1228, 0, UnsupportedError),
        (1228, 4, UnsupportedError),
        (1232, len(RUNTIME) - 1, EvidenceError),
        (1232, len(RUNTIME) + 1, EvidenceError),
        (1232, 0, EvidenceError),
        (1232, LIMITS.runtime_data + 1, EvidenceError),
        (1232, 2**32 - 1, EvidenceError),
    ],
)
def test_fields_out_of_range(place: int, value: int, error: type[AttestationError]) -> None:
    with pytest.raises(error):
        HclReport.parse(REPORT[:place] + struct.pack("<I", value) + REPORT[place + 4 :])


def test_too_long() -> None:
    with pytest.raises(EvidenceError, match="more than"):
        HclReport.parse(REPORT + bytes(LIMITS.report))


JWK = json.loads(RUNTIME)["keys"][0]


@pytest.mark.parametrize(
    "runtime",
    [
        b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 20_000, b'{"a":1,"a":2}', b"1" * 5000, b'{"keys":"x"}',
        {}, {"keys": []}, {"keys": [1]}, {"keys": [JWK, JWK]}, {"keys": [JWK | {"kid": "HCLEkPub"}]},
        {"keys": [JWK | {"kty": "EC"}]}, {"keys": [JWK | {"key_ops": ["encrypt"]}]}, {"keys": [JWK | {"key_ops": []}]},
        {"keys": [JWK | {"e": "Aw"}]}, {"keys": [JWK | {"e": ""}]}, {"keys": [JWK | {"e": 65537}]},
        {"keys": [JWK | {"n": jwk_number(3)}]}, {"keys": [JWK | {"n": jwk_number(2**4096 + 1)}]},
        {"keys": [JWK | {"n": jwk_number(2**2048 - 2)}]}, {"keys": [JWK | {"n": JWK["n"] + "="}]},
        {"keys": [JWK | {"n": "A"}]}, {"keys": [JWK | {"n": JWK["n"] + "\u0661"}]},
        {"keys": [{name: value for name, value in JWK.items() if name != "n"}]},
        {"keys": [JWK], "user-data": None}, {"keys": [JWK], "user-data": "00" * 63},
        {"keys": [JWK], "user-data": "00" * 65},
        {"keys": [JWK], "user-data": "0g" * 64}, {"keys": [JWK], "user-data": ["00" * 64]},
        {"keys": [JWK], "user-data": " " + "00" * 63 + " "}, {"keys": [JWK], "user-data": "\u0661" * 128},
    ],
    ids=range(34),
)  # fmt: skip
def test_runtime_data_that_is_malformed(runtime: dict[str, object] | bytes) -> None:
    with pytest.raises(EvidenceError):
        HclReport.parse(report(runtime))


def test_user_data_in_either_case_or_absent() -> None:
    assert HclReport.parse(report({"keys": [JWK], "user-data": "aB" * 64})).user_data == b"\xab" * 64
    assert HclReport.parse(report({"keys": [JWK]})).user_data is None


@settings(max_examples=300, deadline=None)
@given(st.integers(0, len(REPORT)), st.binary(max_size=40), st.integers(0, 40))
def test_only_our_errors_escape(at: int, inserted: bytes, cut: int) -> None:
    """Invariant: whatever the bytes, parsing gives a report or an `AttestationError`."""
    with contextlib.suppress(AttestationError):
        HclReport.parse(REPORT[:at] + inserted + REPORT[at + cut :])


_JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(["keys", "user-data", "kid", "kty", "key_ops", "e", "n"]), _JSON)
def test_only_our_errors_escape_for_json(name: str, value: object) -> None:
    """Invariant: whatever JSON is in the runtime data, parsing gives a report or an `AttestationError`."""
    runtime: dict[str, object] = {"keys": [JWK], "user-data": "00" * 64}
    runtime = runtime | {name: value} if name in runtime else runtime | {"keys": [JWK | {name: value}]}
    with contextlib.suppress(AttestationError):
        HclReport.parse(report(runtime))


def test_base64url_is_what_real_keys_use() -> None:
    assert base64.urlsafe_b64decode(JWK["e"]) == b"\x01\x00\x01"


def test_what_is_too_long_or_twice_is_named() -> None:
    runtime = RUNTIME[:-1] + b',"x":"' + b"y" * LIMITS.runtime_data + b'"}'
    with pytest.raises(EvidenceError, match="more than"):
        HclReport.parse(hcl_report(SNP, runtime))
    with pytest.raises(EvidenceError, match="twice"):
        HclReport.parse(hcl_report(SNP, RUNTIME[:-1] + b',"user-data":"' + b"00" * 64 + b'"}'))
