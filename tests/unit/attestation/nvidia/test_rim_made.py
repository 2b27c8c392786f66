"""Manifests of a fake signer: one thing wrong in each, and every form of signature but NVIDIA's."""

import contextlib
import datetime
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from hypothesis import given, settings
from hypothesis import strategies as st

from adytum.attestation.core.checks import Checks
from adytum.attestation.core.errors import AttestationError, EvidenceError
from adytum.attestation.core.limits import LIMITS
from adytum.attestation.nvidia.rim import Rim, compare, verify_rim
from tests.unit.attestation.nvidia.authority import NOW, issue, new_key
from tests.unit.attestation.nvidia.rim_authority import (
    C14N,
    DAY,
    DSIG,
    ENVELOPED,
    SWID,
    RimAuthority,
    RimText,
    refused,
    resource,
)

A, B, C = (bytes([letter]) * 48 for letter in b"abc")


@pytest.fixture(scope="module")
def authority() -> RimAuthority:
    return RimAuthority()


def fake(authority: RimAuthority, data: bytes, now: datetime.datetime = NOW) -> Rim:
    return verify_rim(data, roots=authority.roots, now=now, checks=Checks())


def test_a_made_manifest(authority: RimAuthority) -> None:
    rim = fake(authority, authority.rim({0: [A], 62: [A, B], 63: [C]}, version="96.00.5E.00.01"))
    assert rim.measurements == {1: {A}, 63: {A, B}, 64: {C}}
    assert (rim.kind, rim.product, rim.version) == ("VBIOS", "GH100", "96.00.5E.00.01")
    assert rim.chain == authority.chain
    assert rim.valid_until == authority.signer_until.replace(microsecond=0)
    with refused("gpu.rim.chain.validity"):
        fake(authority, authority.rim({0: [A]}), authority.signer_until + DAY)


@pytest.mark.parametrize(
    ("product", "version", "architecture", "expected"),
    [
        ("GH100", "550.90.07", "hopper", True),
        ("GH100", "96.00.9F.00.01", "hopper", True),
        ("GH100", "550.90.08", "hopper", False),
        ("GH100", "550.90.0", "hopper", False),
        ("GH100", "550.90.07", "blackwell", False),
        ("GB100", "550.90.07", "blackwell", True),
        ("GB100", "550.90.07", "hopper", False),
        ("LS10", "96.00.9F.00.01", "hopper", False),
    ],
)
def test_whose_manifest_it_is(
    authority: RimAuthority, product: str, version: str, architecture: str, expected: bool
) -> None:
    rim = fake(authority, authority.rim({0: [A]}, product=product, version=version))
    assert rim.is_for(architecture, "550.90.07", "96.00.9F.00.01") is expected


def test_comparing(authority: RimAuthority) -> None:
    driver = fake(authority, authority.rim({0: [A, B], 35: [C]}))
    vbios = fake(authority, authority.rim({1: [C]}, version="96.00.9F.00.01"))
    good = {1: B, 2: C, 36: C}
    assert compare(good, (driver, vbios), nvdec0_on=True) == 3
    assert compare({**good, 1: A, 9: A}, (driver, vbios), nvdec0_on=True) == 3
    # Video decoder 0 off: its measurement may be another, and then does not count.
    assert compare({**good, 36: A}, (driver, vbios), nvdec0_on=False) == 2
    assert compare({1: B, 2: C}, (driver, vbios), nvdec0_on=False) == 2
    for wrong, index in (
        ({**good, 1: C}, "1"),
        ({**good, 36: A}, "36"),
        ({1: B, 2: C}, "36"),
        ({2: C, 36: C}, "1"),
        ({**good, 2: C[:47]}, "2"),
        ({**good, 2: bytes(48), 1: bytes(48)}, "1, 2"),
        ({}, "1, 2, 36"),
    ):
        with refused("gpu.measurements", f"the measurements {index} are not"):
            compare(wrong, (driver, vbios), nvdec0_on=True)
    # Off excuses no other measurement.
    with refused("gpu.measurements", "1 are not"):
        compare({**good, 1: C}, (driver, vbios), nvdec0_on=False)


