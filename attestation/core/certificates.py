"""X.509 as attestation uses it: strict DER, short fixed chains, roots pinned by key. Pure.

Not web PKI: no names to match, no policy constraints. A chain is leaf first and complete, every signature is checked
with the next certificate's key, and trust comes from the SHA-256 of the last one's SubjectPublicKeyInfo.
"""

import datetime
import hashlib
import warnings
from collections.abc import Collection, Sequence

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.utils import CryptographyDeprecationWarning

from adytum.attestation.core.errors import EvidenceError, Step, VerificationError
from adytum.attestation.core.limits import LIMITS, Limits

_PEM_BEGIN = b"-----BEGIN CERTIFICATE-----"


def load(der: bytes, what: str, limits: Limits = LIMITS) -> x509.Certificate:
    """One DER certificate, read completely. `what` names it in the message. Raises `EvidenceError`."""
    if len(der) > limits.certificate:
        raise EvidenceError(f"{what} is larger than {limits.certificate} bytes")
    try:
        with warnings.catch_warnings():
            # Every VCEK and VLEK of AMD has serial number 0, which a later release of the library will refuse. The
            # library also warns about odd names when they are read.
            warnings.simplefilter("ignore")
            certificate = x509.load_der_x509_certificate(der)
            # The library parses these lazily, and each can raise.
            _ = certificate.public_key(), certificate.extensions, certificate.signature_algorithm_parameters
            _ = certificate.subject, certificate.issuer
    except Exception as error:  # The library's errors for odd certificates have no common base (InvalidVersion, ...).
        raise EvidenceError(f"{what} is not a certificate that can be read") from error
    # The library ignores the signature's count of unused bits, which no signature covers: it has to be 0.
    if not der.endswith(b"\x00" + certificate.signature):
        raise EvidenceError(f"{what} is not DER")
    return certificate


def load_all(data: bytes, what: str, limits: Limits = LIMITS) -> tuple[x509.Certificate, ...]:
    """The certificates of a file: one in DER, or any number in PEM, in the file's order. Raises `EvidenceError`."""
    if _PEM_BEGIN not in data:
        return (load(data, what, limits),)
    if len(data) > 2 * limits.certificates * limits.certificate:
        raise EvidenceError(f"{what} is too large for {limits.certificates} certificates")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", CryptographyDeprecationWarning)
            found = x509.load_pem_x509_certificates(data)
    except Exception as error:
        raise EvidenceError(f"{what} has no certificates that can be read") from error
    if not 1 <= len(found) <= limits.certificates:
        raise EvidenceError(f"{what} has {len(found)} certificates; 1 to {limits.certificates} are read")
    return tuple(load(certificate.public_bytes(Encoding.DER), what, limits) for certificate in found)


def spki_sha256(certificate: x509.Certificate) -> bytes:
    """SHA-256 of the SubjectPublicKeyInfo, 32 bytes: how a key is pinned."""
    key = certificate.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(key).digest()


def check_chain(
    chain: Sequence[x509.Certificate], pins: Collection[bytes], now: datetime.datetime, *, step: Step, prefix: str
) -> None:
    """Leaf first: each issued by the next, the last by itself and pinned, all valid at `now`.

    Raises `VerificationError` with the code `<prefix>.root`, `.chain`, `.ca` or `.validity`.
    """

    def wrong(code: str, message: str) -> VerificationError:
        return VerificationError(step, f"{prefix}.{code}", message)

    if len(chain) < 2:
        raise wrong("chain", "the certificate chain is incomplete")
    if spki_sha256(chain[-1]) not in pins:
        raise wrong("root", f"the chain ends at {_name(chain[-1])}, whose key is not the pinned root's")
    for place, certificate in enumerate(chain):
        issuer = chain[min(place + 1, len(chain) - 1)]
        try:
            certificate.verify_directly_issued_by(issuer)
        except Exception as error:  # A wrong signature, another name, or an unsupported key type.
            raise wrong("chain", f"{_name(certificate)} was not issued by {_name(issuer)}") from error
        if place and not _is_ca(certificate):
            raise wrong("ca", f"{_name(certificate)} may not issue certificates")
        if not certificate.not_valid_before_utc <= now <= certificate.not_valid_after_utc:
            raise wrong(
                "validity",
                f"{_name(certificate)} is valid from {certificate.not_valid_before_utc:%Y-%m-%d} "
                f"to {certificate.not_valid_after_utc:%Y-%m-%d}, not on {now:%Y-%m-%d}",
            )


def _is_ca(certificate: x509.Certificate) -> bool:
    try:
        return certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    except x509.ExtensionNotFound:
        return False


def _name(certificate: x509.Certificate) -> str:
    names = certificate.subject.get_attributes_for_oid(x509.NameOID.COMMON_NAME)
    return f"the certificate {str(names[0].value)!a}" if names else "a certificate without a name"
