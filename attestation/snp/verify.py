"""Verifies an SEV-SNP report with its certificates. Judges no matter of policy."""

import datetime
from collections.abc import Mapping, Sequence

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature

from adytum.attestation.core.certificates import check_chain, load, spki_sha256
from adytum.attestation.core.checks import Checks
from adytum.attestation.core.errors import EvidenceError, Step, UnsupportedError, VerificationError
from adytum.attestation.document.facts import CpuFacts, SnpFacts
from adytum.attestation.snp.report import SnpReport, tcb_levels
from adytum.attestation.snp.vek import Vek

PROVIDER = "sev-snp"
_ALGORITHM = ec.ECDSA(hashes.SHA384())
_ORDER = int("ffffffffffffffffffffffffffffffffffffffffffffffffc7634d81f4372ddf581a0db248b0a77aecec196accc52973", 16)
"""Of the group of P-384 (FIPS 186-4, D.1.2.4)."""


def verify_snp(
    report: bytes,
    certificates: Sequence[bytes],
    *,
    ark: Mapping[str, frozenset[bytes]],
    now: datetime.datetime,
    checks: Checks,
    crls: Sequence[bytes] = (),
) -> CpuFacts:
    """Verifies at `now`, which needs a time zone. Raises `AttestationError`, or returns the facts.

    `certificates`: DER; the VCEK or VLEK, then ASK or ASVK, then ARK. `ark`: pinned roots, SHA-256 of the
    SubjectPublicKeyInfo by product line. `crls`: DER lists of revoked certificates, AMD's for the product.

    1. Structure: report and certificates follow their formats (`EvidenceError`).
    2. Key: the report states that this kind of key, VCEK or VLEK, signed it.
    3. Product: report (from version 3 on) and certificate name the same line, and its root is known.
    4. Chain: VEK by ASK or ASVK, by the pinned ARK of that line, all valid at `now`.
    5. Revocation: a current list signed by the ARK does not name the ASK or ASVK. Every VEK has serial number 0, so the
       list cannot name a chip's key. Without a list this is noted as not checked.
    6. Signature: ECDSA P-384 with SHA-384 by the VEK over the report's first 0x2A0 bytes.
    7. TCB: the certificate is for the firmware levels in the report.
    8. Chip: the VCEK is for the chip that the report names.
    """
    # 1. Structure
    parsed = SnpReport.parse(report)
    if len(certificates) != 3:
        raise EvidenceError(f"SEV-SNP evidence has three certificates, here are {len(certificates)}")
    names = ("the VEK certificate", "the ASK certificate", "the ARK certificate")
    chain = [load(der, name) for der, name in zip(certificates, names, strict=True)]
    vek = Vek.parse(chain[0])
    checks.ok("snp.structure", f"the report is an SEV-SNP report of version {parsed.version}")

    # 2. Key
    if parsed.signing_key != vek.kind:
        raise _wrong(
            "key", f"the report states that a {parsed.signing_key} signed it; the certificate is a {vek.kind}'s"
        )
    checks.ok("snp.key", f"the report was signed with a {vek.kind.upper()}")

    # 3. Product
    if parsed.product not in (None, vek.product):
        raise _wrong("product", f"the report is from a {parsed.product}, the certificate is for a {vek.product}")
    if not ark.get(vek.product):
        raise _wrong("product", f"no root is pinned for {vek.product}")
    checks.ok("snp.product", f"the processor is of the line {vek.product}")

    # 4. Chain
    check_chain(chain, ark[vek.product], now, step=Step.CPU_REPORT, prefix="snp.chain")
    checks.ok("snp.chain", "AMD's root for this line issued the certificate of the key")

    # 5. Revocation
    expires = [certificate.not_valid_after_utc for certificate in chain]
    if crls:
        expires.append(_check_revocation(chain[1], chain[2], crls, now))
        checks.ok("snp.crl", "AMD has not revoked the intermediate certificate")
    else:
        checks.lacks("snp.crl", "no list of revoked certificates was given")

    # 6. Signature
    r, s = parsed.signature
    if not (0 < r < _ORDER and 0 < s < _ORDER):
        raise _wrong("signature", "the report's signature is not a pair of numbers in the range of P-384")
    try:
        vek.key.verify(encode_dss_signature(r, s), parsed.signed, _ALGORITHM)
    except InvalidSignature as error:
        raise _wrong("signature", "the report's signature is invalid for the certificate's key") from error
    checks.ok("snp.signature", "the hardware's key signed the report")

    # 7. TCB
    tcb = tcb_levels(vek.product, parsed.reported_tcb)
    if tcb != vek.tcb:
        differing = ", ".join(sorted(name for name in tcb if tcb[name] != vek.tcb.get(name)))
        raise _wrong("tcb", f"the certificate is for other firmware levels than those in the report ({differing})")
    checks.ok("snp.tcb", f"the certificate is for the reported firmware: {_levels(tcb)}")

    # 8. Chip
    if vek.hwid is not None:
        if not any(parsed.chip_id):
            raise _wrong("chip_masked", "the host hides the chip's id, so a VCEK cannot be tied to the report")
        if parsed.chip_id != vek.hwid + bytes(64 - len(vek.hwid)):
            raise _wrong("chip", "the certificate is for another chip than the one that the report names")
        checks.ok("snp.chip", "the certificate is for the chip that the report names")
    elif any(parsed.chip_id):
        raise _wrong("chip", "a report that a provider's key (VLEK) signed names a chip")

    return CpuFacts(
        provider=PROVIDER,
        report_data=parsed.report_data,
        measurement=parsed.measurement,
        key_sha256=spki_sha256(chain[0]),
        debug=parsed.debug,
        migration=parsed.migration,
        revocation_checked=bool(crls),
        valid_until=min(expires),
        snp=SnpFacts(vek.product, tcb, parsed.vmpl, parsed.flags, parsed.chip_id, vek.kind, vek.csp_id),
    )


