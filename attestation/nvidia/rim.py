"""Reference integrity manifests (RIM): the measurements that NVIDIA expects of a driver or a VBIOS, signed.

A manifest is a SWID tag (ISO/IEC 19770-2, TCG PC Client RIM Information Model) with an enveloped XML signature
(W3C XML Signature 1.1). Only NVIDIA's form of signature is accepted, which rules out signature wrapping: one signature,
the last child of the root, over the whole document, with one set of algorithms.
"""

import base64
import binascii
import copy
import datetime
import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Self

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from lxml import etree

from adytum.attestation.core.certificates import check_chain, load
from adytum.attestation.core.checks import Checks
from adytum.attestation.core.errors import EvidenceError, Step, VerificationError
from adytum.attestation.core.limits import LIMITS
from adytum.attestation.nvidia.spdm import GpuReport

_SWID = "{http://standards.iso.org/iso/19770/-2/2015/schema.xsd}"
_HASH = re.compile(re.escape("{http://www.w3.org/2001/04/xmlenc#sha384}") + r"Hash(\d{1,2})")
_DS = "{http://www.w3.org/2000/09/xmldsig#}"
_XML = "{http://www.w3.org/XML/1998/namespace}"
_C14N = "http://www.w3.org/2006/12/xml-c14n11"
_ENVELOPED = "http://www.w3.org/2000/09/xmldsig#enveloped-signature"
_SHA384 = "http://www.w3.org/2001/04/xmldsig-more#sha384"
_SHA384_ENC = "http://www.w3.org/2001/04/xmlenc#sha384"
_ECDSA = "http://www.w3.org/2001/04/xmldsig-more#ecdsa-sha384"
_ALGORITHM = ec.ECDSA(hashes.SHA384())
_VBIOS_VERSION = re.compile(r"[0-9A-F]{2}(\.[0-9A-F]{2}){4}")
_DIGEST_SIZE = 48
_ATTRIBUTES, _NAMESPACES = 64, 32
_NVDEC0_INDEX = 35
"""In the manifest's counting."""
_PRODUCTS = {"hopper": ("GH",), "blackwell": ("GB",)}


@dataclass(frozen=True)
class Rim:
    """One manifest; not verified unless `verify_rim` returned it."""

    product: str
    """Like GH100."""
    version: str
    """Of the driver or the VBIOS."""
    measurements: Mapping[int, frozenset[bytes]]
    """Accepted digests, 48 bytes, by the index of the report's measurement (from 1). Active ones only."""
    chain: tuple[x509.Certificate, ...]
    """The signer's, leaf first, root last."""
    signed: "_Signed"

    @property
    def is_vbios(self) -> bool:
        """Whether it is a VBIOS's manifest, by the form of the version; else it is a driver's."""
        return _VBIOS_VERSION.fullmatch(self.version) is not None

    @property
    def kind(self) -> str:
        """For people."""
        return "VBIOS" if self.is_vbios else "driver"

    @property
    def valid_until(self) -> datetime.datetime:
        """When the first certificate of the signer's chain expires."""
        return min(certificate.not_valid_after_utc for certificate in self.chain)

    def is_for(self, architecture: str, driver_version: str, vbios_version: str) -> bool:
        """Whether it is the manifest of this driver or this VBIOS."""
        return self.product.startswith(_PRODUCTS[architecture]) and self.version in (driver_version, vbios_version)

    @classmethod
    def parse(cls, data: bytes) -> Self:
        """Reads a manifest. Raises `EvidenceError`."""
        root = _root(data)
        metas = root.findall(f"{_SWID}Meta")
        payloads = root.findall(f"{_SWID}Payload")
        if len(metas) != 1 or len(payloads) != 1:
            raise EvidenceError("the manifest does not have one description and one payload")
        signed = _Signed.parse(root)
        return cls(
            product=_attribute(metas[0], "product"),
            version=_attribute(metas[0], "colloquialVersion"),
            measurements=_measurements(payloads[0]),
            chain=signed.chain,
            signed=signed,
        )


