"""TLS of the outer connection: from files, or with a key made here. Its SPKI hash is in the evidence."""

import datetime
import os
import ssl
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from cryptography.x509.oid import NameOID

_VALID_DAYS = 90


def from_files(certificate: Path, key: Path) -> tuple[ssl.SSLContext, bytes]:
    """(context, SHA-256 of the certificate's SubjectPublicKeyInfo). Raises `OSError` or `ValueError`."""
    leaf = x509.load_pem_x509_certificates(certificate.read_bytes())[0]
    context = _context()
    context.load_cert_chain(certificate, key)
    return context, _spki_sha256(leaf)


def generated(names: tuple[str, ...], now: datetime.datetime) -> tuple[ssl.SSLContext, bytes]:
    """(context, SHA-256 of the SubjectPublicKeyInfo) with a new P-256 key that never reaches a disk.

    The certificate signs itself: a client trusts it because the evidence names its key.
    """
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, names[0])])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(minutes=5))
        .not_valid_after(now + datetime.timedelta(days=_VALID_DAYS))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name) for name in names]), critical=False)
        .sign(key, hashes.SHA256())
    )
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()) + certificate.public_bytes(Encoding.PEM)
    context = _context()
    # The ssl module reads keys from paths only; a memfd has a path and is not on a disk.
    memory = os.memfd_create("tls", os.MFD_CLOEXEC)
    try:
        os.write(memory, pem)
        context.load_cert_chain(f"/proc/self/fd/{memory}")
    finally:
        os.close(memory)
    return context, _spki_sha256(certificate)


def _context() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    return context


def _spki_sha256(certificate: x509.Certificate) -> bytes:
    spki = certificate.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    digest = hashes.Hash(hashes.SHA256())
    digest.update(spki)
    return digest.finalize()
