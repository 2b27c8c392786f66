"""The TDX quote: format and parsing. `adytum.attestation.tdx.verify` verifies it.

Layout, integers little-endian (Intel TDX DCAP Quoting Library API, appendix A.3, "Version 4 and 5 Quote Format"):

Header, 48 bytes: version u16, attestation key type u16 (2: ECDSA P-256), TEE type u32 (0x81: TDX), 4 reserved,
QE vendor id[16], user data[20].
Version 5 only: body type u16 (2: TDX 1.0, 3: TDX 1.5), body size u32.
Body, 584 bytes, 648 for TDX 1.5: see `_BODY`.
Signature data length u32, then the signature data: signature[64], attestation key[64], certification data type u16 = 6
and size u32, and in it: QE report[384], its signature[64], authentication data size u16 and data, certification data
type u16 = 5 and size u32, and in it the PCK certificate chain in PEM, leaf first.
The buffer that the quote came in may end with zero bytes.
"""

import hashlib
import struct
from dataclasses import dataclass
from typing import Self

from adytum.attestation.core.errors import EvidenceError, Step, UnsupportedError
from adytum.attestation.core.limits import LIMITS, Limits
from adytum.attestation.core.reader import Reader

INTEL = bytes.fromhex("939a7233f79c4ca9940a0db3957f0607")
"""The QE vendor id of Intel's quoting enclave."""
_HEADER = "<HHI4s16s20s"
_BODY_HEAD = "<HI"
_BODY = struct.Struct("<16s48s48sQQQ48s48s48s48s48s48s48s48s64s")
_BODY_15 = struct.Struct("<16s48s")
_BODY_SIZES = {2: _BODY.size, 3: _BODY.size + _BODY_15.size}
_QE_REPORT = struct.Struct("<16sI28s16s32s32s32s96sHH60s64s")
_ECDSA_P256 = 2
_TDX = 0x81
_PCK_CHAIN = 5
_QE_REPORT_CERTIFICATION = 6
_UNDER_DEBUG = 0xFF
_MIGRATABLE = 1 << 29


@dataclass(frozen=True)
class TdReport:
    """The fields of a quote about its trust domain that are needed. The registers have 48 bytes each."""

    tee_tcb_svn: bytes
    """16 bytes: the versions of the TDX module and what loads it."""
    mrsignerseam: bytes
    """Zero for Intel's own TDX module."""
    seam_attributes: int
    td_attributes: int
    xfam: int
    mrtd: bytes
    """What the domain was built from: the firmware."""
    rtmr: tuple[bytes, bytes, bytes, bytes]
    """What ran since, measured by the firmware (0), the boot loader and kernel (1, 2) and programs (3)."""
    report_data: bytes
    """The 64 bytes that the domain asked to have signed."""
    tee_tcb_svn2: bytes | None
    """TDX 1.5: the versions of the module that runs now, 16 bytes."""
    mrservicetd: bytes | None
    """TDX 1.5."""

    @property
    def debug(self) -> bool:
        """Whether any bit of the attributes' lowest byte (TUD, TD under debug) is set: such a domain has no
        secrets from its host (Intel TDX Module ABI, ATTRIBUTES)."""
        return bool(self.td_attributes & _UNDER_DEBUG)

    @property
    def migratable(self) -> bool:
        """Whether the domain may move to another machine (ATTRIBUTES bit 29)."""
        return bool(self.td_attributes & _MIGRATABLE)

    @property
    def measurement(self) -> bytes:
        """SHA-384 of MRTD and RTMR 0 to 3: all measurements in one value of 48 bytes."""
        return hashlib.sha384(b"".join((self.mrtd, *self.rtmr))).digest()


@dataclass(frozen=True)
class QeReport:
    """The quoting enclave's own SGX report: the fields that are checked."""

    misc_select: int
    attributes: bytes
    """16 bytes: FLAGS, then XFRM."""
    mrsigner: bytes
    product: int
    svn: int
    report_data: bytes


