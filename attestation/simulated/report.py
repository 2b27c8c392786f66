"""The simulated CPU report: its format and its verification.

Offset  Size  Field (integers little-endian)
0x00    32    ASCII "ADYTUM SIMULATED CPU REPORT v001"
0x20    64    report_data
0x60    48    measurement
0x90    8     issued_at, seconds since 1970
0x98    96    signature: r, then s, 48 bytes each, big-endian; ECDSA P-384 with SHA-384 over 0x00..0x97
"""

import datetime
import struct

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from cryptography.x509.oid import NameOID

from adytum.attestation.core import certificates
from adytum.attestation.core.checks import Checks
from adytum.attestation.core.errors import EvidenceError, Step, VerificationError
from adytum.attestation.document.evidence import CpuEvidence
from adytum.attestation.document.facts import CpuFacts

PROVIDER = "simulated"
SUBJECT = "adytum SIMULATED CPU, proves nothing about hardware"
MAGIC = b"ADYTUM SIMULATED CPU REPORT v001"
BODY = struct.Struct("<32s64s48sQ")
SIGNATURE_SIZE = 96
SIZE = BODY.size + SIGNATURE_SIZE
ALGORITHM = ec.ECDSA(hashes.SHA384())


def verify_simulated(
    evidence: CpuEvidence, *, pins: frozenset[bytes] | None, now: datetime.datetime, checks: Checks
) -> CpuFacts:
    """Verifies structure, certificate and signature at `now`. Raises `VerificationError`.

    `pins`: SHA-256 of the SubjectPublicKeyInfo of each key that may sign; None: any key may.
    """
    if len(evidence.report) != SIZE:
        raise _wrong(f"the simulated report has {len(evidence.report)} bytes instead of {SIZE}")
    body, signature = evidence.report[: BODY.size], evidence.report[BODY.size :]
    magic, report_data, measurement, issued_at = BODY.unpack(body)
    if magic != MAGIC:
        raise _wrong("the report does not begin as a simulated report, version 1, does")
    if len(evidence.certificates) != 1:
        raise _wrong(f"simulated evidence has one certificate, here are {len(evidence.certificates)}")
    key, key_sha256 = _certified_key(evidence.certificates[0], now)
    if pins is not None and key_sha256 not in pins:
        raise _wrong("the key that signed the simulated report is not among the pinned ones")
    half = SIGNATURE_SIZE // 2
    der = encode_dss_signature(int.from_bytes(signature[:half], "big"), int.from_bytes(signature[half:], "big"))
    try:
        key.verify(der, body, ALGORITHM)
    except InvalidSignature as error:
        raise _wrong("the simulated report's signature is invalid for the certificate's key") from error
    checks.ok("simulated.report", "the report is signed by a simulated CPU, which proves nothing about hardware")
    return CpuFacts(PROVIDER, report_data, measurement, key_sha256, issued_at=issued_at)


def _certified_key(der: bytes, now: datetime.datetime) -> tuple[ec.EllipticCurvePublicKey, bytes]:
    try:
        certificate = certificates.load(der, "the simulated CPU's certificate")
        certificate.verify_directly_issued_by(certificate)
    except EvidenceError as error:
        raise _wrong(str(error)) from error
    except Exception as error:  # A wrong signature, or a key type that the library cannot verify.
        raise _wrong("the simulated CPU's certificate did not sign itself") from error
    key = certificate.public_key()
    names = [name.value for name in certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)]
    if names != [SUBJECT]:
        raise _wrong("the certificate's subject does not say that the CPU is simulated")
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP384R1):
        raise _wrong("the simulated CPU's key is not on P-384")
    if not certificate.not_valid_before_utc <= now <= certificate.not_valid_after_utc:
        raise _wrong("the simulated CPU's certificate is not valid at this time; is the clock right?")
    return key, certificates.spki_sha256(certificate)


def _wrong(message: str) -> VerificationError:
    return VerificationError(Step.CPU_REPORT, "simulated.report", message)