def test_nothing_compared_is_refused(authority: RimAuthority) -> None:
    with refused("gpu.measurements", "no measurement to compare"):
        compare({1: A}, (), nvdec0_on=True)
    only = fake(authority, authority.rim({35: [C]}))
    with refused("gpu.measurements", "no measurement to compare"):
        compare({36: A}, (only,), nvdec0_on=False)


def test_manifests_that_overlap(authority: RimAuthority) -> None:
    driver = fake(authority, authority.rim({0: [A], 7: [B]}))
    vbios = fake(authority, authority.rim({7: [B]}, version="96.00.9F.00.01"))
    with refused("gpu.rim.overlap", "8"):
        compare({1: A, 8: B}, (driver, vbios), nvdec0_on=True)


# One thing wrong, and all of it signed

TEXT = str(RimText([resource(0, [A]), resource(1, [B], "False")]))
FIRST = resource(0, [A])
MANY_ATTRIBUTES = " ".join(f"a{n}='1'" for n in range(65))
MANY_NAMESPACES = " ".join(f"xmlns:a{n}='u:{n}'" for n in range(33))


@pytest.mark.parametrize(
    ("old", "new", "match"),
    [
        ('index="1"', 'index="0"', "measurement 0 twice"),
        (' index="0"', "", "lacks the attribute index"),
        ('index="0"', 'index="-1"', "not a number"),
        ('index="0"', 'index="0x1"', "not a number"),
        ('index="0"', 'index="٣"', "lacks the attribute index"),
        ('index="0"', 'index="1000"', "not a number"),
        (' size="48"', "", "lacks the attribute size"),
        ('size="48"', 'size="32"', "does not have the digests"),
        ('size="48"', 'size="many"', "not a number"),
        (' alternatives="1"', "", "lacks the attribute alternatives"),
        ('alternatives="1"', 'alternatives="2"', "does not have the digests"),
        ('alternatives="1"', 'alternatives="0"', "does not have the digests"),
        ('alternatives="1"', 'alternatives="no"', "not a number"),
        (f' ns2:Hash0="{A.hex()}"', "", "does not have the digests"),
        ("ns2:Hash0", "ns2:Hash1", "does not have the digests"),
        # Without its namespace it is another attribute.
        ("ns2:Hash0", "Hash0", "does not have the digests"),
        (A.hex(), A.hex()[:-2], "96 hexadecimal digits"),
        (A.hex(), A.hex() + "00", "96 hexadecimal digits"),
        (A.hex(), "zz" * 48, "96 hexadecimal digits"),
        (A.hex(), "", "96 hexadecimal digits"),
        ('active="True"', 'active="False"', "no active measurement"),
        (' active="True"', "", "whether measurement 0 is active"),
        ('active="True"', 'active="true"', "whether measurement 0 is active"),
        ('active="True"', 'active=""', "whether measurement 0 is active"),
        ('type="Measurement"', 'type="File"', "not a measurement"),
        ("<ns0:Resource ", "<ns0:Other ", "not a measurement"),
        (' colloquialVersion="550.90.07"', "", "colloquialVersion"),
        ("550.90.07", "", "colloquialVersion"),
        ("550.90.07", "550.90.07\N{ZERO WIDTH SPACE}", "colloquialVersion"),
        ("550.90.07", "550&#10;", "colloquialVersion"),
        (' product="GH100"', "", "product"),
        (f"{FIRST}\n        {resource(1, [B], 'False')}", "", "no active measurement"),
        ("ns0:Payload", "ns0:Load", "one description and one payload"),
        ("<ns0:Meta ", "<ns0:Data ", "one description and one payload"),
        ("<ns0:Meta ", '<ns0:Meta product="GH100"/><ns0:Meta ', "one description and one payload"),
        ("<ns0:Payload>", "<ns0:Payload/><ns0:Payload>", "one description and one payload"),
        ("SoftwareIdentity", "SoftwareIdentities", "not a software identity"),
        (SWID, f"{SWID}x", "not a software identity"),
        ("<ns0:Payload>", "<!-- --><ns0:Payload>", "comments"),
        ("<ns0:Payload>", "<?a b?><ns0:Payload>", "comments"),
        ("<ns0:Payload>", '<ns0:Payload xml:id="a">', "xml: attributes"),
        ("<ns0:Payload>", '<ns0:Payload xml:base="a">', "xml: attributes"),
        ("<ns0:Payload>", f"<ns0:Payload {MANY_ATTRIBUTES}>", "too many"),
        ("<ns0:Payload>", f"<ns0:Payload {MANY_NAMESPACES}>", "too many"),
    ],
)
def test_signed_and_malformed(authority: RimAuthority, old: str, new: str, match: str) -> None:
    assert fake(authority, authority.sign(TEXT)).measurements == {1: {A}}
    assert old in TEXT
    # The closing tag too if an element's name is changed.
    changed = TEXT.replace(old, new) if old in ("ns0:Payload", "SoftwareIdentity") else TEXT.replace(old, new, 1)
    data = authority.sign(changed) if "</SoftwareIdentity>" in changed else changed.encode()
    with pytest.raises(EvidenceError, match=match):
        fake(authority, data)


