"""The keys that sign SEV-SNP reports, VCEK (one chip) and VLEK (one cloud provider), from their certificates.

AMD, "Versioned Chip Endorsement Key (VCEK) Certificate and KDS Interface Specification" (57230), 3.1.
"""

from dataclasses import dataclass
from typing import Literal, Self

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from adytum.attestation.core.errors import EvidenceError
from adytum.attestation.snp.report import PRODUCTS

_ROOT = "1.3.6.1.4.1.3704.1"
_PRODUCT_NAME = f"{_ROOT}.2"
_HWID = f"{_ROOT}.4"
_CSP_ID = f"{_ROOT}.5"
_TCB = {
    "bootloader": f"{_ROOT}.3.1",
    "tee": f"{_ROOT}.3.2",
    "snp": f"{_ROOT}.3.3",
    "microcode": f"{_ROOT}.3.8",
}
_FMC = f"{_ROOT}.3.9"
_INTEGER, _IA5_STRING, _OCTET_STRING = 0x02, 0x16, 0x04
_HWID_SIZES = {"Milan": 64, "Genoa": 64, "Turin": 8}


@dataclass(frozen=True)
class Vek:
    """What a VCEK or VLEK certificate contains."""

    kind: Literal["vcek", "vlek"]
    product: str
    tcb: dict[str, int]
    """Firmware levels that the key was derived for, by component."""
    hwid: bytes | None
    """The chip's id: 64 bytes, 8 on Turin; None for a VLEK."""
    csp_id: str | None
    """The cloud provider; None for a VCEK."""
    key: ec.EllipticCurvePublicKey

    @classmethod
    def parse(cls, certificate: x509.Certificate) -> Self:
        """Reads the extensions. Raises `EvidenceError`."""
        extensions = {
            extension.oid.dotted_string: extension.value.value
            for extension in certificate.extensions
            if isinstance(extension.value, x509.UnrecognizedExtension)
        }
        key = certificate.public_key()
        if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP384R1):
            raise EvidenceError("the key that signs SEV-SNP reports is not on P-384")
        # Milan's name ends with a stepping: "Milan-B0".
        product = _text(extensions, _PRODUCT_NAME).partition("-")[0]
        if product not in PRODUCTS:
            raise EvidenceError("the SEV-SNP certificate is for an unknown product")
        tcb = {name: _level(extensions, oid) for name, oid in _TCB.items()}
        if product == "Turin":
            tcb["fmc"] = _level(extensions, _FMC)
        if (_HWID in extensions) == (_CSP_ID in extensions):
            raise EvidenceError("the SEV-SNP certificate names neither a chip nor a provider, or both")
        if _CSP_ID in extensions:
            return cls("vlek", product, tcb, None, _text(extensions, _CSP_ID), key)
        hwid = extensions[_HWID]
        # Raw in the certificates seen; AMD's document specifies an OCTET STRING.
        if len(hwid) == _HWID_SIZES[product] + 2:
            hwid = _value(hwid, _OCTET_STRING)
        if len(hwid) != _HWID_SIZES[product]:
            raise EvidenceError(f"the VCEK's hardware id has {len(hwid)} bytes")
        return cls("vcek", product, tcb, hwid, None, key)


def _level(extensions: dict[str, bytes], oid: str) -> int:
    value = _value(_present(extensions, oid), _INTEGER)
    # One byte, or two with a zero before a high bit: DER has no other form for 0 to 255.
    if len(value) == 2 and value[0] == 0 and value[1] >= 0x80:
        return value[1]
    if len(value) == 1 and value[0] < 0x80:
        return value[0]
    raise EvidenceError(f"the SEV-SNP certificate's extension {oid} is not a number from 0 to 255")


def _text(extensions: dict[str, bytes], oid: str) -> str:
    value = _value(_present(extensions, oid), _IA5_STRING)
    if not all(0x20 <= byte < 0x7F for byte in value):
        raise EvidenceError(f"the SEV-SNP certificate's extension {oid} is not visible ASCII")
    return value.decode("ascii")


def _present(extensions: dict[str, bytes], oid: str) -> bytes:
    if oid not in extensions:
        raise EvidenceError(f"the SEV-SNP certificate lacks the extension {oid}")
    return extensions[oid]


def _value(der: bytes, tag: int) -> bytes:
    """The content of one DER value in short form. Raises `EvidenceError`."""
    if len(der) < 3 or der[0] != tag or der[1] >= 0x80 or der[1] != len(der) - 2:
        raise EvidenceError("an extension of the SEV-SNP certificate is not the DER value that it should be")
    return der[2:]
