"""A fake AMD: roots of its own, and processors of every line with a VCEK or VLEK, that sign reports for real.

RSA keys of 2,048 bits, half of AMD's, because they are made for each run.
"""

import datetime
import functools
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.serialization import Encoding

from adytum.attestation.core.certificates import spki_sha256
from adytum.attestation.document.evidence import CpuEvidence

NOW = datetime.datetime(2026, 6, 1, 12, tzinfo=datetime.UTC)
DAY = datetime.timedelta(days=1)
_AMD = "1.3.6.1.4.1.3704.1"
_CPUID = {"Milan": (0x19, 0x01), "Genoa": (0x19, 0x11), "Turin": (0x1A, 0x02)}
_NAMES = {"Milan": "Milan-B0", "Genoa": "Genoa", "Turin": "Turin"}
LEVELS = {"bootloader": 9, "tee": 0, "snp": 23, "microcode": 200}
_PLACES = {
    "Milan": {"bootloader": 0, "tee": 1, "snp": 6, "microcode": 7},
    "Genoa": {"bootloader": 0, "tee": 1, "snp": 6, "microcode": 7},
    "Turin": {"fmc": 0, "bootloader": 1, "tee": 2, "snp": 3, "microcode": 7},
}
_OIDS = {"bootloader": "3.1", "tee": "3.2", "snp": "3.3", "microcode": "3.8", "fmc": "3.9"}


@functools.cache
def rsa_key(name: str) -> rsa.RSAPrivateKey:
    """One key for each name, made once."""
    return rsa.generate_private_key(65537, 2048)


def integer(value: int) -> bytes:
    """A DER INTEGER from 0 to 255."""
    return bytes([2, 1, value]) if value < 0x80 else bytes([2, 2, 0, value])


def text(value: str) -> bytes:
    """A DER IA5String."""
    return bytes([0x16, len(value)]) + value.encode()


