"""Verifies a TDX quote: with `cryptography` up to the pinned root, and with Intel's collateral if there is any."""

import datetime
import hashlib

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from cryptography.hazmat.primitives.serialization import Encoding

from adytum.attestation.core.certificates import check_chain, load_all, spki_sha256
from adytum.attestation.core.checks import Checks
from adytum.attestation.core.errors import Step, UnsupportedError, VerificationError
from adytum.attestation.document.facts import CpuFacts, TdxFacts
from adytum.attestation.tdx.collateral import appraise
from adytum.attestation.tdx.quote import INTEL, QeReport, TdxQuote

PROVIDER = "tdx"
QE_SIGNER = bytes.fromhex("dc9e2a7c6f948f17474e34a7fc43ed030f7c1563f1babddf6340c82e0e54a8c5")
"""MRSIGNER of Intel's enclaves that quote trust domains, as in Intel's QE identity (TD_QE)."""
_QE_PRODUCT = 2
_QE_ATTRIBUTES = bytes.fromhex("11000000000000000000000000000000")
"""INIT and PROVISION_KEY, and no DEBUG."""
_QE_ATTRIBUTES_MASK = bytes.fromhex("fbffffffffffffff0000000000000000")
_SGX_EXTENSION = x509.ObjectIdentifier("1.2.840.113741.1.13.1")
"""Intel's extension of certificates of provisioning keys (Intel SGX PCK Certificate Specification, 1.3.5)."""


def verify_tdx(
    quote: bytes, *, collateral: bytes | None, roots: frozenset[bytes], now: datetime.datetime, checks: Checks
) -> CpuFacts:
    """Verifies a quote at `now`, which needs a time zone. Raises `AttestationError`, or returns the facts.

    1. Structure: the quote follows its format, version 4 or 5 (`EvidenceError`, `UnsupportedError`).
    2. Chain: the PCK certificate chains to a key among `roots` (SHA-256 of SubjectPublicKeyInfo), and is one of a
       provisioning key.
    3. Quoting enclave: the PCK signed its report, and the enclave is Intel's for trust domains, not in debug mode.
       Any enclave of the machine's owner can obtain a signed report; only Intel's is known to quote honestly.
    4. Attestation key: the enclave's report carries its hash.
    5. Quote: the attestation key signed header and body.
    6. Module: the TDX module is Intel's production one.
    7. Collateral: TCB level, quoting enclave's version, revocation and advisories, by `dcap-qvl`, under the same root.
       The library refuses domains in debug mode. Without collateral the status is None and `revocation_checked` is
       False, for a policy to refuse.

    The caller compares the report data.
    """
    # 1. Structure
    parsed = TdxQuote.parse(quote)
    if parsed.vendor != INTEL:
        raise UnsupportedError(Step.CPU_REPORT, "the quote was made by a quoting enclave that is not Intel's")
    checks.ok("tdx.structure", f"the quote follows the format of version {parsed.version}")

    # 2. Chain
    chain = load_all(parsed.pck_chain, "the quote's PCK certificate chain")
    check_chain(chain, roots, now, step=Step.CPU_REPORT, prefix="tdx")
    pck = chain[0].public_key()
    if not isinstance(pck, ec.EllipticCurvePublicKey) or not isinstance(pck.curve, ec.SECP256R1) or not _is_pck(chain):
        raise _wrong("pck", "the chain's first certificate is not one of a platform's provisioning key (PCK)")
    checks.ok("tdx.root", "the platform's certificate chains to the pinned Intel root and is valid at this time")

    # 3. Quoting enclave
    _verify(pck, parsed.qe_signature, parsed.qe_signed, "qe.signature", "the quoting enclave's report", "the platform")
    checks.ok("tdx.qe.signature", "the platform's provisioning key signed the quoting enclave's report")
    _check_identity(parsed.qe)
    checks.ok("tdx.qe.identity", "the quoting enclave is Intel's for trust domains, not in debug mode")

    # 4. Attestation key
    bound = hashlib.sha256(parsed.attestation_key + parsed.qe_authentication).digest() + bytes(32)
    if parsed.qe.report_data != bound:
        raise _wrong("attestation_key", "the attestation key is not the one that the quoting enclave's report names")
    checks.ok("tdx.attestation_key", "the quoting enclave's report names the attestation key")

    # 5. Quote
    try:
        key = ec.EllipticCurvePublicKey.from_encoded_point(ec.SECP256R1(), b"\x04" + parsed.attestation_key)
    except ValueError as error:
        raise _wrong("attestation_key", "the attestation key is not a point of P-256") from error
    _verify(key, parsed.signature, parsed.signed, "signature", "the quote", "the attestation key")
    checks.ok("tdx.signature", "the attestation key signed the quote")

    # 6. Module
    if any(parsed.td.mrsignerseam) or parsed.td.seam_attributes:
        raise _wrong("module", "the TDX module is not Intel's production module")
    checks.ok("tdx.module", "the TDX module is Intel's production module")

    # 7. Collateral
    valid_until = min(certificate.not_valid_after_utc for certificate in chain)
    if collateral is None:
        checks.lacks(
            "tdx.collateral",
            "there is no collateral: whether the platform's firmware is up to date, and whether its certificate was "
            "revoked, is not known",
        )
        status = TdxFacts()
    else:
        status, until = appraise(quote, parsed, collateral, root=chain[-1].public_bytes(Encoding.DER), now=now)
        valid_until = min(valid_until, until)
        checks.ok("tdx.collateral", f"Intel's collateral, valid at this time, rates the platform {status.status}")
    return CpuFacts(
        provider=PROVIDER,
        report_data=parsed.td.report_data,
        measurement=parsed.td.measurement,
        key_sha256=spki_sha256(chain[0]),
        debug=parsed.td.debug,
        migration=parsed.td.migratable,
        revocation_checked=collateral is not None,
        valid_until=valid_until,
        tdx=status,
    )


def _is_pck(chain: tuple[x509.Certificate, ...]) -> bool:
    return any(extension.oid == _SGX_EXTENSION for extension in chain[0].extensions)


def _check_identity(qe: QeReport) -> None:
    attributes = bytes(value & mask for value, mask in zip(qe.attributes, _QE_ATTRIBUTES_MASK, strict=True))
    if qe.mrsigner != QE_SIGNER or qe.product != _QE_PRODUCT or attributes != _QE_ATTRIBUTES or qe.misc_select:
        raise _wrong("qe.identity", "the enclave that made the quote is not Intel's quoting enclave in production mode")


def _verify(key: ec.EllipticCurvePublicKey, signature: bytes, signed: bytes, code: str, what: str, signer: str) -> None:
    r, s = int.from_bytes(signature[:32], "big"), int.from_bytes(signature[32:], "big")
    try:
        key.verify(encode_dss_signature(r, s), signed, ec.ECDSA(hashes.SHA256()))
    except InvalidSignature as error:
        raise _wrong(code, f"{what} was not signed by {signer}, or was changed since") from error


def _wrong(code: str, message: str) -> VerificationError:
    return VerificationError(Step.CPU_REPORT, f"tdx.{code}", message)