@dataclass(frozen=True)
class _Signed:
    """The signature's parts; what is hashed is in canonical form."""

    document: bytes
    """The document without its signature."""
    information: bytes
    """SignedInfo."""
    digest: bytes
    signature: bytes
    chain: tuple[x509.Certificate, ...]

    def __repr__(self) -> str:
        return "_Signed(...)"

    @classmethod
    def parse(cls, root: etree._Element) -> Self:
        signatures = list(root.iter(f"{_DS}Signature"))
        if len(signatures) != 1 or signatures[0] is not root[-1]:
            raise EvidenceError("the manifest does not end with its one signature")
        signature = signatures[0]
        information = _only(signature, "SignedInfo")
        reference = _only(information, "Reference")
        transforms = [_attribute(item, "Algorithm") for item in _only(reference, "Transforms")]
        if (
            _attribute(_only(information, "CanonicalizationMethod"), "Algorithm") != _C14N
            or _attribute(_only(information, "SignatureMethod"), "Algorithm") != _ECDSA
            or _attribute(_only(reference, "DigestMethod"), "Algorithm") not in (_SHA384, _SHA384_ENC)
            or reference.get("URI") != ""
            or transforms not in ([_ENVELOPED], [_ENVELOPED, _C14N])
        ):
            raise EvidenceError("the manifest's signature is not in NVIDIA's form (whole document, C14N 1.1, SHA-384)")
        certificates = _only(_only(signature, "KeyInfo"), "X509Data").findall(f"{_DS}X509Certificate")
        if not 2 <= len(certificates) <= LIMITS.certificates:
            raise EvidenceError("the manifest does not bring its signer's certificate chain")
        return cls(
            document=_without_signature(root),
            information=_canonical(information),
            digest=_base64(_only(reference, "DigestValue")),
            signature=_base64(_only(signature, "SignatureValue")),
            chain=tuple(load(_base64(item), "a certificate in the manifest") for item in certificates),
        )


def verify_rim(data: bytes | Rim, *, roots: frozenset[bytes], now: datetime.datetime, checks: Checks) -> Rim:
    """Verifies at `now`. Raises `AttestationError`, or returns the manifest.

    1. Structure: it follows its format (`EvidenceError`).
    2. Digest: the signature's digest is that of the document.
    3. Chain: the signer's certificates up to a pinned root, all valid at `now`.
    4. Signature: ECDSA P-384 with SHA-384 by the signer over SignedInfo.
    """
    # 1. Structure
    rim = data if isinstance(data, Rim) else Rim.parse(data)
    signed = rim.signed

    # 2. Digest
    if hashlib.sha384(signed.document).digest() != signed.digest:
        raise _wrong("rim.digest", f"the manifest for {rim.version} is not the one that was signed")

    # 3. Chain
    check_chain(rim.chain, roots, now, step=Step.GPU, prefix="gpu.rim.chain")

    # 4. Signature
    key = rim.chain[0].public_key()
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP384R1):
        raise EvidenceError("the key of the manifest's signer is not on P-384")
    if len(signed.signature) != 2 * _DIGEST_SIZE:
        raise EvidenceError("the manifest's signature is not two numbers of 48 bytes")
    r, s = (int.from_bytes(half, "big") for half in (signed.signature[:48], signed.signature[48:]))
    try:
        key.verify(encode_dss_signature(r, s), signed.information, _ALGORITHM)
    except InvalidSignature as error:
        raise _wrong("rim.signature", f"the signature of the manifest for {rim.version} is invalid") from error
    checks.ok("gpu.rim", f"NVIDIA signed the manifest of the {rim.kind} {rim.version}")
    return rim


def rim_ids(report: GpuReport, architecture: str) -> tuple[str, str]:
    """Names of the driver's and the VBIOS's manifest at NVIDIA's service."""
    version = report.vbios_version.replace(".", "")
    driver = f"NV_GPU_DRIVER_GH100_{report.driver_version}"
    if architecture == "blackwell":
        driver = f"NV_GPU_CC_DRIVER_{report.chip_info or 'GB100'}_{report.driver_version}"
    return driver, f"NV_GPU_VBIOS_{report.project}_{report.project_sku}_{report.chip_sku}_{version}"


def compare(measurements: Mapping[int, bytes], rims: Sequence[Rim], *, nvdec0_on: bool) -> int:
    """How many measurements agree. Every one that a manifest names has to, with one exception.

    Manifest index 35 is about video decoder 0: if that is off, its measurement may differ.
    Raises `VerificationError`: `gpu.rim.overlap`, `gpu.measurements`.
    """
    wanted: dict[int, frozenset[bytes]] = {}
    for rim in rims:
        if overlap := rim.measurements.keys() & wanted.keys():
            raise _wrong("rim.overlap", f"both manifests name the measurements {_list(overlap)}")
        wanted.update(rim.measurements)
    differing = {index for index, accepted in wanted.items() if measurements.get(index) not in accepted}
    excused = set() if nvdec0_on else {_NVDEC0_INDEX + 1}
    if differing - excused:
        raise _wrong(
            "measurements", f"the measurements {_list(differing - excused)} are not those in NVIDIA's manifests"
        )
    matched = len(wanted) - len(differing)
    if not matched:
        raise _wrong("measurements", "NVIDIA's manifests name no measurement to compare")
    return matched


