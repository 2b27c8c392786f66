"""A fake Intel: root, platform CA, provisioning key, quoting enclave and collateral, all of which sign for real."""

import datetime
import hashlib
import json
import struct
from dataclasses import dataclass, field, replace

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from adytum.attestation.core.certificates import spki_sha256
from adytum.attestation.tdx.verify import QE_SIGNER

NOW = datetime.datetime(2026, 6, 1, 12, tzinfo=datetime.UTC)
_DAY = datetime.timedelta(days=1)
_FMSPC = bytes.fromhex("b0c06f000000")
_CPU_SVN = bytes(range(1, 17))
_PCE_SVN = 11


@dataclass(frozen=True)
class Td:
    """What the fake hardware says. Defaults are those of a good domain."""

    version: int = 4
    body_type: int = 2
    key_type: int = 2
    tee: int = 0x81
    vendor: bytes = bytes.fromhex("939a7233f79c4ca9940a0db3957f0607")
    tee_tcb_svn: bytes = bytes([5, 0, 2]) + bytes(13)
    mrsignerseam: bytes = bytes(48)
    seam_attributes: int = 0
    td_attributes: int = 1 << 28
    mrtd: bytes = bytes(range(48))
    rtmr: tuple[bytes, ...] = tuple(bytes([n]) * 48 for n in (1, 2, 3, 4))
    report_data: bytes = b"r" * 64
    qe_misc: int = 0
    qe_attributes: bytes = bytes.fromhex("1500000000000000e700000000000000")
    qe_signer: bytes = QE_SIGNER
    qe_product: int = 2
    qe_svn: int = 7
    qe_names_key: bool = True
    tail: bytes = bytes(16)

    def body(self) -> bytes:
        head = struct.pack("<16s48s48sQQQ", self.tee_tcb_svn, b"\x51" * 48, self.mrsignerseam, self.seam_attributes,
                           self.td_attributes, 0x602E7)  # fmt: skip
        registers = self.mrtd + bytes(48 * 3) + b"".join(self.rtmr)
        extra = self.tee_tcb_svn + bytes(48) if self.body_type == 3 else b""
        return head + registers + self.report_data + extra


def raw_signature(key: ec.EllipticCurvePrivateKey, data: bytes) -> bytes:
    return b"".join(n.to_bytes(32, "big") for n in decode_dss_signature(key.sign(data, ec.ECDSA(hashes.SHA256()))))


def pem(*certificates: x509.Certificate) -> str:
    return "".join(certificate.public_bytes(Encoding.PEM).decode() for certificate in certificates)


