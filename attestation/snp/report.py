"""The SEV-SNP attestation report: 1,184 bytes, versions 2 to 5. Parsing only.

AMD, "SEV Secure Nested Paging Firmware ABI Specification" (56860), ATTESTATION_REPORT; offsets are those of its table,
and integers are little-endian.
"""

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

from adytum.attestation.core.errors import EvidenceError

SIZE = 1184
SIGNED = 0x2A0
"""The signature covers the bytes before this offset."""
VERSIONS = range(2, 6)
SIGNING_KEYS = {0: "vcek", 1: "vlek", 7: "none"}
_ECDSA_P384_SHA384 = 1
_POLICY_RESERVED = ~((1 << 26) - 1)
_POLICY_ONE = 1 << 17
_SCALAR = 48
_FIELD = 72

FLAGS: Mapping[int, str] = {
    0: "smt",
    1: "tsme",
    2: "ecc",
    3: "rapl_disabled",
    4: "ciphertext_hiding",
    5: "alias_check_complete",
    7: "tio",
}
"""Bits of platform_info. An unknown bit is shown as `bit6` and refused by no rule: real machines set one."""

_COMPONENTS: Mapping[str, tuple[tuple[str, int], ...]] = {
    "Milan": (("bootloader", 0), ("tee", 1), ("snp", 6), ("microcode", 7)),
    "Genoa": (("bootloader", 0), ("tee", 1), ("snp", 6), ("microcode", 7)),
    "Turin": (("fmc", 0), ("bootloader", 1), ("tee", 2), ("snp", 3), ("microcode", 7)),
}
PRODUCTS = frozenset(_COMPONENTS)


def tcb_levels(product: str, tcb: bytes) -> dict[str, int]:
    """Firmware levels by component from the eight bytes of a TCB_VERSION, whose layout depends on the product line."""
    return {name: tcb[place] for name, place in _COMPONENTS[product]}


@dataclass(frozen=True)
class SnpReport:
    """The fields of a report that verification, policy or a command needs; nothing is verified yet."""

    version: int
    policy: int
    vmpl: int
    current_tcb: bytes
    platform_info: int
    signing_key: str
    """vcek, vlek or none."""
    report_data: bytes
    """64 bytes, the caller's."""
    measurement: bytes
    """48 bytes: the launch measurement."""
    reported_tcb: bytes
    product: str | None
    """From the CPUID fields. None in version 2, which has no such fields: the certificate names the product."""
    chip_id: bytes
    signature: tuple[int, int]
    signed: bytes

    @property
    def debug(self) -> bool:
        """Policy bit 19: the host may read the guest's memory through the firmware."""
        return bool(self.policy >> 19 & 1)

    @property
    def migration(self) -> bool:
        """Policy bit 18: a migration agent may be attached."""
        return bool(self.policy >> 18 & 1)

    @property
    def flags(self) -> frozenset[str]:
        """Names of the platform_info bits that are set."""
        return frozenset(FLAGS.get(bit, f"bit{bit}") for bit in range(64) if self.platform_info >> bit & 1)

    @classmethod
    def parse(cls, data: bytes) -> Self:
        """Reads a report. Raises `EvidenceError`."""
        if len(data) != SIZE:
            raise EvidenceError(f"an SEV-SNP report has {SIZE} bytes, this one has {len(data)}")
        version, _, policy = struct.unpack_from("<IIQ", data, 0)
        if version not in VERSIONS:
            raise EvidenceError(f"an SEV-SNP report of version {version}; versions 2 to 5 are supported")
        vmpl, algorithm = struct.unpack_from("<II", data, 0x30)
        if algorithm != _ECDSA_P384_SHA384:
            raise EvidenceError(
                f"the SEV-SNP report's signature algorithm is {algorithm}, not ECDSA P-384 with SHA-384"
            )
        if vmpl > 3:
            raise EvidenceError(f"the SEV-SNP report's VMPL is {vmpl}, not 0 to 3")
        if policy & _POLICY_RESERVED or not policy & _POLICY_ONE:
            raise EvidenceError("the SEV-SNP report's guest policy has reserved bits that are not as specified")
        platform_info, signer_info = struct.unpack_from("<QI", data, 0x40)
        signing_key = SIGNING_KEYS.get(signer_info >> 2 & 7)
        if signing_key is None or signer_info >> 5:
            raise EvidenceError("the SEV-SNP report's signer information has a value that is not specified")
        for start, end in _reserved(version):
            if any(data[start:end]):
                raise EvidenceError(
                    f"the SEV-SNP report has a reserved field that is not zero in version {version} (0x{start:x})"
                )
        return cls(
            version=version,
            policy=policy,
            vmpl=vmpl,
            current_tcb=data[0x38:0x40],
            platform_info=platform_info,
            signing_key=signing_key,
            report_data=data[0x50:0x90],
            measurement=data[0x90:0xC0],
            reported_tcb=data[0x180:0x188],
            product=None if version == 2 else _product(*data[0x188:0x18A]),
            chip_id=data[0x1A0:0x1E0],
            signature=(_scalar(data[SIGNED : SIGNED + _FIELD]), _scalar(data[SIGNED + _FIELD : SIGNED + 2 * _FIELD])),
            signed=data[:SIGNED],
        )


def _reserved(version: int) -> tuple[tuple[int, int], ...]:
    r, s = SIGNED, SIGNED + _FIELD
    return (
        (0x4C, 0x50),
        (0x188 if version == 2 else 0x18B, 0x1A0),
        (0x1EB, 0x1EC),
        (0x1EF, 0x1F0),
        (0x208 if version >= 5 else 0x1F8, SIGNED),
        (r + _SCALAR, r + _FIELD),
        (s + _SCALAR, s + _FIELD),
        (s + _FIELD, SIZE),
    )


def _product(family: int, model: int) -> str:
    """The product line whose certificates apply (Siena and Bergamo use Genoa's). Raises `EvidenceError`."""
    if family == 0x19 and model <= 0x0F:
        return "Milan"
    if family == 0x19 and (0x10 <= model <= 0x1F or 0xA0 <= model <= 0xAF):
        return "Genoa"
    if family == 0x1A and model <= 0x11:
        return "Turin"
    raise EvidenceError(f"the SEV-SNP report is from an unknown processor: family 0x{family:x}, model 0x{model:x}")


def _scalar(field: bytes) -> int:
    return int.from_bytes(field[:_SCALAR], "little")