@dataclass(frozen=True)
class TdxQuote:
    """One quote, parsed and not yet verified."""

    encoded: bytes
    """The quote without the zero bytes after it."""
    version: int
    body_type: int
    """2: TDX 1.0, 3: TDX 1.5."""
    vendor: bytes
    td: TdReport
    signed: bytes
    """Header and body, which the attestation key signs."""
    signature: bytes
    """r, then s, 32 bytes each, big-endian."""
    attestation_key: bytes
    """x, then y, 32 bytes each, big-endian."""
    qe: QeReport
    qe_signed: bytes
    """The QE report, which the PCK signs."""
    qe_signature: bytes
    qe_authentication: bytes
    pck_chain: bytes
    """PEM, leaf first."""

    @classmethod
    def parse(cls, data: bytes, limits: Limits = LIMITS) -> Self:
        """Reads a quote, version 4 or 5. Raises `EvidenceError`, and `UnsupportedError` for other versions, key types
        and kinds of certification data."""
        if len(data) > limits.report:
            raise EvidenceError(f"the quote has {len(data)} bytes, more than {limits.report}")
        quote = Reader(data, "the quote")
        version, key_type, tee, _, vendor, _ = quote.unpack(_HEADER)
        if version not in (4, 5):
            raise _unsupported(f"quotes of version {version}")
        if tee != _TDX:
            raise EvidenceError(f"the quote is for the TEE type {tee:#x} and not for TDX (0x81)")
        if key_type != _ECDSA_P256:
            raise _unsupported(f"attestation keys of type {key_type}")
        body_type = 2
        if version == 5:
            body_type, size = quote.unpack(_BODY_HEAD)
            if body_type not in _BODY_SIZES:
                raise _unsupported(f"quote bodies of type {body_type}")
            if size != _BODY_SIZES[body_type]:
                raise EvidenceError(f"a quote body of type {body_type} does not have {size} bytes")
        td = _td_report(quote, body_type)
        signed = data[: quote.at]
        signature_data = Reader(quote.sized(4), "the quote's signature data")
        if data[quote.at :].strip(b"\x00"):
            raise EvidenceError("something other than zero bytes follows the quote")
        signature, attestation_key = signature_data.take(64), signature_data.take(64)
        certification = _certification(signature_data, _QE_REPORT_CERTIFICATION)
        qe_signed, qe_signature = certification.take(_QE_REPORT.size), certification.take(64)
        qe_authentication = certification.sized(2)
        _, misc, _, attributes, _, _, mrsigner, _, product, svn, _, qe_data = _QE_REPORT.unpack(qe_signed)
        chain = _certification(certification, _PCK_CHAIN)
        return cls(
            encoded=data[: quote.at],
            version=version,
            body_type=body_type,
            vendor=vendor,
            td=td,
            signed=signed,
            signature=signature,
            attestation_key=attestation_key,
            qe=QeReport(misc, attributes, mrsigner, product, svn, qe_data),
            qe_signed=qe_signed,
            qe_signature=qe_signature,
            qe_authentication=qe_authentication,
            # Quotes of real machines end the PEM text with a NUL.
            pck_chain=chain.take(chain.left).rstrip(b"\x00"),
        )


def _certification(outer: Reader, wanted: int) -> Reader:
    """Certification data of the type `wanted`, which has to be the last field of `outer`."""
    if (kind := outer.integer(2)) != wanted:
        raise _unsupported(f"certification data of type {kind} in place of type {wanted}")
    name = f"the quote's certification data of type {wanted}"
    data = outer.sized(4)
    outer.end(name)
    return Reader(data, name)


def _td_report(quote: Reader, body_type: int) -> TdReport:
    svn, _, mrsignerseam, seam_attributes, td_attributes, xfam, *registers, report_data = quote.unpack(_BODY.format)
    mrtd, _, _, _, *rtmr = registers
    svn2, mrservicetd = quote.unpack(_BODY_15.format) if body_type == 3 else (None, None)
    return TdReport(
        tee_tcb_svn=svn,
        mrsignerseam=mrsignerseam,
        seam_attributes=seam_attributes,
        td_attributes=td_attributes,
        xfam=xfam,
        mrtd=mrtd,
        rtmr=(rtmr[0], rtmr[1], rtmr[2], rtmr[3]),
        report_data=report_data,
        tee_tcb_svn2=svn2,
        mrservicetd=mrservicetd,
    )


def _unsupported(what: str) -> UnsupportedError:
    return UnsupportedError(Step.CPU_REPORT, f"this version cannot verify {what}; use a version that can")
