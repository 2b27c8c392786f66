"""A fake NVIDIA: its root for devices, what lies below it, and GPUs whose reports it signs for real."""

import datetime
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from adytum.attestation.core.certificates import spki_sha256
from adytum.attestation.core.trust import TrustRoots

NOW = datetime.datetime(2026, 1, 1, 12, tzinfo=datetime.UTC)
SHA384 = bytes.fromhex("0609608648016503040202")
"""The OID, in DER."""
FWIDS = "2.23.133.5.4.1"
TCB_INFO = "2.23.133.5.4.1.1"
CHIPS = {"hopper": "GH100", "blackwell": "GB100"}
_YEAR = datetime.timedelta(days=365)

Key = ec.EllipticCurvePrivateKey


def new_key(curve: ec.EllipticCurve | None = None) -> Key:
    return ec.generate_private_key(curve or ec.SECP384R1())


def der(tag: int, *parts: bytes) -> bytes:
    value = b"".join(parts)
    size = bytes([len(value)]) if len(value) < 0x80 else b"\x81" + bytes([len(value)])
    return bytes([tag]) + size + value


def tcg_fwid(key: Key, fwid: bytes) -> bytes:
    """Hopper's extension: version, the device's key, hash and digest of the firmware."""
    point = key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return der(0x30, b"\x02\x01\x01", point, der(0x30, SHA384, der(0x04, fwid)))


def tcb_info(*fwids: bytes) -> bytes:
    """Blackwell's extension: DICE TcbInfo with vendor, model, version numbers, firmware ids, flags and type."""
    listed = [der(0x30, SHA384, der(0x04, fwid)) for fwid in fwids]
    return der(
        0x30, der(0x80, b"NVIDIA"), der(0x81, b"GB100 A01 GSP"), der(0x83, b"\x01"), der(0x84, b"\x00"),
        der(0x85, b"\x00"), der(0xA6, *listed), bytes.fromhex("87050080000000"), der(0x88, b"\xc0"), der(0x89, b"\0"),
    )  # fmt: skip


@dataclass(frozen=True)
class Issuer:
    """A certificate and its key."""

    certificate: x509.Certificate
    key: Key


def issue(
    name: str,
    by: Issuer | None,
    *,
    ca: bool = True,
    extensions: Mapping[str, bytes] | None = None,
    key: Key | None = None,
    not_before: datetime.datetime = NOW - _YEAR,
    not_after: datetime.datetime = NOW + 10 * _YEAR,
) -> Issuer:
    """A certificate like NVIDIA's: leaves have no basic constraints. `by` None: it signs itself."""
    key = key or new_key()
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(by.certificate.subject if by else subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(not_before)
        .not_valid_after(not_after)
    )
    if ca:
        builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
    for oid, value in (extensions or {}).items():
        extension = x509.UnrecognizedExtension(x509.ObjectIdentifier(oid), value)
        builder = builder.add_extension(extension, critical=False)
    return Issuer(builder.sign(by.key if by else key, hashes.SHA384()), key)


@dataclass
class Authority:
    """Root and, for each architecture, what issues a GPU's boot ROM its certificate."""

    root: Issuer = field(default_factory=lambda: issue("Fake NVIDIA Device Identity CA", None))

    def __post_init__(self) -> None:
        self._identities = {name: issue(f"Fake {chip} Identity", self.root) for name, chip in CHIPS.items()}
        self._provisioners = {
            name: issue(f"Fake {chip} Provisioner", self._identities[name]) for name, chip in CHIPS.items()
        }
        self.roots = replace(TrustRoots(), nvidia_device=frozenset({spki_sha256(self.root.certificate)}))
        """These devices; manifests are still NVIDIA's own."""

    def above(self, architecture: str) -> tuple[Issuer, Issuer, Issuer]:
        """Provisioner, architecture, root."""
        return self._provisioners[architecture], self._identities[architecture], self.root