def test_a_namespace_without_canonical_form(authority: RimAuthority) -> None:
    """The library refuses it with an error of its own."""
    data = authority.sign(TEXT).replace(b"<ns0:Payload>", b'<ns0:Payload xmlns:a="relative">')
    with pytest.raises(EvidenceError, match="canonical form"):
        fake(authority, data)


def test_more_than_one_digest_may_be_right(authority: RimAuthority) -> None:
    rim = fake(authority, authority.sign(str(RimText([resource(5, [A, B, C] * 4)]))))
    assert rim.measurements == {6: {A, B, C}}


def test_sizes(authority: RimAuthority) -> None:
    padded = authority.sign(TEXT.replace("<ns0:Payload>", f"<ns0:Payload>{' ' * LIMITS.collateral}"))
    with pytest.raises(EvidenceError, match="larger than"):
        fake(authority, padded)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b" ",
        b"\x00",
        b"<",
        b"<a/>",
        b"<a>" * 100_000,
        b'<?xml version="1.0" encoding="none"?><a/>',
        '<?xml version="1.0" encoding="utf-16"?><a/>'.encode("utf-16"),
        b'<?xml version="1.0" encoding="utf-7"?>+ADw-a/+AD4-',
        b"\xff\xfe\x00",
        b"PK\x03\x04",
    ],
)
def test_what_is_no_manifest(data: bytes) -> None:
    with pytest.raises(EvidenceError):
        Rim.parse(data)


def test_document_types_and_entities(authority: RimAuthority, tmp_path: Path) -> None:
    """No entity is resolved: not from a file, and not by the billion."""
    secret = tmp_path / "secret"
    secret.write_text(A.hex())
    laughs = "".join(f"<!ENTITY a{n} '" + f"&a{n - 1};" * 10 + "'>" for n in range(1, 12))
    for declared, used in (
        ("", A.hex()),
        (f'<!ENTITY x SYSTEM "{secret.as_uri()}">', "&x;"),
        (f'<!ENTITY x "{A.hex()}">', "&x;"),
        (f'<!ENTITY a0 "lol">{laughs}', "&a11;"),
    ):
        text = authority.sign(TEXT).decode().replace(A.hex(), used, 1)
        with pytest.raises(EvidenceError):
            fake(authority, f"<!DOCTYPE SoftwareIdentity [{declared}]>{text}".encode())
    # Without the document type the same bytes are good.
    assert fake(authority, authority.sign(TEXT)).version == "550.90.07"


def replaced(old: str, new: str) -> Callable[[str], str]:
    def edit(text: str) -> str:
        assert old in text
        return text.replace(old, new, 1)

    return edit


