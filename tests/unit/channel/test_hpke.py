"""HPKE against the published vectors and two independent implementations."""

import hashlib
from typing import Any

import pyhpke
import pytest
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hpke as library
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey, MLKEM768PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey

from adytum.inference.channel import hpke
from adytum.inference.channel.errors import ExchangeMisuse, MalformedMessage, OpenFailed, UnknownKey
from adytum.inference.channel.hpke import AeadId, KdfId, KemId, Suite
from tests.unit.channel.support import KEMS, hpke_vectors, recipient, unhex

INFO = b"what the context is for"
SUITES = [Suite(kem, KdfId.HKDF_SHA256, aead) for kem in KEMS for aead in AeadId]


def published(name: str, kem: KemId) -> list[dict[str, Any]]:
    """Base mode with HKDF-SHA256, without export-only vectors, which have no AEAD (`test_export_only_is_refused`)."""
    return [
        vector
        for vector in hpke_vectors(name)
        if (vector["mode"], vector["kem_id"], vector["kdf_id"]) == (0, kem, 1) and vector["aead_id"] != 0xFFFF
    ]


RFC_9180 = published("test-vectors.json", KemId.X25519)
POST_QUANTUM = published("hpke-pq-test-vectors.json", KemId.MLKEM768_X25519)


def suite_of(vector: dict[str, Any]) -> Suite:
    return Suite(KemId(vector["kem_id"]), KdfId(vector["kdf_id"]), AeadId(vector["aead_id"]))


def test_the_published_vectors_are_there() -> None:
    assert sorted(vector["aead_id"] for vector in RFC_9180) == [1, 2, 3]
    assert all(len(vector["encryptions"]) > 250 for vector in RFC_9180)
    assert [len(vector["encryptions"]) for vector in POST_QUANTUM] == [10]


@pytest.mark.parametrize("vector", RFC_9180 + POST_QUANTUM, ids=lambda v: f"{v['kem_id']:04x}-{v['aead_id']}")
def test_recipient(vector: dict[str, Any]) -> None:
    suite, secret, enc = suite_of(vector), unhex(vector["skRm"]), unhex(vector["enc"])
    key: hpke.PrivateKey = (
        hpke.X25519Key.from_bytes(secret) if suite.kem is KemId.X25519 else hpke.XWingKey.from_bytes(secret)
    )
    assert key.public_bytes == unhex(vector["pkRm"])
    assert key.decapsulate(enc) == unhex(vector["shared_secret"])
    context = hpke.setup_recipient(suite, key, enc, unhex(vector["info"]))
    for item in vector["encryptions"]:
        assert context.open(unhex(item["ct"]), unhex(item["aad"])) == unhex(item["pt"])
    for item in vector["exports"]:
        assert context.export(unhex(item["exporter_context"]), item["L"]) == unhex(item["exported_value"])


@pytest.mark.parametrize("vector", RFC_9180, ids=lambda v: str(v["aead_id"]))
def test_sender(vector: dict[str, Any]) -> None:
    ephemeral = X25519PrivateKey.from_private_bytes(unhex(vector["skEm"]))
    suite = suite_of(vector)
    assert hpke.encapsulate(suite.kem, unhex(vector["pkRm"]), ephemeral) == (
        unhex(vector["shared_secret"]),
        unhex(vector["enc"]),
    )
    enc, context = hpke.setup_sender(suite, unhex(vector["pkRm"]), unhex(vector["info"]), ephemeral)
    assert enc == unhex(vector["enc"])
    for item in vector["encryptions"]:
        assert context.seal(unhex(item["pt"]), unhex(item["aad"])) == unhex(item["ct"])
    for item in vector["exports"]:
        assert context.export(unhex(item["exporter_context"]), item["L"]) == unhex(item["exported_value"])


def test_export_only_is_refused() -> None:
    with pytest.raises(UnknownKey):
        Suite.from_wire(unhex("00200001ffff"))


@pytest.mark.parametrize(
    "wire",
    [
        *("002000010000", "002000020002", "001000010002", "647b00010002", "000000000000"),
        # Both bytes of each identifier count.
        *("012000010002", "002001010002", "002000010102", "207a00010002"),
    ],
)
def test_suites_that_are_not_offered(wire: str) -> None:
    with pytest.raises(UnknownKey):
        Suite.from_wire(unhex(wire))


@pytest.mark.parametrize("suite", SUITES, ids=lambda s: f"{s.kem.name}-{s.aead.name}")
def test_suite_identifiers(suite: Suite) -> None:
    assert Suite.from_wire(suite.wire) == suite
    for length in range(6):
        with pytest.raises(MalformedMessage):
            Suite.from_wire(suite.wire[:length])
    with pytest.raises(MalformedMessage):
        Suite.from_wire(suite.wire + b"\x00")


# Second oracle: the library's own single-shot HPKE.

