"""The rest of the fake NVIDIA: who signs manifests, who answers about revocation (OCSP), who appraises (NRAS).

All of it signs for real, in the form of the real captures: SWID tags with one enveloped signature of 96 raw bytes,
delegated OCSP responders named by key hash, compact tokens with ES384.
"""

import base64
import contextlib
import datetime
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509 import ocsp
from cryptography.x509.oid import ExtendedKeyUsageOID
from lxml import etree

from adytum.attestation.core.certificates import spki_sha256
from adytum.attestation.core.errors import VerificationError
from tests.unit.attestation.nvidia.authority import NOW, Issuer, Key, issue, new_key, raw_signature

DAY = datetime.timedelta(days=1)
SWID = "http://standards.iso.org/iso/19770/-2/2015/schema.xsd"
DSIG = "http://www.w3.org/2000/09/xmldsig#"
C14N = "http://www.w3.org/2006/12/xml-c14n11"
ENVELOPED = f"{DSIG}enveloped-signature"
GOOD, REVOKED, UNKNOWN = ocsp.OCSPCertStatus.GOOD, ocsp.OCSPCertStatus.REVOKED, ocsp.OCSPCertStatus.UNKNOWN
NRAS_ISSUER = "https://nras.attestation.nvidia.com"


@contextlib.contextmanager
def refused(code: str, text: str = "") -> Iterator[None]:
    """Refused with exactly this code, and with this in its message."""
    with pytest.raises(VerificationError) as caught:
        yield
    assert caught.value.code == code
    assert text in str(caught.value)


def same(text: str) -> str:
    return text


def resource(index: int, digests: Sequence[bytes], active: str = "True") -> str:
    """One measurement as a manifest lists it; `index` is the manifest's, from 0."""
    values = " ".join(f'ns2:Hash{place}="{digest.hex()}"' for place, digest in enumerate(digests))
    return (
        f'<ns0:Resource type="Measurement" index="{index}" active="{active}" alternatives="{len(digests)}" {values} '
        f'name="Measurement_{index}" size="48"/>'
    )


@dataclass(frozen=True)
class RimText:
    """A manifest before it is signed."""

    resources: Sequence[str]
    version: str = "550.90.07"
    product: str = "GH100"

    def __str__(self) -> str:
        listed = "\n        ".join(self.resources)
        return (
            f'<SoftwareIdentity xmlns="{SWID}" xmlns:ns0="{SWID}" xmlns:ns2="http://www.w3.org/2001/04/xmlenc#sha384" '
            f'corpus="false" name="{self.product}" patch="false" tagId="0f" version="1.0" tagVersion="0">\n'
            '    <ns0:Entity name="Fake NVIDIA Corporation" role="softwareCreator tagCreator"/>\n'
            f'    <ns0:Meta colloquialVersion="{self.version}" edition="GPU" product="{self.product}" revision="r1"/>\n'
            f"    <ns0:Payload>\n        {listed}\n    </ns0:Payload>\n</SoftwareIdentity>"
        )


