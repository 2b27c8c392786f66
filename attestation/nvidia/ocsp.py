"""OCSP answers (RFC 6960) about the certificates of GPUs and of the manifests' signers."""

import datetime
import hashlib
from collections.abc import Sequence

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509 import ocsp
from cryptography.x509.oid import ExtendedKeyUsageOID

from adytum.attestation.core.certificates import load
from adytum.attestation.core.checks import Checks
from adytum.attestation.core.errors import EvidenceError, Step, VerificationError
from adytum.attestation.core.limits import LIMITS

Pair = tuple[x509.Certificate, x509.Certificate]
"""A certificate and its issuer's."""
_HASHES = {"sha1": hashlib.sha1, "sha256": hashlib.sha256, "sha384": hashlib.sha384}


def check_ocsp(
    answers: Sequence[bytes], needed: Sequence[Pair], *, now: datetime.datetime, checks: Checks
) -> tuple[bool, datetime.datetime | None]:
    """(whether every needed certificate has a good, current answer; when the first of these expires).

    Answers about other certificates are ignored: a document has those of all its GPUs. An answer about a needed
    certificate has to be current and good, and signed by the issuer or by a responder that the issuer named.
    Raises `EvidenceError`, `VerificationError` (`gpu.ocsp.status`, `.signature`, `.validity`, `.revoked`, `.unknown`).
    """
    covered: dict[bytes, datetime.datetime] = {}
    wanted = {certificate.fingerprint(hashes.SHA256()): (certificate, issuer) for certificate, issuer in needed}
    for der in answers:
        answer, enclosed = _load(der)
        for key, (certificate, issuer) in wanted.items():
            if _is_about(answer, certificate, issuer):
                covered[key] = _check(answer, enclosed, certificate, issuer, now)
    missing = len(wanted) - len(covered)
    if wanted and not missing:
        checks.ok("gpu.ocsp", f"NVIDIA has revoked none of {len(wanted)} certificates")
    else:
        checks.lacks("gpu.ocsp", f"there is no OCSP answer for {missing} certificates")
    return bool(wanted) and not missing, min(covered.values(), default=None)


def ocsp_request(certificate: x509.Certificate, issuer: x509.Certificate) -> bytes:
    """The DER request about one certificate. It has no nonce, so the answer serves every client."""
    request = ocsp.OCSPRequestBuilder().add_certificate(certificate, issuer, hashes.SHA384()).build()
    return request.public_bytes(Encoding.DER)


def _load(der: bytes) -> tuple[ocsp.OCSPResponse, tuple[x509.Certificate, ...]]:
    """An answer and the certificates in it, which the answer's signature does not cover."""
    try:
        answer = ocsp.load_der_ocsp_response(der)
    except ValueError as error:
        raise EvidenceError("an OCSP answer cannot be read") from error
    if answer.response_status is not ocsp.OCSPResponseStatus.SUCCESSFUL:
        raise _wrong("status", f"an OCSP answer has the status {answer.response_status.name}, not SUCCESSFUL")
    try:
        # The library parses these lazily, and each can raise.
        _ = answer.serial_number, answer.certificate_status, answer.this_update_utc, answer.next_update_utc
        _ = answer.issuer_name_hash, answer.issuer_key_hash, answer.hash_algorithm, answer.revocation_reason
        _ = answer.signature_hash_algorithm, answer.responder_name, answer.responder_key_hash
        certificates = [item.public_bytes(Encoding.DER) for item in answer.certificates]
    except Exception as error:  # The library's errors for odd answers have no common base.
        raise EvidenceError("an OCSP answer cannot be read") from error
    # The library ignores the signature's count of unused bits, which no signature covers: it has to be 0.
    if b"\x00" + answer.signature not in der:
        raise EvidenceError("an OCSP answer is not DER")
    # Each may have to be tried as the signer.
    if len(certificates) > LIMITS.certificates:
        raise EvidenceError(f"an OCSP answer has more than {LIMITS.certificates} certificates")
    return answer, tuple(load(item, "the certificate of an OCSP responder") for item in certificates)