LIBRARY_KEM = {KemId.X25519: library.KEM.X25519, KemId.MLKEM768_X25519: library.KEM.MLKEM768_X25519}
LIBRARY_AEAD = {
    AeadId.AES_128_GCM: library.AEAD.AES_128_GCM,
    AeadId.AES_256_GCM: library.AEAD.AES_256_GCM,
    AeadId.CHACHA20_POLY1305: library.AEAD.CHACHA20_POLY1305,
}


def library_suite(suite: Suite) -> library.Suite:
    return library.Suite(LIBRARY_KEM[suite.kem], library.KDF.HKDF_SHA256, LIBRARY_AEAD[suite.aead])


def library_keys(kem: KemId) -> tuple[Any, Any]:
    """The same key as `recipient(kem)`, in the library's types."""
    secret = bytes(range(32))
    if kem is KemId.X25519:
        key = X25519PrivateKey.from_private_bytes(secret)
        return key, X25519PublicKey.from_public_bytes(recipient(kem).public_bytes)
    expanded = hashlib.shake_256(secret).digest(96)
    private = library.MLKEM768X25519PrivateKey(
        MLKEM768PrivateKey.from_seed_bytes(expanded[:64]), X25519PrivateKey.from_private_bytes(expanded[64:])
    )
    public = recipient(kem).public_bytes
    return private, library.MLKEM768X25519PublicKey(
        MLKEM768PublicKey.from_public_bytes(public[:1184]), X25519PublicKey.from_public_bytes(public[1184:])
    )


@pytest.mark.parametrize("suite", SUITES, ids=lambda s: f"{s.kem.name}-{s.aead.name}")
@pytest.mark.parametrize("plaintext", [b"", b"x", bytes(5000)], ids=len)
def test_the_library_opens_what_we_seal(suite: Suite, plaintext: bytes) -> None:
    private, _ = library_keys(suite.kem)
    enc, context = hpke.setup_sender(suite, recipient(suite.kem).public_bytes, INFO)
    sealed = enc + context.seal(plaintext)
    assert library_suite(suite).decrypt(sealed, private, INFO) == plaintext
    with pytest.raises(InvalidTag):
        library_suite(suite).decrypt(sealed, private, INFO + b".")


@pytest.mark.parametrize("suite", SUITES, ids=lambda s: f"{s.kem.name}-{s.aead.name}")
@pytest.mark.parametrize("plaintext", [b"", b"x", bytes(5000)], ids=len)
def test_we_open_what_the_library_seals(suite: Suite, plaintext: bytes) -> None:
    _, public = library_keys(suite.kem)
    sealed = library_suite(suite).encrypt(plaintext, public, INFO)
    enc, ciphertext = sealed[: hpke.ENC_LENGTH[suite.kem]], sealed[hpke.ENC_LENGTH[suite.kem] :]
    assert hpke.setup_recipient(suite, recipient(suite.kem), enc, INFO).open(ciphertext) == plaintext
    with pytest.raises(OpenFailed):
        hpke.setup_recipient(suite, recipient(suite.kem), enc, INFO + b".").open(ciphertext)


# Third oracle, for what the library lacks: contexts of several messages, AAD and export.

PYHPKE_AEAD = {
    AeadId.AES_128_GCM: pyhpke.AEADId.AES128_GCM,
    AeadId.AES_256_GCM: pyhpke.AEADId.AES256_GCM,
    AeadId.CHACHA20_POLY1305: pyhpke.AEADId.CHACHA20_POLY1305,
}
MESSAGES = [(b"one", b""), (b"", b"final"), (bytes(3000), b"aad"), (b"four", b"final")]


def pyhpke_suite(aead: AeadId) -> pyhpke.CipherSuite:
    return pyhpke.CipherSuite.new(pyhpke.KEMId.DHKEM_X25519_HKDF_SHA256, pyhpke.KDFId.HKDF_SHA256, PYHPKE_AEAD[aead])


@pytest.mark.parametrize("aead", AeadId)
def test_pyhpke_sends(aead: AeadId) -> None:
    _, public = library_keys(KemId.X25519)
    enc, sender = pyhpke_suite(aead).create_sender_context(pyhpke.KEMKey.from_pyca_cryptography_key(public), info=INFO)
    suite = Suite(KemId.X25519, KdfId.HKDF_SHA256, aead)
    ours = hpke.setup_recipient(suite, recipient(KemId.X25519), enc, INFO)
    for plaintext, aad in MESSAGES:
        assert ours.open(sender.seal(plaintext, aad), aad) == plaintext
    for context, length in ((b"", 16), (b"message/bhttp response", 32), (b"long", 4000)):
        assert ours.export(context, length) == sender.export(context, length)


