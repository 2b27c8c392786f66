"""A fake chip for the paravisor: a Milan with a VCEK of its own, under roots of its own, that signs reports for real.

RSA keys of 2,048 bits, half of AMD's, because they are made for each run.
"""

import datetime
import struct
from collections.abc import Mapping

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.serialization import Encoding

from adytum.attestation.core.certificates import spki_sha256

NOW = datetime.datetime(2026, 6, 1, 12, tzinfo=datetime.UTC)
_AMD = "1.3.6.1.4.1.3704.1"
_CHIP_ID = bytes(range(64))
_TCB = bytes([4, 0, 0, 0, 0, 0, 24, 219])


class Chip:
    """Makes its keys once."""

    def __init__(self) -> None:
        ark_key, ask_key = rsa.generate_private_key(65537, 2048), rsa.generate_private_key(65537, 2048)
        self._key = ec.generate_private_key(ec.SECP384R1())
        ark = _certificate("ARK-Fake", ark_key, "ARK-Fake", ark_key, ca=True)
        ask = _certificate("SEV-Fake", ask_key, "ARK-Fake", ark_key, ca=True)
        vcek = _certificate("SEV-VCEK", self._key, "SEV-Fake", ask_key, ca=False, extensions=_vcek())
        self.certificates = tuple(each.public_bytes(Encoding.DER) for each in (vcek, ask, ark))
        self.ark: Mapping[str, frozenset[bytes]] = {"Milan": frozenset({spki_sha256(ark)})}

    def sign(self, report_data: bytes, vmpl: int = 0) -> bytes:
        """A report of version 3 that carries `report_data`."""
        report = bytearray(1184)
        struct.pack_into("<IIQ", report, 0, 3, 0, 0x3001F)
        struct.pack_into("<II", report, 0x30, vmpl, 1)
        report[0x50:0x90] = report_data
        report[0x90:0xC0] = b"m" * 48
        for at in (0x38, 0x180, 0x1E0, 0x1F0):
            report[at : at + 8] = _TCB
        report[0x188:0x18B] = bytes([0x19, 1, 1])
        report[0x1A0:0x1E0] = _CHIP_ID
        r, s = decode_dss_signature(self._key.sign(bytes(report[:0x2A0]), ec.ECDSA(hashes.SHA384())))
        report[0x2A0:0x330] = r.to_bytes(72, "little") + s.to_bytes(72, "little")
        return bytes(report)


def _vcek() -> dict[str, bytes]:
    return {
        f"{_AMD}.2": b"\x16\x08Milan-B0",
        f"{_AMD}.3.1": b"\x02\x01\x04",
        f"{_AMD}.3.2": b"\x02\x01\x00",
        f"{_AMD}.3.3": b"\x02\x01\x18",
        f"{_AMD}.3.8": b"\x02\x02\x00\xdb",
        f"{_AMD}.4": _CHIP_ID,
    }


def _certificate(
    name: str,
    key: rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey,
    issuer: str,
    issuer_key: rsa.RSAPrivateKey,
    *,
    ca: bool,
    extensions: Mapping[str, bytes] | None = None,
) -> x509.Certificate:
    builder = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)]))
        .issuer_name(x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, issuer)]))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(NOW - datetime.timedelta(days=100))
        .not_valid_after(NOW + datetime.timedelta(days=1000))
        .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
    )
    for oid, value in (extensions or {}).items():
        builder = builder.add_extension(x509.UnrecognizedExtension(x509.ObjectIdentifier(oid), value), critical=False)
    return builder.sign(issuer_key, hashes.SHA384())
