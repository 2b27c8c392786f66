"""The quote of a TPM 2.0: parsing and verification. What the registers should be is a matter of policy.

TPMS_ATTEST, integers big-endian (TCG, TPM 2.0 Library Part 2, 10.12.8): magic u32 = TPM_GENERATED, type u16, the
signer's name (u16 size, bytes), extra data (u16 size, bytes), clock information (clock u64, resets u32, restarts u32,
safe u8), firmware version u64, then of a quote: count u32 of selections (hash u16, size u8, bits), and the digest of
the selected registers (u16 size, bytes).
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding, rsa

from adytum.attestation.core.checks import Checks
from adytum.attestation.core.errors import EvidenceError, Step, VerificationError
from adytum.attestation.core.reader import Reader

PCRS = 24
SHA256 = 0x000B
ALL_PCRS = (SHA256, b"\xff\xff\xff")
"""The one selection that is accepted: every register of the SHA-256 bank."""
_GENERATED = 0xFF544347
_QUOTE = 0x8018
_LARGEST = 1024
"""Bytes of a quote: two hashes, a name and some numbers."""
_SELECTIONS = 16


@dataclass(frozen=True)
class TpmQuote:
    """A quote's message, parsed and not yet verified."""

    signer: bytes
    """The key's name: a hash over its public area and its parents'. Not checked: the runtime data names the key."""
    qualifying_data: bytes
    """The caller's data, which the TPM signs."""
    clock: int
    """Milliseconds of the TPM's running time."""
    resets: int
    restarts: int
    safe: bool
    firmware: int
    selections: tuple[tuple[int, bytes], ...]
    """Hash algorithm, and a bit per register, the first in the lowest bit of the first byte."""
    pcr_digest: bytes

    @classmethod
    def parse(cls, message: bytes) -> Self:
        """Reads a TPMS_ATTEST of a quote. Raises `EvidenceError`."""
        if len(message) > _LARGEST:
            raise EvidenceError(f"the TPM's quote has {len(message)} bytes, more than {_LARGEST}")
        rest = Reader(message, "the TPM's quote", order="big")
        magic, kind = rest.unpack(">IH")
        if magic != _GENERATED:
            raise EvidenceError("the message does not begin like one that a TPM made")
        if kind != _QUOTE:
            raise EvidenceError(f"the message is of type {kind:#06x} and not a quote (0x8018)")
        signer, qualifying_data = rest.sized(2), rest.sized(2)
        clock, resets, restarts, safe, firmware, count = rest.unpack(">QIIBQI")
        if safe > 1 or count > _SELECTIONS:
            raise EvidenceError("the TPM's quote has a field out of its range")
        selections = []
        for _ in range(count):
            algorithm, size = rest.unpack(">HB")
            selections.append((algorithm, rest.take(size)))
        pcr_digest = rest.sized(2)
        rest.end()
        return cls(
            signer, qualifying_data, clock, resets, restarts, bool(safe), firmware, tuple(selections), pcr_digest
        )

    def covers(self, pcrs: Sequence[bytes]) -> bool:
        """Whether the digest is that of these registers."""
        return hashlib.sha256(b"".join(pcrs)).digest() == self.pcr_digest


def verify_quote(
    message: bytes, signature: bytes, pcrs: Sequence[bytes], key: rsa.RSAPublicKey, checks: Checks
) -> TpmQuote:
    """Verifies a quote over all 24 registers of the SHA-256 bank. Raises `AttestationError`, or returns it.

    1. Structure: the message is a quote (`EvidenceError`).
    2. Signature: RSASSA-PKCS1v15 with SHA-256 by `key`. A TPM's restricted key signs such a message only if the TPM
       made it.
    3. Selection: the quote covers all registers, so no unquoted register can be presented.
    4. Registers: their hash is the quote's digest.

    The caller compares the qualifying data.
    """
    # 1. Structure
    quote = TpmQuote.parse(message)

    # 2. Signature
    try:
        key.verify(signature, message, padding.PKCS1v15(), hashes.SHA256())
    except InvalidSignature as error:
        raise _wrong("signature", "the TPM's quote was not signed by its attestation key, or was changed") from error
    checks.ok("vtpm.quote.signature", "the TPM's attestation key signed the quote")

    # 3. Selection
    if quote.selections != (ALL_PCRS,):
        raise _wrong("selection", "the TPM's quote is not over all 24 registers of the SHA-256 bank, and only these")
    if len(pcrs) != PCRS or any(len(pcr) != 32 for pcr in pcrs):
        raise EvidenceError(f"the registers are not {PCRS} values of 32 bytes")

    # 4. Registers
    if not quote.covers(pcrs):
        raise _wrong("pcrs", "the registers are not those that the TPM quoted")
    checks.ok("vtpm.quote.pcrs", "the registers are those that the TPM quoted")
    return quote


def _wrong(code: str, message: str) -> VerificationError:
    return VerificationError(Step.CPU_REPORT, f"vtpm.quote.{code}", message)
