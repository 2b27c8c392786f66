"""The CPU's report of the provider `sev-snp-vtpm`: four parts, in canonical JSON.

`hcl` is the paravisor's report, `quote` and `signature` the virtual TPM's quote (TPMS_ATTEST) and its RSA signature,
`pcrs` the 24 registers of the SHA-256 bank, all in base64.
"""

import hashlib
from dataclasses import dataclass
from typing import Self

from adytum.attestation.core import strict
from adytum.attestation.core.errors import EvidenceError
from adytum.attestation.core.limits import LIMITS, Limits
from adytum.attestation.vtpm.quote import PCRS

PROVIDER = "sev-snp-vtpm"
_FIELDS = frozenset({"hcl", "quote", "signature", "pcrs"})
_LARGEST_QUOTE = 1024
_LARGEST_SIGNATURE = 512
"""Bytes of RSA-4096."""


@dataclass(frozen=True)
class VtpmReport:
    """The four parts, not yet verified."""

    hcl: bytes
    quote: bytes
    signature: bytes
    pcrs: tuple[bytes, ...]

    def encode(self) -> bytes:
        """The canonical bytes."""
        return strict.encode(
            {
                "hcl": strict.base64_text(self.hcl),
                "quote": strict.base64_text(self.quote),
                "signature": strict.base64_text(self.signature),
                "pcrs": [strict.base64_text(pcr) for pcr in self.pcrs],
            }
        )

    @classmethod
    def parse(cls, data: bytes, limits: Limits = LIMITS) -> Self:
        """Reads the parts. Raises `EvidenceError`."""
        fields = strict.Fields(strict.decode(data, "the report", limits.report), "report", _FIELDS)
        pcrs = fields.items("pcrs", PCRS, lambda value, where: strict.octets(value, where, 32))
        if len(pcrs) != PCRS or any(len(pcr) != 32 for pcr in pcrs):
            raise EvidenceError(f"report.pcrs is not {PCRS} values of 32 bytes")
        return cls(
            hcl=fields.octets("hcl", limits.report),
            quote=fields.octets("quote", _LARGEST_QUOTE),
            signature=fields.octets("signature", _LARGEST_SIGNATURE),
            pcrs=pcrs,
        )


def qualifying_data(report_data: bytes) -> bytes:
    """The qualifying data of the TPM's quote: the SHA-256 of the 64 bytes of report data.

    The report data itself may not fit: a TPM accepts two bytes more than its largest digest, which is 50 bytes if that
    is SHA-384 (TPM 2.0 Library Part 2, 10.4.3, TPM2B_DATA).
    """
    return hashlib.sha256(report_data).digest()
