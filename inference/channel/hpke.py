"""HPKE base mode (RFC 9180) with contexts of several messages and export, for two KEMs.

`cryptography.hazmat.primitives.hpke` seals single messages only. Oblivious HTTP needs the export interface and a
sequence of messages, so the key schedule is here, and the tests compare it with the library's `Suite`.

KEMs: DHKEM(X25519, HKDF-SHA256), 0x0020 (RFC 9180, 7.1), and MLKEM768-X25519, 0x647a, also known as X-Wing
(draft-ietf-hpke-pq; draft-connolly-cfrg-xwing-kem). KDF: HKDF-SHA256. AEADs: the three of RFC 9180, 7.3.
"""

import hashlib
import hmac
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache
from typing import Protocol

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey, MLKEM768PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305

from adytum.inference.channel.errors import ExchangeMisuse, MalformedMessage, OpenFailed, UnknownKey

HASH_LENGTH = 32
NONCE_LENGTH = 12
TAG_LENGTH = 16
_MODE_BASE = b"\x00"
_XWING_LABEL = bytes.fromhex("5c2e2f2f5e5c")


class KemId(IntEnum):
    """KEM identifiers (IANA HPKE registry)."""

    X25519 = 0x0020
    MLKEM768_X25519 = 0x647A


class KdfId(IntEnum):
    """KDF identifiers."""

    HKDF_SHA256 = 0x0001


class AeadId(IntEnum):
    """AEAD identifiers."""

    AES_128_GCM = 0x0001
    AES_256_GCM = 0x0002
    CHACHA20_POLY1305 = 0x0003


class Aead(Protocol):
    """The methods that `cryptography`'s AEAD classes share."""

    def encrypt(self, nonce: bytes, data: bytes, associated_data: bytes | None) -> bytes: ...
    def decrypt(self, nonce: bytes, data: bytes, associated_data: bytes | None) -> bytes: ...


_AEADS: dict[AeadId, tuple[int, Callable[[bytes], Aead]]] = {
    AeadId.AES_128_GCM: (16, AESGCM),
    AeadId.AES_256_GCM: (32, AESGCM),
    AeadId.CHACHA20_POLY1305: (32, ChaCha20Poly1305),
}


def key_length(aead: AeadId) -> int:
    """Nk in bytes (RFC 9180, 7.3)."""
    return _AEADS[aead][0]


def new_aead(aead: AeadId, key: bytes) -> Aead:
    """An AEAD object for `key`. Callers keep it, because making one costs more than a short encryption."""
    return _AEADS[aead][1](key)


def extract(salt: bytes, ikm: bytes) -> bytes:
    """HKDF-Extract with SHA-256 (RFC 5869): 32 bytes."""
    return hmac.digest(salt or bytes(HASH_LENGTH), ikm, "sha256")


def expand(prk: bytes, info: bytes, length: int) -> bytes:
    """HKDF-Expand with SHA-256 (RFC 5869): `length` bytes. Raises `ExchangeMisuse` above 255 * 32."""
    if length > 255 * HASH_LENGTH:
        raise ExchangeMisuse("HKDF-SHA256 cannot expand to more than 8,160 bytes")
    out = block = b""
    counter = 1
    while len(out) < length:
        block = hmac.digest(prk, block + info + bytes((counter,)), "sha256")
        out += block
        counter += 1
    return out[:length]


def _labeled_extract(suite_id: bytes, salt: bytes, label: bytes, ikm: bytes) -> bytes:
    return extract(salt, b"HPKE-v1" + suite_id + label + ikm)


def _labeled_expand(suite_id: bytes, prk: bytes, label: bytes, info: bytes, length: int) -> bytes:
    return expand(prk, length.to_bytes(2, "big") + b"HPKE-v1" + suite_id + label + info, length)


class PrivateKey(Protocol):
    """A recipient's key. Its `repr` shows the KEM's name only."""

    @property
    def kem(self) -> KemId: ...
    @property
    def public_bytes(self) -> bytes: ...
    def decapsulate(self, enc: bytes) -> bytes: ...


class X25519Key:
    """DHKEM(X25519, HKDF-SHA256): public key and encapsulated key have 32 bytes each (RFC 9180, 4.1)."""

    kem = KemId.X25519

    def __init__(self, key: X25519PrivateKey) -> None:
        self._key = key
        self.public_bytes = key.public_key().public_bytes_raw()

    @classmethod
    def generate(cls) -> "X25519Key":
        return cls(X25519PrivateKey.generate())

    @classmethod
    def from_bytes(cls, secret: bytes) -> "X25519Key":
        """From 32 secret bytes (`skRm`). Raises `MalformedMessage`."""
        if len(secret) != 32:
            raise MalformedMessage("an X25519 secret key has 32 bytes")
        return cls(X25519PrivateKey.from_private_bytes(secret))

    def decapsulate(self, enc: bytes) -> bytes:
        """The shared secret that `enc` carries, 32 bytes. Raises `MalformedMessage`."""
        try:
            dh = self._key.exchange(X25519PublicKey.from_public_bytes(enc))
        except ValueError as error:  # wrong length, or a small-order point: the all-zero check of RFC 9180, 7.1.4
            raise MalformedMessage("the encapsulated key is not a valid X25519 key") from error
        return _dhkem_secret(dh, enc + self.public_bytes)

    def __repr__(self) -> str:
        return "X25519Key(...)"