XPATH = '<ds:Transform Algorithm="http://www.w3.org/TR/1999/REC-xpath-19991116"><ds:XPath>0</ds:XPath></ds:Transform>'
FIRST_TRANSFORM, SECOND_TRANSFORM = (f'<ds:Transform Algorithm="{name}"/>' for name in (ENVELOPED, C14N))
REFERENCE = '<ds:Reference URI="">'


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (FIRST_TRANSFORM, ""),
        (FIRST_TRANSFORM + SECOND_TRANSFORM, ""),
        (FIRST_TRANSFORM + SECOND_TRANSFORM, SECOND_TRANSFORM + FIRST_TRANSFORM),
        (FIRST_TRANSFORM, FIRST_TRANSFORM + XPATH),
        (SECOND_TRANSFORM, SECOND_TRANSFORM * 2),
        (SECOND_TRANSFORM, '<ds:Transform Algorithm="http://www.w3.org/2001/10/xml-exc-c14n#"/>'),
        (SECOND_TRANSFORM, "<ds:Transform/>"),
        (f'CanonicalizationMethod Algorithm="{C14N}"', f'CanonicalizationMethod Algorithm="{C14N}#WithComments"'),
        (f'CanonicalizationMethod Algorithm="{C14N}"', "CanonicalizationMethod"),
        ("#ecdsa-sha384", "#ecdsa-sha256"),
        ("2001/04/xmldsig-more#ecdsa-sha384", "2000/09/xmldsig#hmac-sha1"),
        ("xmldsig-more#sha384", "xmlenc#sha256"),
        (REFERENCE, '<ds:Reference URI="#a">'),
        (REFERENCE, "<ds:Reference>"),
        (REFERENCE, '<ds:Reference URI="http://127.0.0.1:9/">'),
        ("<ds:Reference ", '<ds:Reference URI=""><ds:Transforms/></ds:Reference><ds:Reference '),
        ("ds:Transforms>", "ds:Transform>"),
        ("<ds:DigestValue>", "<ds:DigestValue>A</ds:DigestValue><ds:DigestValue>"),
        ("<ds:DigestValue>", "<ds:DigestValue>~"),
    ],
)
def test_signatures_of_another_form(authority: RimAuthority, old: str, new: str) -> None:
    """Each is signed, so only its form is wrong."""
    edit = replaced(old, new)
    if old == "ds:Transforms>":
        edit = lambda text: text.replace(old, new)  # noqa: E731 - the closing tag too
    with pytest.raises(EvidenceError):
        fake(authority, authority.sign(TEXT, information=edit))


def test_the_forms_that_hold(authority: RimAuthority) -> None:
    for old, new in (
        (SECOND_TRANSFORM, ""),
        ("2001/04/xmldsig-more#sha384", "2001/04/xmlenc#sha384"),
    ):
        assert fake(authority, authority.sign(TEXT, information=replaced(old, new))).measurements == {1: {A}}


def other_document(authority: RimAuthority) -> str:
    """One that nobody signed, in the namespaces of the signed one."""
    return TEXT.replace(A.hex(), C.hex())