@dataclass
class FakeGpu:
    """Boot ROM and firmware of one device. Every field is one thing that it may say differently."""

    authority: Authority
    architecture: str = "hopper"
    driver_version: str = "550.90.07"
    vbios_version: str = "96.00.9F.00.01"
    fwid: bytes = bytes(range(100, 148))
    measurements: Mapping[int, bytes] = field(default_factory=lambda: {n: bytes([n]) * 48 for n in range(1, 65)})
    nvdec0_on: bool = False
    feature_flag: int | None = 0
    opaque: Mapping[int, bytes | None] = field(default_factory=dict)
    """Replaces fields of the opaque data; None leaves one out."""
    extensions: Mapping[str, bytes] | None = None
    """Of the leaf; None: those that the architecture has."""
    curve: ec.EllipticCurve = field(default_factory=ec.SECP384R1)

    def __post_init__(self) -> None:
        chip = CHIPS[self.architecture]
        above = self.authority.above(self.architecture)
        self.boot_rom = issue(f"Fake {chip} BROM", above[0])
        self.key = new_key(self.curve)
        extensions = self.extensions
        if extensions is None:
            hopper = self.architecture == "hopper"
            extensions = (
                {FWIDS: tcg_fwid(self.key, self.fwid)} if hopper else {TCB_INFO: tcb_info(self.fwid, bytes(48))}
            )
        leaf = issue(f"Fake {chip} FMC", self.boot_rom, ca=False, extensions=extensions, key=self.key)
        self.certificates = tuple(issuer.certificate for issuer in (leaf, self.boot_rom, *above))

    @property
    def chain(self) -> tuple[bytes, ...]:
        """DER, leaf first, root last."""
        return tuple(certificate.public_bytes(Encoding.DER) for certificate in self.certificates)

    def report(self, nonce: bytes) -> bytes:
        """A signed report on a nonce of 32 bytes."""
        return self.signed(request(nonce) + response(blocks(self.measurements), self.opaque_data()))

    def signed(self, body: bytes) -> bytes:
        """Whatever it is, with the device's signature behind it."""
        return body + raw_signature(self.key, body)

    def opaque_data(self) -> bytes:
        low = bytes.fromhex(self.vbios_version.replace(".", ""))
        fields: dict[int, bytes | None] = {
            3: self.driver_version.encode() + b"\0",
            6: low[3::-1] + low[4:] + bytes(3),
            11: b"\xaa" if self.nvdec0_on else b"\x55",
            15: b"882" + bytes(6),
            17: b"1010\0",
            18: b"0200\0",
            20: self.fwid,
            34: b"\1\0",
            36: None if self.feature_flag is None else self.feature_flag.to_bytes(2, "little"),
            **self.opaque,
        }
        return opaque_fields([(kind, value) for kind, value in fields.items() if value is not None])


def request(nonce: bytes) -> bytes:
    return b"\x11\xe0\x01\xff" + nonce + b"\0"


def response(record: bytes, opaque: bytes, *, count: int | None = None, nonce: bytes = b"\xd0" * 32) -> bytes:
    """Of the given measurement record. `count`: another number of blocks than there are bytes for."""
    number = len(record) // 55 if count is None else count
    head = b"\x11\x60\0\0" + bytes([number]) + len(record).to_bytes(3, "little")
    return head + record + nonce + struct.pack("<H", len(opaque)) + opaque


def block(index: int, value: bytes, *, specification: int = 1, kind: int = 1, size: int | None = None) -> bytes:
    outer = len(value) + 3 if size is None else size
    return struct.pack("<BBHBH", index, specification, outer, kind, len(value)) + value


def blocks(measurements: Mapping[int, bytes]) -> bytes:
    return b"".join(block(index, value) for index, value in measurements.items())


def opaque_fields(fields: Sequence[tuple[int, bytes]]) -> bytes:
    return b"".join(struct.pack("<HH", kind, len(value)) + value for kind, value in fields)


def raw_signature(key: Key, data: bytes) -> bytes:
    """r, then s, 48 bytes each."""
    return b"".join(number.to_bytes(48, "big") for number in decode_dss_signature(key.sign(data, _ALGORITHM)))


_ALGORITHM = ec.ECDSA(hashes.SHA384())
