"""The container of the four parts."""

import contextlib
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adytum.attestation.core import strict
from adytum.attestation.core.errors import AttestationError, EvidenceError
from adytum.attestation.core.limits import LIMITS
from adytum.attestation.vtpm.evidence import VtpmReport, qualifying_data

REPORT = VtpmReport(
    hcl=b"h" * 50, quote=b"q" * 40, signature=b"s" * 256, pcrs=tuple(bytes([n]) * 32 for n in range(24))
)
ENCODED = REPORT.encode()


def changed(**fields: object) -> bytes:
    return strict.encode({**json.loads(ENCODED), **fields})


def test_there_and_back() -> None:
    assert VtpmReport.parse(ENCODED) == REPORT
    assert VtpmReport.parse(ENCODED).encode() == ENCODED


def test_truncated_anywhere_and_trailing_bytes() -> None:
    for size in range(len(ENCODED)):
        with pytest.raises(EvidenceError):
            VtpmReport.parse(ENCODED[:size])
    for tail in (b"\x00", b" ", b"\n", b"{}"):
        with pytest.raises(EvidenceError):
            VtpmReport.parse(ENCODED + tail)


PCRS = json.loads(ENCODED)["pcrs"]


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"null",
        b"[]",
        changed(more=1),
        json.dumps(json.loads(ENCODED)).encode(),
        strict.encode({name: value for name, value in json.loads(ENCODED).items() if name != "quote"}),
        changed(pcrs=[]),
        changed(pcrs=PCRS[:-1]),
        changed(pcrs=[*PCRS, PCRS[0]]),
        changed(pcrs=[*PCRS[:-1], strict.base64_text(bytes(31))]),
        changed(pcrs=[*PCRS[:-1], strict.base64_text(bytes(33))]),
        changed(pcrs=[*PCRS[:-1], 1]),
        changed(pcrs=dict.fromkeys(PCRS, "")),
        changed(quote=strict.base64_text(bytes(1025))),
        changed(signature=strict.base64_text(bytes(513))),
        changed(hcl=strict.base64_text(bytes(LIMITS.report))),
        changed(hcl="AAA"),
        changed(hcl=None),
    ],
    ids=range(18),
)
def test_malformed(data: bytes) -> None:
    with pytest.raises(EvidenceError):
        VtpmReport.parse(data)


@settings(max_examples=200, deadline=None)
@given(st.integers(0, len(ENCODED)), st.binary(max_size=20), st.integers(0, 20))
def test_only_our_errors_escape(at: int, inserted: bytes, cut: int) -> None:
    """Invariant: whatever the bytes, parsing gives a report or an `AttestationError`."""
    with contextlib.suppress(AttestationError):
        VtpmReport.parse(ENCODED[:at] + inserted + ENCODED[at + cut :])


def test_the_qualifying_data_fits_every_tpm() -> None:
    assert qualifying_data(b"").hex() == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    assert len(qualifying_data(bytes(64))) <= 34
