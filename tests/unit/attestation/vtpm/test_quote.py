"""Quotes of a TPM: real ones, and each thing wrong with one."""

import contextlib
import hashlib
import json
import struct
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from hypothesis import given, settings
from hypothesis import strategies as st

from adytum.attestation.core.checks import Checks
from adytum.attestation.core.errors import AttestationError, EvidenceError, VerificationError
from adytum.attestation.vtpm.hcl import HclReport
from adytum.attestation.vtpm.quote import TpmQuote, verify_quote

KEY = rsa.generate_private_key(65537, 2048)
PCRS = tuple(bytes([n]) * 32 for n in range(24))
REAL = ("milan-v3-quote", "milan-v3-quote-user-data", "genoa-v3-quote")


def message(
    *,
    magic: int = 0xFF544347,
    kind: int = 0x8018,
    data: bytes = b"q" * 32,
    selections: tuple[tuple[int, bytes], ...] = ((0x000B, b"\xff\xff\xff"),),
    pcrs: tuple[bytes, ...] = PCRS,
    safe: int = 1,
) -> bytes:
    selected = b"".join(struct.pack(">HB", algorithm, len(bits)) + bits for algorithm, bits in selections)
    return (
        struct.pack(">IH", magic, kind)
        + struct.pack(">H", 34) + b"\x00\x0b" + b"n" * 32
        + struct.pack(">H", len(data)) + data
        + struct.pack(">QIIBQ", 1, 2, 3, safe, 4)
        + struct.pack(">I", len(selections)) + selected
        + struct.pack(">H", 32) + hashlib.sha256(b"".join(pcrs)).digest()
    )  # fmt: skip


def sign(data: bytes, key: rsa.RSAPrivateKey = KEY) -> bytes:
    return key.sign(data, padding.PKCS1v15(), hashes.SHA256())


def verified(data: bytes, pcrs: tuple[bytes, ...] = PCRS, signature: bytes | None = None) -> TpmQuote:
    signature = sign(data) if signature is None else signature
    return verify_quote(data, signature, pcrs, KEY.public_key(), Checks())


def test_the_list_of_cases_is_complete(vectors: Path) -> None:
    assert {path.name for path in (vectors / "azure-vtpm").iterdir() if path.is_dir()} == set(REAL)


@pytest.mark.parametrize("case", REAL)
def test_real_quotes(vectors: Path, case: str) -> None:
    folder = vectors / "azure-vtpm" / case
    says = json.loads((folder / "case.json").read_text())
    key = HclReport.parse((folder / "hcl-report.bin").read_bytes()).attestation_key
    pcrs = [bytes.fromhex(pcr) for pcr in json.loads((folder / "pcrs.json").read_text())]
    data, signature = (folder / "quote-message.bin").read_bytes(), (folder / "quote-signature.bin").read_bytes()
    checks = Checks()
    quote = verify_quote(data, signature, pcrs, key, checks)
    assert quote.qualifying_data.hex() == says["qualifying_data"]
    assert quote.safe
    assert quote.signer[:2] == b"\x00\x0b"
    assert [check.code for check in checks.passed] == ["vtpm.quote.signature", "vtpm.quote.pcrs"]
    for place in range(24):
        others = [*pcrs]
        others[place] = bytes(31) + b"\x07"
        with pytest.raises(VerificationError) as caught:
            verify_quote(data, signature, others, key, Checks())
        assert caught.value.code == "vtpm.quote.pcrs"
    for place in range(len(data)):
        other = data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]
        with pytest.raises((VerificationError, EvidenceError)):
            verify_quote(other, signature, pcrs, key, Checks())