@dataclass
class RimAuthority:
    """Root, two intermediates, signer."""

    root: Issuer = field(default_factory=lambda: issue("Fake CoRIM signing Root CA", None))
    signer_until: datetime.datetime = NOW + 200 * DAY

    def __post_init__(self) -> None:
        self.ca = issue("Fake Reference Value GH100 CA", self.root)
        self.l3 = issue("Fake Reference Value L3 GH100", self.ca)
        self.signer = issue("Fake HCC RIM L4 Signer", self.l3, ca=False, not_after=self.signer_until)
        self.issuers = (self.signer, self.l3, self.ca, self.root)
        self.chain = tuple(issuer.certificate for issuer in self.issuers)
        """Leaf first."""
        self.roots = frozenset({spki_sha256(self.root.certificate)})

    def rim(
        self, active: Mapping[int, Sequence[bytes]], *, version: str = "550.90.07", product: str = "GH100"
    ) -> bytes:
        """A manifest of 64 measurements; `active` gives the digests that count, by the manifest's index (from 0)."""
        listed = [
            resource(index, active[index]) if index in active else resource(index, [bytes(48)], "False")
            for index in range(64)
        ]
        return self.sign(str(RimText(listed, version, product)))

    def sign(
        self,
        text: str,
        *,
        information: Callable[[str], str] = same,
        signature: Callable[[bytes], bytes] = bytes,
        key: Key | None = None,
        chain: Iterable[x509.Certificate] | None = None,
        finish: Callable[[str], str] = same,
    ) -> bytes:
        """Signs a document as it stands.

        `information` edits SignedInfo before it is signed, `signature` the 96 bytes, `finish` the whole text after it.
        """
        digest = hashlib.sha384(canonical(etree.fromstring(text.encode()))).digest()
        certificates = "".join(
            f"<ds:X509Certificate>{base64.encodebytes(item.public_bytes(Encoding.DER)).decode()}</ds:X509Certificate>"
            for item in (self.chain if chain is None else chain)
        )
        signed_info = information(
            f'<ds:SignedInfo><ds:CanonicalizationMethod Algorithm="{C14N}"/>'
            '<ds:SignatureMethod Algorithm="http://www.w3.org/2001/04/xmldsig-more#ecdsa-sha384"/>'
            f'<ds:Reference URI=""><ds:Transforms><ds:Transform Algorithm="{ENVELOPED}"/>'
            f'<ds:Transform Algorithm="{C14N}"/></ds:Transforms>'
            '<ds:DigestMethod Algorithm="http://www.w3.org/2001/04/xmldsig-more#sha384"/>'
            f"<ds:DigestValue>{base64.b64encode(digest).decode()}</ds:DigestValue></ds:Reference></ds:SignedInfo>"
        )
        head, close, tail = text.rpartition("</SoftwareIdentity>")

        def whole(value: str) -> str:
            return (
                f'{head}<ds:Signature xmlns:ds="{DSIG}">{signed_info}<ds:SignatureValue>{value}</ds:SignatureValue>'
                f"<ds:KeyInfo><ds:X509Data>{certificates}</ds:X509Data></ds:KeyInfo></ds:Signature>{close}{tail}"
            )

        # The canonical form of SignedInfo has the namespaces of the place where it stands.
        placed = next(etree.fromstring(whole("").encode()).iter(f"{{{DSIG}}}SignedInfo"))
        raw = signature(raw_signature(key or self.signer.key, canonical(placed)))
        return finish(whole(base64.b64encode(raw).decode())).encode()


def canonical(element: etree._Element) -> bytes:
    return bytes(etree.tostring(element, method="c14n", exclusive=False, with_comments=False, with_tail=False))


def responder(
    issuer: Issuer,
    *,
    usage: Sequence[x509.ObjectIdentifier] = (ExtendedKeyUsageOID.OCSP_SIGNING,),
    until: datetime.datetime = NOW + 300 * DAY,
    key: Key | None = None,
) -> Issuer:
    """Whom an issuer named to answer about its certificates."""
    key = key or new_key()
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "Fake OCSP Responder")])
    builder = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(issuer.certificate.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(NOW - 300 * DAY)
        .not_valid_after(until)
    )
    if usage:
        builder = builder.add_extension(x509.ExtendedKeyUsage(usage), critical=True)
    return Issuer(builder.sign(issuer.key, hashes.SHA384()), key)