@dataclass
class Authority:
    """Makes its keys once; quotes and collateral at will."""

    root_key: ec.EllipticCurvePrivateKey = field(default_factory=lambda: ec.generate_private_key(ec.SECP256R1()))
    ca_key: ec.EllipticCurvePrivateKey = field(default_factory=lambda: ec.generate_private_key(ec.SECP256R1()))
    pck_key: ec.EllipticCurvePrivateKey = field(default_factory=lambda: ec.generate_private_key(ec.SECP256R1()))
    tcb_key: ec.EllipticCurvePrivateKey = field(default_factory=lambda: ec.generate_private_key(ec.SECP256R1()))
    attestation_key: ec.EllipticCurvePrivateKey = field(default_factory=lambda: ec.generate_private_key(ec.SECP256R1()))

    def __post_init__(self) -> None:
        self.root = self._certificate("Fake Intel SGX Root CA", self.root_key, None, ca=True)
        self.ca = self._certificate("Intel SGX PCK Platform CA", self.ca_key, self.root, ca=True)
        self.pck = self._certificate("Fake PCK", self.pck_key, self.ca, extension=sgx_extension())
        self.plain = self._certificate("Fake without SGX", self.pck_key, self.ca)
        self.tcb = self._certificate("Fake TCB signing", self.tcb_key, self.root)
        self.roots = frozenset({spki_sha256(self.root)})

    def _certificate(
        self,
        name: str,
        key: ec.EllipticCurvePrivateKey,
        issuer: x509.Certificate | None,
        *,
        ca: bool = False,
        extension: bytes | None = None,
    ) -> x509.Certificate:
        subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
        issuer_key = key if issuer is None else self.root_key if issuer is getattr(self, "root", None) else self.ca_key
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(subject if issuer is None else issuer.subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(NOW - 100 * _DAY)
            .not_valid_after(NOW + 1000 * _DAY)
            .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()), critical=False)
            .add_extension(_usage(ca), critical=True)
            .add_extension(
                x509.CRLDistributionPoints(
                    [
                        x509.DistributionPoint(
                            [x509.UniformResourceIdentifier("https://fake.invalid/crl")], None, None, None
                        )
                    ]
                ),
                critical=False,
            )
        )
        if extension is not None:
            oid = x509.ObjectIdentifier("1.2.840.113741.1.13.1")
            builder = builder.add_extension(x509.UnrecognizedExtension(oid, extension), critical=False)
        return builder.sign(issuer_key, hashes.SHA256())

    def quote(
        self, td: Td | None = None, chain: str | None = None, qe_key: ec.EllipticCurvePrivateKey | None = None
    ) -> bytes:
        td = td or Td()
        header = struct.pack("<HHI4s16s20s", td.version, td.key_type, td.tee, bytes(4), td.vendor, bytes(20))
        body = td.body()
        if td.version == 5:
            header += struct.pack("<HI", td.body_type, len(body))
        signed = header + body
        point = self.attestation_key.public_key().public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)[1:]
        authentication = bytes(range(32))
        named = hashlib.sha256(point + authentication).digest() if td.qe_names_key else bytes(32)
        qe = struct.pack(
            "<16sI28s16s32s32s32s96sHH60s64s", _CPU_SVN, td.qe_misc, bytes(28), td.qe_attributes, b"e" * 32, bytes(32),
            td.qe_signer, bytes(96), td.qe_product, td.qe_svn, bytes(60), named + bytes(32),
        )  # fmt: skip
        text = (chain if chain is not None else pem(self.pck, self.ca, self.root)).encode() + b"\x00"
        inner = qe + raw_signature(qe_key or self.pck_key, qe) + struct.pack("<H", 32) + authentication
        inner += struct.pack("<HI", 5, len(text)) + text
        data = raw_signature(self.attestation_key, signed) + point + struct.pack("<HI", 6, len(inner)) + inner
        return signed + struct.pack("<I", len(data)) + data + td.tail

    def collateral(
        self, status: str = "UpToDate", *, advisories: tuple[str, ...] = (), revoked: bool = False, days: int = 30,
        by: "Authority | None" = None,
    ) -> dict[str, str]:  # fmt: skip
        """`by`: another authority signs it, with its own chain."""
        signer = by or self
        level = {
            "tcb": {
                "sgxtcbcomponents": [{"svn": svn} for svn in _CPU_SVN],
                "pcesvn": _PCE_SVN,
                "tdxtcbcomponents": [{"svn": svn} for svn in Td().tee_tcb_svn],
            },
            "tcbDate": _time(NOW - 50 * _DAY),
            "tcbStatus": status,
            "advisoryIDs": list(advisories),
        }
        dates = {"issueDate": _time(NOW - _DAY), "nextUpdate": _time(NOW + days * _DAY), "tcbEvaluationDataNumber": 17}
        module = {"mrsigner": "00" * 48, "attributes": "00" * 8, "attributesMask": "FF" * 8}
        tcb_info = {"id": "TDX", "version": 3, **dates, "fmspc": _FMSPC.hex().upper(), "pceId": "0000", "tcbType": 0,
                    "tdxModule": module, "tdxModuleIdentities": [], "tcbLevels": [level]}  # fmt: skip
        qe_level = {"tcb": {"isvsvn": 4}, "tcbDate": _time(NOW - 50 * _DAY), "tcbStatus": "UpToDate"}
        qe_identity = {"id": "TD_QE", "version": 2, **dates, "miscselect": "00000000", "miscselectMask": "FFFFFFFF",
                       "attributes": "11" + "00" * 15, "attributesMask": "FBFFFFFFFFFFFFFF" + "00" * 8,
                       "mrsigner": QE_SIGNER.hex().upper(), "isvprodid": 2, "tcbLevels": [qe_level]}  # fmt: skip
        info, identity = json.dumps(tcb_info), json.dumps(qe_identity)
        return {
            "pck_crl_issuer_chain": pem(signer.ca, signer.root),
            "root_ca_crl": signer.crl(signer.root, signer.root_key, (), days).hex(),
            "pck_crl": signer.crl(signer.ca, signer.ca_key, (self.pck.serial_number,) if revoked else (), days).hex(),
            "tcb_info_issuer_chain": pem(signer.tcb, signer.root),
            "tcb_info": info,
            "tcb_info_signature": raw_signature(signer.tcb_key, info.encode()).hex(),
            "qe_identity_issuer_chain": pem(signer.tcb, signer.root),
            "qe_identity": identity,
            "qe_identity_signature": raw_signature(signer.tcb_key, identity.encode()).hex(),
        }

    def crl(
        self, issuer: x509.Certificate, key: ec.EllipticCurvePrivateKey, serials: tuple[int, ...], days: int
    ) -> bytes:
        builder = (
            x509.CertificateRevocationListBuilder()
            .issuer_name(issuer.subject)
            .last_update(NOW - _DAY)
            .next_update(NOW + days * _DAY)
            .add_extension(x509.CRLNumber(1), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(key.public_key()), critical=False)
        )
        for serial in serials:
            revoked = x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(NOW - _DAY).build()
            builder = builder.add_revoked_certificate(revoked)
        return builder.sign(key, hashes.SHA256()).public_bytes(Encoding.DER)


def changed(**fields: object) -> Td:
    return replace(Td(), **fields)  # type: ignore[arg-type]


def _time(at: datetime.datetime) -> str:
    return f"{at:%Y-%m-%dT%H:%M:%SZ}"


def _usage(ca: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not ca, content_commitment=False, key_encipherment=False, data_encipherment=False,
        key_agreement=False, key_cert_sign=ca, crl_sign=ca, encipher_only=False, decipher_only=False,
    )  # fmt: skip


def sgx_extension() -> bytes:
    """1.2.840.113741.1.13.1 of a PCK certificate: PPID, TCB, PCEID, FMSPC, SGX type."""
    tcb = b"".join(_entry(f"2.{place}", b"\x02\x01" + bytes([svn])) for place, svn in enumerate(_CPU_SVN, 1))
    tcb += _entry("2.17", b"\x02\x01" + bytes([_PCE_SVN])) + _entry("2.18", b"\x04\x10" + _CPU_SVN)
    return _sequence(
        _entry("1", b"\x04\x10" + b"p" * 16)
        + _entry("2", _sequence(tcb))
        + _entry("3", b"\x04\x02\x00\x00")
        + _entry("4", b"\x04\x06" + _FMSPC)
        + _entry("5", b"\x0a\x01\x01")
    )


def _sequence(content: bytes) -> bytes:
    size = len(content)
    length = bytes([size]) if size < 128 else b"\x82" + size.to_bytes(2, "big")
    return b"\x30" + length + content


def _entry(path: str, value: bytes) -> bytes:
    oid = bytes.fromhex("2a864886f84d010d01") + bytes(int(part) for part in path.split("."))
    return _sequence(b"\x06" + bytes([len(oid)]) + oid + value)