def test_a_made_quote() -> None:
    quote = verified(message())
    assert (quote.qualifying_data, quote.clock, quote.resets, quote.restarts, quote.firmware) == (b"q" * 32, 1, 2, 3, 4)


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (message(magic=0xFF544348), "malformed"),
        (message(magic=0), "malformed"),
        (message(kind=0x8017), "malformed"),
        (message(kind=0x801A), "malformed"),
        (message(safe=2), "malformed"),
        (message() + b"\x00", "malformed"),
        (message() + bytes(1024), "malformed"),
        (message(selections=((0x000B, b"\xff"),) * 17), "malformed"),
        (message(selections=()), "vtpm.quote.selection"),
        (message(selections=((0x000B, b"\xff\xff\x7f"),)), "vtpm.quote.selection"),
        (message(selections=((0x000B, b"\x00\x00\x00"),)), "vtpm.quote.selection"),
        (message(selections=((0x0004, b"\xff\xff\xff"),)), "vtpm.quote.selection"),
        (message(selections=((0x000C, b"\xff\xff\xff"),)), "vtpm.quote.selection"),
        (message(selections=((0x000B, b"\xff\xff\xff\x00"),)), "vtpm.quote.selection"),
        (message(selections=((0x000B, b"\xff\xff\xff"),) * 2), "vtpm.quote.selection"),
        (message(selections=((0x0004, b"\x00\x00\x00"), (0x000B, b"\xff\xff\xff"))), "vtpm.quote.selection"),
        (message(pcrs=PCRS[::-1]), "vtpm.quote.pcrs"),
    ],
    ids=range(17),
)
def test_one_thing_wrong(data: bytes, code: str) -> None:
    with pytest.raises((VerificationError, EvidenceError)) as caught:
        verified(data)
    assert caught.value.code == code


@pytest.mark.parametrize(
    "signature",
    [
        b"",
        bytes(256),
        sign(message(), rsa.generate_private_key(65537, 2048)),
        sign(message(data=b"other")),
        KEY.sign(message(), padding.PKCS1v15(), hashes.SHA1()),
        KEY.sign(message(), padding.PKCS1v15(), hashes.SHA384()),
        KEY.sign(message(), padding.PSS(padding.MGF1(hashes.SHA256()), 32), hashes.SHA256()),
        sign(message()) + b"\x00",
        sign(message())[:-1],
    ],
    ids=range(9),
)
def test_signatures_that_do_not_hold(signature: bytes) -> None:
    with pytest.raises(VerificationError) as caught:
        verified(message(), signature=signature)
    assert caught.value.code == "vtpm.quote.signature"


@pytest.mark.parametrize(
    "pcrs", [(), PCRS[:-1], (*PCRS, bytes(32)), (*PCRS[:-2], PCRS[22] + PCRS[23]), (b"".join(PCRS),)]
)
def test_registers_of_another_shape(pcrs: tuple[bytes, ...]) -> None:
    """The same bytes, cut otherwise, would have the same digest."""
    with pytest.raises(EvidenceError, match="24 values"):
        verified(message(), pcrs)


def test_truncated_anywhere() -> None:
    for size in range(len(message())):
        with pytest.raises(EvidenceError):
            verified(message()[:size])


def test_every_bit_of_the_signature_counts() -> None:
    good = sign(message())
    for place in range(0, 8 * len(good), 7):
        other = bytearray(good)
        other[place // 8] ^= 1 << place % 8
        with pytest.raises(VerificationError):
            verified(message(), signature=bytes(other))


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(st.integers(0, len(message())), st.binary(max_size=20), st.integers(0, 20), st.lists(st.binary(max_size=33)))
def test_only_our_errors_escape(at: int, inserted: bytes, cut: int, pcrs: list[bytes]) -> None:
    """Invariant: whatever the message and the registers, verification gives a quote or an `AttestationError`."""
    data = message()[:at] + inserted + message()[at + cut :]
    with contextlib.suppress(AttestationError):
        verified(data, tuple(pcrs))


def test_too_long() -> None:
    with pytest.raises(EvidenceError, match="more than"):
        TpmQuote.parse(message(data=bytes(1024)))