def _root(data: bytes) -> etree._Element:
    if len(data) > LIMITS.collateral:
        raise EvidenceError(f"the manifest is larger than {LIMITS.collateral} bytes")
    parser = etree.XMLParser(
        resolve_entities=False, no_network=True, load_dtd=False, huge_tree=False, collect_ids=False
    )
    try:
        root = etree.fromstring(data, parser)
    except (etree.XMLSyntaxError, ValueError) as error:
        raise EvidenceError("the manifest is not readable XML") from error
    about: Any = root.getroottree().docinfo  # The stubs lack `doctype`.
    if about.doctype:
        raise EvidenceError("the manifest has a document type, which NVIDIA's never have")
    if root.tag != f"{_SWID}SoftwareIdentity":
        raise EvidenceError("the manifest is not a software identity (SWID) tag")
    if root.getprevious() is not None or root.getnext() is not None:
        raise EvidenceError("the manifest has comments or instructions around it, which NVIDIA's never have")
    for element in root.iter():
        # lxml implements C14N 1.0, which differs from 1.1 only in attributes of this namespace.
        if not isinstance(element.tag, str) or any(str(name).startswith(_XML) for name in element.attrib):
            raise EvidenceError("the manifest has comments, instructions or xml: attributes, which NVIDIA's never have")
        # Canonicalization takes time quadratic in both; NVIDIA's have 12 and 6.
        if len(element.attrib) > _ATTRIBUTES or len(element.nsmap) > _NAMESPACES:
            raise EvidenceError("the manifest has an element with too many attributes or namespaces")
    return root


def _measurements(payload: etree._Element) -> Mapping[int, frozenset[bytes]]:
    found: dict[int, frozenset[bytes]] = {}
    seen: set[int] = set()
    for resource in payload:
        if resource.tag != f"{_SWID}Resource" or resource.get("type") != "Measurement":
            raise EvidenceError("the manifest's payload has an element that is not a measurement")
        index = _number(resource, "index")
        if index in seen:
            raise EvidenceError(f"the manifest has measurement {index} twice")
        seen.add(index)
        digests = {int(match[1]): value for name, value in resource.items() if (match := _HASH.fullmatch(str(name)))}
        alternatives, size = _number(resource, "alternatives"), _number(resource, "size")
        if size != _DIGEST_SIZE or sorted(digests) != list(range(alternatives)) or not digests:
            raise EvidenceError(f"the manifest's measurement {index} does not have the digests that it announces")
        values = frozenset(_hex(str(value), index) for value in digests.values())
        # The manifest counts from 0, the report from 1.
        if resource.get("active") == "True":
            found[index + 1] = values
        elif resource.get("active") != "False":
            raise EvidenceError(f"the manifest does not state whether measurement {index} is active")
    if not found:
        raise EvidenceError("the manifest names no active measurement")
    return MappingProxyType(found)


def _only(parent: etree._Element, name: str) -> etree._Element:
    found = parent.findall(f"{_DS}{name}")
    if len(found) != 1:
        raise EvidenceError(f"the manifest's signature does not have one {name}")
    return found[0]


def _attribute(element: etree._Element, name: str) -> str:
    value = element.get(name)
    if not value or not value.isascii() or not value.isprintable():
        raise EvidenceError(f"the manifest lacks the attribute {name}")
    return str(value)


def _number(element: etree._Element, name: str) -> int:
    text = _attribute(element, name)
    if not re.fullmatch("[0-9]{1,3}", text):
        raise EvidenceError(f"the manifest's attribute {name} is not a number")
    return int(text)


def _hex(text: str, index: int) -> bytes:
    if not re.fullmatch("[0-9a-fA-F]{96}", text):
        raise EvidenceError(f"the manifest's measurement {index} is not 96 hexadecimal digits")
    return bytes.fromhex(text)


def _base64(element: etree._Element) -> bytes:
    text = "".join((element.text or "").split())
    try:
        decoded = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise EvidenceError("the manifest has a value that is not base64") from error
    if base64.b64encode(decoded).decode() != text:
        raise EvidenceError("the manifest has a value that is not base64 in its one form")
    return decoded


def _without_signature(root: etree._Element) -> bytes:
    """The canonical form after the enveloped-signature transform, which keeps the text after the element."""
    document = copy.deepcopy(root)
    signature = document[-1]
    before = signature.getprevious()
    if signature.tail and before is not None:
        before.tail = (before.tail or "") + signature.tail
    document.remove(signature)
    return _canonical(document)


def _canonical(element: etree._Element) -> bytes:
    try:
        return bytes(etree.tostring(element, method="c14n", exclusive=False, with_comments=False, with_tail=False))
    except etree.LxmlError as error:  # A namespace that is a relative reference has no canonical form.
        raise EvidenceError("the manifest has no canonical form") from error


def _list(indexes: Iterable[int]) -> str:
    return ", ".join(map(str, sorted(indexes)))


def _wrong(code: str, message: str) -> VerificationError:
    return VerificationError(Step.GPU, f"gpu.{code}", message)