class XWingKey:
    """MLKEM768-X25519: secret 32 bytes, public key 1,216, encapsulated key 1,120."""

    kem = KemId.MLKEM768_X25519

    def __init__(self, mlkem: MLKEM768PrivateKey, x25519: X25519PrivateKey) -> None:
        self._mlkem = mlkem
        self._x25519 = x25519
        self._x25519_public = self._x25519.public_key().public_bytes_raw()
        self.public_bytes = self._mlkem.public_key().public_bytes_raw() + self._x25519_public

    @classmethod
    def generate(cls) -> "XWingKey":
        # Not from a seed: its bytes would pass through Python, which does not clear them.
        return cls(MLKEM768PrivateKey.generate(), X25519PrivateKey.generate())

    @classmethod
    def from_bytes(cls, seed: bytes) -> "XWingKey":
        """From 32 secret bytes. Raises `MalformedMessage`."""
        if len(seed) != 32:
            raise MalformedMessage("an MLKEM768-X25519 secret key has 32 bytes")
        expanded = hashlib.shake_256(seed).digest(96)
        return cls(
            MLKEM768PrivateKey.from_seed_bytes(expanded[:64]), X25519PrivateKey.from_private_bytes(expanded[64:])
        )

    def decapsulate(self, enc: bytes) -> bytes:
        """The shared secret that `enc` carries, 32 bytes. Raises `MalformedMessage`."""
        if len(enc) != 1120:
            raise MalformedMessage("an MLKEM768-X25519 encapsulated key has 1,120 bytes")
        ct, ephemeral = enc[:1088], enc[1088:]
        try:
            ss_mlkem = self._mlkem.decapsulate(ct)
            ss_x25519 = self._x25519.exchange(X25519PublicKey.from_public_bytes(ephemeral))
        except ValueError as error:
            raise MalformedMessage("the encapsulated key is not valid for MLKEM768-X25519") from error
        return _xwing_combine(ss_mlkem, ss_x25519, ephemeral, self._x25519_public)

    def __repr__(self) -> str:
        return "XWingKey(...)"


def _dhkem_secret(dh: bytes, kem_context: bytes) -> bytes:
    suite_id = b"KEM" + KemId.X25519.to_bytes(2, "big")
    prk = _labeled_extract(suite_id, b"", b"eae_prk", dh)
    return _labeled_expand(suite_id, prk, b"shared_secret", kem_context, 32)


def _xwing_combine(ss_mlkem: bytes, ss_x25519: bytes, ct_x25519: bytes, pk_x25519: bytes) -> bytes:
    return hashlib.sha3_256(ss_mlkem + ss_x25519 + ct_x25519 + pk_x25519 + _XWING_LABEL).digest()


PUBLIC_KEY_LENGTH = {KemId.X25519: 32, KemId.MLKEM768_X25519: 1216}
ENC_LENGTH = {KemId.X25519: 32, KemId.MLKEM768_X25519: 1120}


def generate(kem: KemId) -> PrivateKey:
    """A new recipient key for `kem`."""
    return X25519Key.generate() if kem is KemId.X25519 else XWingKey.generate()


def encapsulate(kem: KemId, public_key: bytes, ephemeral: X25519PrivateKey | None = None) -> tuple[bytes, bytes]:
    """(shared secret, encapsulated key) for `public_key`. `ephemeral` is for known-answer tests.

    Raises `MalformedMessage` if `public_key` is not a valid key of `kem`.
    """
    ephemeral = ephemeral or X25519PrivateKey.generate()
    ephemeral_public = ephemeral.public_key().public_bytes_raw()
    if len(public_key) != PUBLIC_KEY_LENGTH[kem]:
        raise MalformedMessage("the public key does not have its KEM's length")
    try:
        if kem is KemId.X25519:
            dh = ephemeral.exchange(X25519PublicKey.from_public_bytes(public_key))
            return _dhkem_secret(dh, ephemeral_public + public_key), ephemeral_public
        pk_x25519 = public_key[1184:]
        ss_mlkem, ct = MLKEM768PublicKey.from_public_bytes(public_key[:1184]).encapsulate()
        ss_x25519 = ephemeral.exchange(X25519PublicKey.from_public_bytes(pk_x25519))
    except ValueError as error:
        raise MalformedMessage("the public key is not valid") from error
    return _xwing_combine(ss_mlkem, ss_x25519, ephemeral_public, pk_x25519), ct + ephemeral_public