def answer(
    about: x509.Certificate,
    issuer: Issuer,
    *,
    by: Issuer | None = None,
    enclosed: Sequence[x509.Certificate] | None = None,
    status: ocsp.OCSPCertStatus = GOOD,
    reason: x509.ReasonFlags | None = None,
    since: datetime.datetime = NOW - DAY / 24,
    until: datetime.datetime | None = NOW + DAY,
    named_by: ocsp.OCSPResponderEncoding = ocsp.OCSPResponderEncoding.HASH,
    identified_by: hashes.HashAlgorithm | None = None,
    digest: hashes.HashAlgorithm | None = None,
) -> bytes:
    """An OCSP answer, DER. `by`: the signer; None is a responder of the issuer. `enclosed`: the certificates in it;
    None is the signer's."""
    signer = by or responder(issuer)
    builder = ocsp.OCSPResponseBuilder().add_response(
        cert=about,
        issuer=issuer.certificate,
        algorithm=identified_by or hashes.SHA384(),
        cert_status=status,
        this_update=since,
        next_update=until,
        revocation_time=NOW - 5 * DAY if status is REVOKED else None,
        revocation_reason=reason,
    )
    certificates = [signer.certificate] if enclosed is None else list(enclosed)
    if certificates:
        builder = builder.certificates(certificates)
    made = builder.responder_id(named_by, signer.certificate).sign(signer.key, digest or hashes.SHA384())
    return made.public_bytes(Encoding.DER)


def good_answers(issuers: Sequence[Issuer]) -> list[bytes]:
    """One about each of a chain's certificates but its root's; `issuers`: leaf first."""
    return [answer(below.certificate, above) for below, above in pairwise(issuers)]


class FakeNras:
    """A remote appraisal service. It says what it is told to."""

    def __init__(self, kid: str = "fake-kid-1") -> None:
        self.key = new_key()
        self.kid = kid

    def jwk(self, **changes: object) -> dict[str, object]:
        numbers = self.key.public_key().public_numbers()
        x, y = (base64url(number.to_bytes(48, "big")) for number in (numbers.x, numbers.y))
        return {"kty": "EC", "crv": "P-384", "kid": self.kid, "use": "sig", "alg": "ES384", "x": x, "y": y, **changes}

    def jwks(self, **changes: object) -> bytes:
        return json.dumps({"keys": [self.jwk(**changes)]}).encode()

    def token(self, claims: object, **header: object) -> str:
        """A compact token; `header` replaces fields of its header."""
        return self.sign(base64url(json.dumps({"kid": self.kid, "alg": "ES384", **header}).encode()), _part(claims))

    def sign(self, header: str, claims: str) -> str:
        signed = f"{header}.{claims}"
        return f"{signed}.{base64url(raw_signature(self.key, signed.encode()))}"

    @staticmethod
    def base(nonce: bytes) -> dict[str, object]:
        seconds = int(NOW.timestamp()) - 60
        return {
            "iss": NRAS_ISSUER, "iat": seconds, "nbf": seconds, "exp": seconds + 3600, "eat_nonce": nonce.hex(),
        }  # fmt: skip

    def gpu(self, nonce: bytes, **changes: object) -> dict[str, object]:
        """The claims about one GPU that passes."""
        return {
            **self.base(nonce), "measres": "success", "secboot": True, "dbgstat": "disabled",
            "hwmodel": "GH100 A01 GSP BROM", "ueid": "1", **changes,
        }  # fmt: skip

    def overall(self, nonce: bytes, tokens: Mapping[str, str], **changes: object) -> dict[str, object]:
        """The claims that tie the GPUs' tokens together."""
        named = {
            name: ["DIGEST", ["SHA-256", hashlib.sha256(token.encode()).hexdigest()]] for name, token in tokens.items()
        }
        return {**self.base(nonce), "x-nvidia-overall-att-result": True, "submods": named, **changes}

    def answer(self, nonce: bytes, *gpus: Mapping[str, object], **changes: object) -> bytes:
        """A whole verdict; one good GPU if none is given. `changes` are of the overall claims."""
        tokens = {f"GPU-{place}": self.token(gpu) for place, gpu in enumerate(gpus or [self.gpu(nonce)])}
        return detached(self.token(self.overall(nonce, tokens, **changes)), tokens)


def detached(overall: object, tokens: object) -> bytes:
    return json.dumps([["JWT", overall], tokens]).encode()


def base64url(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def _part(claims: object) -> str:
    return base64url(json.dumps(claims).encode())