@dataclass
class Processor:
    """One processor. Every field is one thing that it, or its certificate, may say differently."""

    product: str = "Genoa"
    kind: str = "vcek"
    levels: Mapping[str, int] = field(default_factory=lambda: dict(LEVELS))
    hwid: bytes = bytes(range(1, 65))
    curve: ec.EllipticCurve = field(default_factory=ec.SECP384R1)
    extensions: Mapping[str, bytes | None] = field(default_factory=dict)
    """Replaces extensions of the VEK by the end of their OID; None leaves one out."""
    from_: datetime.datetime = NOW - 100 * DAY
    until: datetime.datetime = NOW + 1000 * DAY
    middle_is_ca: bool = True

    def __post_init__(self) -> None:
        self.key = ec.generate_private_key(self.curve)
        levels = {**self.levels, **({"fmc": 1} if self.product == "Turin" and "fmc" not in self.levels else {})}
        self.tcb = bytearray(8)
        for name, place in _PLACES[self.product].items():
            self.tcb[place] = levels[name]
        self.chip_id = self.hwid[:8] + bytes(56) if self.product == "Turin" else self.hwid
        said: dict[str, bytes | None] = {"2": text(_NAMES[self.product] if self.kind == "vcek" else self.product)}
        said |= {_OIDS[name]: integer(level) for name, level in levels.items()}
        if self.kind == "vcek":
            said["4"] = self.hwid[:8] if self.product == "Turin" else self.hwid
        else:
            said["5"] = text("CN=cc-fake.example.com")
            self.chip_id = bytes(64)
        said |= self.extensions
        ark, ask = (rsa_key(f"{name} {self.product}") for name in ("ark", self.kind))
        names = f"ARK-{self.product}", f"SEV-{self.kind}-{self.product}"
        self.ark = certificate(names[0], ark, names[0], ark, serial=1)
        self.ask = certificate(names[1], ask, names[0], ark, ca=self.middle_is_ca, serial=2)
        self.vek = certificate(
            f"SEV-{self.kind.upper()}", self.key, names[1], ask, ca=None, span=(self.from_, self.until),
            extensions={oid: value for oid, value in said.items() if value is not None},
        )  # fmt: skip

    @property
    def certificates(self) -> tuple[bytes, ...]:
        return tuple(each.public_bytes(Encoding.DER) for each in (self.vek, self.ask, self.ark))

    @property
    def pins(self) -> dict[str, frozenset[bytes]]:
        return {self.product: frozenset({spki_sha256(self.ark)})}

    def report(self, report_data: bytes = bytes(64), version: int = 3, **fields: int | bytes) -> bytes:
        """A signed report. `fields`: policy, vmpl, platform_info, signer_info, measurement, tcb, chip_id, cpuid."""
        data = bytearray(1184)
        struct.pack_into("<IIQ", data, 0, version, 0, fields.get("policy", 0x30000))
        struct.pack_into("<II", data, 0x30, fields.get("vmpl", 0), 1)
        signer = fields.get("signer_info", 0 if self.kind == "vcek" else 4)
        struct.pack_into("<QI", data, 0x40, fields.get("platform_info", 0x25), signer)
        data[0x50:0x90] = report_data
        data[0x90:0xC0] = fields.get("measurement", b"m" * 48)  # type: ignore[assignment]
        for at in (0x38, 0x180, 0x1E0, 0x1F0):
            data[at : at + 8] = fields.get("tcb", self.tcb)  # type: ignore[assignment]
        if version > 2:
            data[0x188:0x18B] = fields.get("cpuid", bytes([*_CPUID[self.product], 1]))  # type: ignore[assignment]
        data[0x1A0:0x1E0] = fields.get("chip_id", self.chip_id)  # type: ignore[assignment]
        return self.signed(data)

    def signed(self, data: bytes | bytearray) -> bytes:
        """A report's 1,184 bytes with this processor's signature."""
        r, s = decode_dss_signature(self.key.sign(bytes(data[:0x2A0]), ec.ECDSA(hashes.SHA384())))
        return bytes(data[:0x2A0]) + r.to_bytes(72, "little") + s.to_bytes(72, "little") + bytes(0x4A0 - 0x330)

    def crl(
        self,
        *revoked: int,
        by: str = "ark",
        from_: datetime.datetime = NOW - DAY,
        until: datetime.datetime = NOW + 90 * DAY,
        only: x509.ExtensionType | None = None,
    ) -> bytes:
        """A list of revoked serial numbers: the ASK's is 2, the ARK's 1. `only`: what it says that it is limited to."""
        builder = x509.CertificateRevocationListBuilder().issuer_name(self.ark.subject)
        builder = builder.last_update(from_).next_update(until)
        if only is not None:
            builder = builder.add_extension(only, critical=True)
        for serial in revoked:
            entry = x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(from_).build()
            builder = builder.add_revoked_certificate(entry)
        return builder.sign(rsa_key(f"{by} {self.product}"), hashes.SHA384()).public_bytes(Encoding.DER)


class FakeSnp:
    """The collecting side's port: a processor in a guest."""

    provider = "sev-snp"

    def __init__(self, processor: Processor, **fields: int | bytes) -> None:
        self.processor = processor
        self._fields = fields

    def report(self, report_data: bytes) -> CpuEvidence:
        return CpuEvidence(
            self.provider, self.processor.report(report_data, **self._fields), self.processor.certificates
        )


def certificate(
    name: str,
    key: rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey,
    issuer: str,
    issuer_key: rsa.RSAPrivateKey,
    *,
    ca: bool | None = True,
    serial: int | None = None,
    span: tuple[datetime.datetime, datetime.datetime] = (NOW - 1000 * DAY, NOW + 9000 * DAY),
    extensions: Mapping[str, bytes] | None = None,
) -> x509.Certificate:
    """Signed with RSASSA-PSS and SHA-384, as AMD does. `ca=None`: without basic constraints, like a VEK."""
    builder = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)]))
        .issuer_name(x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, issuer)]))
        .public_key(key.public_key())
        .serial_number(serial or x509.random_serial_number())
        .not_valid_before(span[0])
        .not_valid_after(span[1])
    )
    if ca is not None:
        builder = builder.add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
    for oid, value in (extensions or {}).items():
        extension = x509.UnrecognizedExtension(x509.ObjectIdentifier(f"{_AMD}.{oid}"), value)
        builder = builder.add_extension(extension, critical=False)
    pss = padding.PSS(padding.MGF1(hashes.SHA384()), 48)
    return builder.sign(issuer_key, hashes.SHA384(), rsa_padding=pss)