@dataclass(frozen=True)
class Suite:
    """KEM, KDF and AEAD of a context."""

    kem: KemId
    kdf: KdfId
    aead: AeadId

    @property
    def wire(self) -> bytes:
        """The three identifiers, 6 bytes."""
        return self.kem.to_bytes(2, "big") + self.kdf.to_bytes(2, "big") + self.aead.to_bytes(2, "big")

    @classmethod
    @lru_cache(32)
    def from_wire(cls, data: bytes) -> "Suite":
        """From 6 bytes. Raises `UnknownKey` for an identifier that is not in the enumerations above."""
        if len(data) != 6:
            raise MalformedMessage("a suite has 6 bytes")
        try:
            return cls(
                KemId(int.from_bytes(data[:2], "big")),
                KdfId(int.from_bytes(data[2:4], "big")),
                AeadId(int.from_bytes(data[4:], "big")),
            )
        except ValueError as error:
            raise UnknownKey("the suite is not offered") from error


class Sequence:
    """An AEAD key whose nonce is base XOR counter (RFC 9180, 5.2). OHTTP and EHBP responses count the same way."""

    def __init__(self, aead: Aead, base_nonce: bytes) -> None:
        self._aead = aead
        self._base = int.from_bytes(base_nonce, "big")
        self._count = 0

    def _nonce(self) -> bytes:
        # Counting never gets this far. The check keeps the counter within 8 bytes, so that no nonce can repeat.
        if self._count >> 64:
            raise ExchangeMisuse("the sequence is used up")
        return (self._base ^ self._count).to_bytes(NONCE_LENGTH, "big")

    def seal(self, plaintext: bytes, aad: bytes | None = None) -> bytes:
        """The ciphertext with its tag. Advances the sequence."""
        sealed = self._aead.encrypt(self._nonce(), plaintext, aad)
        self._count += 1
        return sealed

    def open(self, ciphertext: bytes, aad: bytes | None = None) -> bytes:
        """The plaintext. Advances the sequence only on success. Raises `OpenFailed`."""
        try:
            opened = self._aead.decrypt(self._nonce(), ciphertext, aad)
        except InvalidTag as error:
            raise OpenFailed("a ciphertext did not authenticate") from error
        self._count += 1
        return opened

    def __repr__(self) -> str:
        return f"{type(self).__name__}(...)"


@lru_cache(256)
def _schedule_context(suite_id: bytes, info: bytes) -> bytes:
    # All inputs are public and the same for every request to a key, so the result is cached.
    psk_id_hash = _labeled_extract(suite_id, b"", b"psk_id_hash", b"")
    return _MODE_BASE + psk_id_hash + _labeled_extract(suite_id, b"", b"info_hash", info)


class Context(Sequence):
    """An HPKE context: a `Sequence` with export (RFC 9180, 5.2 and 5.3). It seals or it opens, never both."""

    def __init__(self, suite: Suite, shared_secret: bytes, info: bytes) -> None:
        self._suite_id = suite_id = b"HPKE" + suite.wire
        schedule = _schedule_context(suite_id, info)
        secret = _labeled_extract(suite_id, shared_secret, b"secret", b"")
        self._exporter = _labeled_expand(suite_id, secret, b"exp", schedule, HASH_LENGTH)
        key = _labeled_expand(suite_id, secret, b"key", schedule, key_length(suite.aead))
        super().__init__(
            new_aead(suite.aead, key), _labeled_expand(suite_id, secret, b"base_nonce", schedule, NONCE_LENGTH)
        )

    def export(self, context: bytes, length: int) -> bytes:
        """`length` secret bytes that only the two ends can derive (RFC 9180, 5.3)."""
        return _labeled_expand(self._suite_id, self._exporter, b"sec", context, length)


def setup_sender(
    suite: Suite, public_key: bytes, info: bytes, ephemeral: X25519PrivateKey | None = None
) -> tuple[bytes, Context]:
    """(encapsulated key, context). Raises `MalformedMessage`. `ephemeral` is for known-answer tests."""
    shared_secret, enc = encapsulate(suite.kem, public_key, ephemeral)
    return enc, Context(suite, shared_secret, info)


def setup_recipient(suite: Suite, key: PrivateKey, enc: bytes, info: bytes) -> Context:
    """The recipient's context for `enc`. Raises `MalformedMessage`, or `UnknownKey` if `key` has another KEM."""
    if key.kem is not suite.kem:
        raise UnknownKey("the key has another KEM than the suite")
    return Context(suite, key.decapsulate(enc), info)