def _is_about(answer: ocsp.OCSPResponse, certificate: x509.Certificate, issuer: x509.Certificate) -> bool:
    digest = _HASHES.get(answer.hash_algorithm.name)
    if digest is None or answer.serial_number != certificate.serial_number:
        return False
    return (
        answer.issuer_name_hash == digest(issuer.subject.public_bytes()).digest()
        and answer.issuer_key_hash == digest(_key_bits(issuer)).digest()
    )


def _check(
    answer: ocsp.OCSPResponse,
    enclosed: Sequence[x509.Certificate],
    certificate: x509.Certificate,
    issuer: x509.Certificate,
    now: datetime.datetime,
) -> datetime.datetime:
    signer = _signer(answer, enclosed, issuer, now)
    key = signer.public_key()
    algorithm = answer.signature_hash_algorithm
    if (
        not isinstance(key, ec.EllipticCurvePublicKey)
        or algorithm is None
        or algorithm.name not in ("sha256", "sha384")
    ):
        raise _wrong("signature", "an OCSP answer is not signed with ECDSA and SHA-384")
    try:
        key.verify(answer.signature, answer.tbs_response_bytes, ec.ECDSA(algorithm))
    except InvalidSignature as error:
        raise _wrong("signature", "the signature of an OCSP answer is invalid") from error
    until = answer.next_update_utc
    if until is None or not answer.this_update_utc <= now <= until:
        raise _wrong("validity", f"an OCSP answer was current until {until}, not at {now}; fetch a new one")
    if answer.certificate_status is ocsp.OCSPCertStatus.REVOKED:
        reason = answer.revocation_reason.name if answer.revocation_reason else "no reason given"
        raise _wrong("revoked", f"NVIDIA has revoked the certificate {certificate.serial_number:x} ({reason})")
    if answer.certificate_status is not ocsp.OCSPCertStatus.GOOD:
        raise _wrong("unknown", f"NVIDIA does not know the certificate {certificate.serial_number:x}")
    return min(until, signer.not_valid_after_utc)


def _signer(
    answer: ocsp.OCSPResponse,
    enclosed: Sequence[x509.Certificate],
    issuer: x509.Certificate,
    now: datetime.datetime,
) -> x509.Certificate:
    """The issuer itself, or a responder whose certificate it issued for this purpose (RFC 6960, 4.2.2.2)."""
    for candidate in (issuer, *enclosed):
        if not _is_named(answer, candidate):
            continue
        if candidate == issuer:
            return issuer
        try:
            candidate.verify_directly_issued_by(issuer)
            usage = candidate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
        except Exception:  # noqa: S112 - not the issuer's: another candidate may be
            continue
        if ExtendedKeyUsageOID.OCSP_SIGNING not in usage:
            continue
        if not candidate.not_valid_before_utc <= now <= candidate.not_valid_after_utc:
            raise _wrong("validity", "the certificate of an OCSP responder is not valid at this time")
        return candidate
    raise _wrong("signature", "the signer of an OCSP answer is neither the certificate's issuer nor its responder")


def _is_named(answer: ocsp.OCSPResponse, certificate: x509.Certificate) -> bool:
    if answer.responder_name is not None:
        return answer.responder_name == certificate.subject
    # RFC 6960, 4.2.1: the responder's key hash is SHA-1, whatever the signature's hash.
    return answer.responder_key_hash == hashlib.sha1(_key_bits(certificate)).digest()  # noqa: S324 - an identifier


def _key_bits(certificate: x509.Certificate) -> bytes:
    """The bits of the public key, without its algorithm; empty for a key that is not on a curve."""
    key = certificate.public_key()
    if isinstance(key, ec.EllipticCurvePublicKey):
        return key.public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)
    return b""


def _wrong(code: str, message: str) -> VerificationError:
    return VerificationError(Step.GPU, f"gpu.ocsp.{code}", message)