def _check_revocation(
    ask: x509.Certificate, ark: x509.Certificate, crls: Sequence[bytes], now: datetime.datetime
) -> datetime.datetime:
    """Requires every list to be the ARK's, current, and to name neither certificate. Returns the first expiry."""
    expires = []
    for der in crls:
        try:
            crl = x509.load_der_x509_crl(der)
            signed_by_ark = crl.issuer == ark.subject and crl.is_signature_valid(_rsa(ark))
            updated, next_update = crl.last_update_utc, crl.next_update_utc
            revoked = crl.get_revoked_certificate_by_serial_number(ask.serial_number)
            revoked = revoked or crl.get_revoked_certificate_by_serial_number(ark.serial_number)
            partial = any(extension.critical for extension in crl.extensions)
        except Exception as error:  # The library's errors for odd lists have no common base.
            raise EvidenceError("the list of revoked certificates cannot be read") from error
        # The library ignores the signature's count of unused bits, which no signature covers: it has to be 0.
        if not der.endswith(b"\x00" + crl.signature):
            raise EvidenceError("the list of revoked certificates is not DER")
        if not signed_by_ark:
            raise _wrong("crl.signature", "the list of revoked certificates is not signed by the ARK of this chain")
        if partial:
            # A list of changes, or of some certificates only, has a critical extension. AMD's lists have none.
            raise UnsupportedError(Step.CPU_REPORT, "the list of revoked certificates may not be complete")
        if next_update is None or not updated <= now <= next_update:
            raise _wrong("crl.validity", "the list of revoked certificates is not current; fetch a new one")
        if revoked is not None:
            raise _wrong("crl.revoked", "AMD has revoked a certificate of this chain")
        expires.append(next_update)
    return min(expires)


def _rsa(certificate: x509.Certificate) -> RSAPublicKey:
    key = certificate.public_key()
    if not isinstance(key, RSAPublicKey):
        raise TypeError("the ARK's key is not an RSA key")
    return key


def _levels(tcb: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {level}" for name, level in tcb.items())


def _wrong(code: str, message: str) -> VerificationError:
    return VerificationError(Step.CPU_REPORT, f"snp.{code}", message)