def test_wrapped_signatures(authority: RimAuthority) -> None:
    """A signed document inside another, or beside it, never lends its signature to what is read."""
    signed = authority.sign(TEXT).decode()
    evil = other_document(authority)
    signature = signed[signed.index("<ds:Signature ") : signed.index("</SoftwareIdentity>")]
    wrapped_object = signature.replace("</ds:Signature>", f"<ds:Object>{TEXT}</ds:Object></ds:Signature>")
    for data, code in (
        # The signature over the signed document, under another one.
        (evil.replace("</SoftwareIdentity>", f"{signature}</SoftwareIdentity>"), "gpu.rim.digest"),
        # The same with the signed document kept where a reference by id would find it.
        (evil.replace("</SoftwareIdentity>", f"{wrapped_object}</SoftwareIdentity>"), "gpu.rim.digest"),
        (evil.replace("</SoftwareIdentity>", f"{signed}</SoftwareIdentity>"), "malformed"),
        (evil.replace("<ns0:Payload>", f"{signed}<ns0:Payload>"), "malformed"),
        (evil.replace("</SoftwareIdentity>", f"<ns0:a>{signature}</ns0:a></SoftwareIdentity>"), "malformed"),
        # Two signatures, the good one first or last.
        (signed.replace("</SoftwareIdentity>", f"{signature}</SoftwareIdentity>"), "malformed"),
        (signed.replace("<ds:Signature ", f"{signature}<ds:Signature ", 1), "malformed"),
        # Not the last child; no signature at all.
        (signed.replace("</SoftwareIdentity>", "<ns0:Entity/></SoftwareIdentity>"), "malformed"),
        (TEXT, "malformed"),
        (signed.replace(DSIG, f"{DSIG}x"), "malformed"),
        # Elements twice inside the signature.
        (signed.replace("<ds:SignatureValue>", "<ds:SignatureValue/><ds:SignatureValue>"), "malformed"),
        (signed.replace("<ds:KeyInfo>", "<ds:KeyInfo/><ds:KeyInfo>"), "malformed"),
        (signed.replace("<ds:X509Data>", "<ds:X509Data/><ds:X509Data>"), "malformed"),
        (signed.replace("<ds:SignedInfo>", "<ds:SignedInfo/><ds:SignedInfo>"), "malformed"),
        # Text behind the signature belongs to the document.
        (signed.replace("</SoftwareIdentity>", " </SoftwareIdentity>"), "gpu.rim.digest"),
        (signed.replace("<ds:Signature ", " <ds:Signature ", 1), "gpu.rim.digest"),
    ):  # fmt: skip
        with pytest.raises(AttestationError) as caught:
            fake(authority, data.encode())
        assert getattr(caught.value, "code", "") == code


def test_what_the_signature_element_may_hold_besides(authority: RimAuthority) -> None:
    """It is not signed, and not read: the result is that of the signed document alone."""
    signed = authority.sign(TEXT).decode()
    more = signed.replace("</ds:Signature>", f"<ds:Object>{other_document(authority)}</ds:Object></ds:Signature>")
    assert fake(authority, more.encode()).measurements == {1: {A}}


def test_digest_and_signature(authority: RimAuthority) -> None:
    signed = authority.sign(TEXT).decode()
    with refused("gpu.rim.digest"):
        fake(authority, signed.replace(A.hex(), C.hex()).encode())
    with refused("gpu.rim.digest"):
        fake(authority, signed.replace('"False"', '"True"').encode())
    other = authority.sign(other_document(authority)).decode()
    # The right digest of another document, under the signature of the first.
    moved = other[: other.index("<ds:SignatureValue>")] + signed[signed.index("<ds:SignatureValue>") :]
    with refused("gpu.rim.signature"):
        fake(authority, moved.encode())
    with refused("gpu.rim.signature"):
        fake(authority, authority.sign(TEXT, key=new_key()))
    with refused("gpu.rim.signature"):
        fake(authority, authority.sign(TEXT, key=authority.l3.key))
    for change in (lambda raw: bytes(96), lambda raw: raw[48:] + raw[:48], lambda raw: b"\xff" * 96):
        with refused("gpu.rim.signature"):
            fake(authority, authority.sign(TEXT, signature=change))


def as_der(raw: bytes) -> bytes:
    return encode_dss_signature(int.from_bytes(raw[:48], "big"), int.from_bytes(raw[48:], "big"))


@pytest.mark.parametrize("change", [as_der, lambda raw: raw[:-1], lambda raw: b"\0" + raw, lambda raw: b""])
def test_signatures_of_another_length(authority: RimAuthority, change: Callable[[bytes], bytes]) -> None:
    with pytest.raises(EvidenceError):
        fake(authority, authority.sign(TEXT, signature=change))