@pytest.mark.parametrize("aead", AeadId)
def test_pyhpke_receives(aead: AeadId) -> None:
    private, _ = library_keys(KemId.X25519)
    suite = Suite(KemId.X25519, KdfId.HKDF_SHA256, aead)
    enc, ours = hpke.setup_sender(suite, recipient(KemId.X25519).public_bytes, INFO)
    theirs = pyhpke_suite(aead).create_recipient_context(
        enc, pyhpke.KEMKey.from_pyca_cryptography_key(private), info=INFO
    )
    for plaintext, aad in MESSAGES:
        assert theirs.open(ours.seal(plaintext, aad), aad) == plaintext
    assert ours.export(b"message/bhttp response", 32) == theirs.export(b"message/bhttp response", 32)


# Contexts.


@pytest.mark.parametrize("suite", SUITES, ids=lambda s: f"{s.kem.name}-{s.aead.name}")
def test_a_context_opens_in_order_only(suite: Suite) -> None:
    enc, sender = hpke.setup_sender(suite, recipient(suite.kem).public_bytes, INFO)
    context = hpke.setup_recipient(suite, recipient(suite.kem), enc, INFO)
    first, second = sender.seal(b"first"), sender.seal(b"second", b"aad")
    assert first != second
    with pytest.raises(OpenFailed):
        context.open(second, b"aad")
    # A failure does not advance the sequence.
    assert context.open(first) == b"first"
    for ciphertext, aad in ((first, None), (second, None), (second, b"AAD"), (second[:-1], b"aad"), (b"", b"aad")):
        with pytest.raises(OpenFailed):
            context.open(ciphertext, aad)
    assert context.open(second, b"aad") == b"second"


def test_a_used_up_sequence_seals_nothing() -> None:
    sequence = hpke.Sequence(hpke.new_aead(AeadId.AES_256_GCM, bytes(32)), bytes(12))
    sequence._count = (1 << 64) - 1
    sequence.seal(b"the last one")
    with pytest.raises(ExchangeMisuse):
        sequence.seal(b"")
    with pytest.raises(ExchangeMisuse):
        sequence.open(bytes(16))


def test_hkdf_has_an_end() -> None:
    assert len(hpke.expand(bytes(32), b"", 255 * 32)) == 255 * 32
    with pytest.raises(ExchangeMisuse):
        hpke.expand(bytes(32), b"", 255 * 32 + 1)


@pytest.mark.parametrize("kem", KEMS)
def test_a_key_of_another_kem(kem: KemId) -> None:
    other = next(item for item in KEMS if item is not kem)
    with pytest.raises(UnknownKey):
        hpke.setup_recipient(
            Suite(other, KdfId.HKDF_SHA256, AeadId.AES_256_GCM), recipient(kem), bytes(hpke.ENC_LENGTH[other]), b""
        )


# Small-order points: with them the Diffie-Hellman value is all zero whatever the key (RFC 7748, 6.1).
SMALL_ORDER = [
    bytes(32),
    b"\x01" + bytes(31),
    unhex("e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800"),
    unhex("5f9c95bca3508c24b1d0b1559c83ef5b04445cc4581c8e86d8224eddd09f1157"),
    unhex("ecffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f"),
    unhex("edffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f"),
    unhex("eeffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f"),
]


@pytest.mark.parametrize("point", SMALL_ORDER, ids=lambda p: p.hex()[:8])
@pytest.mark.parametrize("kem", KEMS)
def test_small_order_points_are_refused(kem: KemId, point: bytes) -> None:
    with pytest.raises(MalformedMessage):
        recipient(kem).decapsulate(bytes(hpke.ENC_LENGTH[kem] - 32) + point)
    with pytest.raises(MalformedMessage):
        hpke.encapsulate(kem, recipient(kem).public_bytes[:-32] + point)


@pytest.mark.parametrize("kem", KEMS)
@pytest.mark.parametrize("change", [-1, 1])
def test_lengths_are_exact(kem: KemId, change: int) -> None:
    with pytest.raises(MalformedMessage):
        recipient(kem).decapsulate(bytes(hpke.ENC_LENGTH[kem] + change))
    with pytest.raises(MalformedMessage):
        hpke.encapsulate(kem, bytes(hpke.PUBLIC_KEY_LENGTH[kem] + change))
    for made in (hpke.X25519Key.from_bytes, hpke.XWingKey.from_bytes):
        with pytest.raises(MalformedMessage):
            made(bytes(32 + change))


def test_an_ml_kem_key_outside_the_field_is_refused() -> None:
    # FIPS 203, 7.2: the modulus check. 0xfff is more than 3328.
    with pytest.raises(MalformedMessage):
        hpke.encapsulate(KemId.MLKEM768_X25519, b"\xff" * 1184 + recipient(KemId.X25519).public_bytes)


@pytest.mark.parametrize("kem", KEMS)
def test_generated_keys_work_and_differ(kem: KemId) -> None:
    first, second = hpke.generate(kem), hpke.generate(kem)
    assert first.kem is second.kem is kem
    assert first.public_bytes != second.public_bytes
    shared, enc = hpke.encapsulate(kem, first.public_bytes)
    assert first.decapsulate(enc) == shared
    assert second.decapsulate(enc) != shared