def test_chains(authority: RimAuthority) -> None:
    leaf, l3, ca, root = authority.chain
    stranger = RimAuthority()
    for chain, code in (
        ((leaf, l3, ca), "gpu.rim.chain.root"),
        ((root, ca, l3, leaf), "gpu.rim.chain.root"),
        ((leaf, l3, ca, stranger.root.certificate), "gpu.rim.chain.root"),
        (stranger.chain, "gpu.rim.chain.root"),
        ((leaf, ca, root), "gpu.rim.chain.chain"),
        ((leaf, ca, l3, root), "gpu.rim.chain.chain"),
        ((leaf, root), "gpu.rim.chain.chain"),
        ((*stranger.chain[:3], root), "gpu.rim.chain.chain"),
        ((leaf, leaf, l3, ca, root), "gpu.rim.chain.chain"),
    ):
        with refused(code):
            fake(authority, authority.sign(TEXT, chain=chain))
    for short in ((), (leaf,), (root,), (leaf,) * (LIMITS.certificates + 1)):
        with pytest.raises(EvidenceError, match="certificate chain"):
            fake(authority, authority.sign(TEXT, chain=short))
    with pytest.raises(EvidenceError, match="a certificate in the manifest"):
        fake(authority, authority.sign(TEXT, finish=replaced("<ds:X509Certificate>", "<ds:X509Certificate>AAAA")))
    with pytest.raises(EvidenceError, match="base64"):
        fake(authority, authority.sign(TEXT, finish=replaced("<ds:X509Certificate>", "<ds:X509Certificate>!")))


def test_who_may_not_sign(authority: RimAuthority) -> None:
    # Issued by a signer, who may not issue.
    below = issue("Fake L5", authority.signer, ca=False)
    with refused("gpu.rim.chain.ca"):
        fake(authority, authority.sign(TEXT, key=below.key, chain=(below.certificate, *authority.chain)))
    for curve in (ec.SECP256R1(), ec.SECP521R1()):
        weak = issue("Fake L4", authority.l3, ca=False, key=new_key(curve))
        with pytest.raises(EvidenceError, match="P-384"):
            fake(authority, authority.sign(TEXT, chain=(weak.certificate, *authority.chain[1:])))
    # Each certificate's dates count, not the signer's alone.
    for place in range(1, 3):
        issuers = [authority.root]
        for at in range(3, 0, -1):
            until = NOW - DAY if at - 1 == place else NOW + 100 * DAY
            issuers.append(issue(f"Fake {at}", issuers[-1], ca=at > 1, not_after=until))
        chain = [issuer.certificate for issuer in reversed(issuers)]
        assert all(below.issuer == above.subject for below, above in pairwise(chain))
        with refused("gpu.rim.chain.validity"):
            fake(authority, authority.sign(TEXT, key=issuers[-1].key, chain=chain))


def test_what_stands_around_a_manifest(authority: RimAuthority) -> None:
    signed = authority.sign(TEXT)
    for harmless in (signed + b"\n", b'<?xml version="1.0" encoding="UTF-8"?>\n' + signed, b"\n" + signed):
        assert fake(authority, harmless).measurements == {1: {A}}
    for tail in (b"\x00", b"x", b"<a/>", b"<!-- -->", b"<?a b?>", b"]]>", signed):
        with pytest.raises(EvidenceError):
            fake(authority, signed + tail)
    for head in (b"\x00", b"x", b"<!-- -->", b"<?a b?>", b"<a/>", b"<!DOCTYPE SoftwareIdentity>"):
        with pytest.raises(EvidenceError):
            fake(authority, head + signed)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=300))
def test_only_our_error_escapes_from_any_bytes(data: bytes) -> None:
    with contextlib.suppress(EvidenceError):
        Rim.parse(data)


FUZZED = RimAuthority()
SIGNED = FUZZED.sign(TEXT)


@settings(max_examples=300, deadline=None)
@given(st.integers(0, len(SIGNED)), st.integers(0, 40), st.binary(max_size=40) | st.sampled_from(
    [b"<a/>", b'xmlns="', b"&amp;", b"&#0;", b"<![CDATA[", b"<!--", b"]]>", b"<ds:", b'URI=""', b"&a;"]
))  # fmt: skip
def test_only_our_error_escapes_from_a_changed_manifest(at: int, cut: int, put: bytes) -> None:
    """And what is accepted says what was signed."""
    changed = SIGNED[:at] + put + SIGNED[at + cut :]
    with contextlib.suppress(AttestationError):
        assert fake(FUZZED, changed).measurements == {1: {A}}
