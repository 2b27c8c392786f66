"""Key configurations (RFC 9458, 3): what a client needs to seal a request, as bytes.

One configuration: `key_id u8 | kem u16 | public key | length u16 | (kdf u16, aead u16)*`. The media type
`application/ohttp-keys` is a list of them, best first, each preceded by its length as u16. EHBP serves one
configuration without that length.
"""

from dataclasses import dataclass

from adytum.inference.channel.errors import MalformedMessage
from adytum.inference.channel.hpke import PUBLIC_KEY_LENGTH, AeadId, KdfId, KemId, Suite

MEDIA_TYPE = "application/ohttp-keys"
OFFERED = ((KdfId.HKDF_SHA256, AeadId.AES_256_GCM),)


@dataclass(frozen=True)
class KeyConfiguration:
    """A public key, its identifier and the symmetric algorithms it may be used with, in order of preference."""

    key_id: int
    kem: KemId
    public_key: bytes
    symmetric: tuple[tuple[KdfId, AeadId], ...] = OFFERED

    def encode(self) -> bytes:
        """The configuration's bytes, without the length that precedes it in a list."""
        pairs = b"".join(kdf.to_bytes(2, "big") + aead.to_bytes(2, "big") for kdf, aead in self.symmetric)
        return (
            bytes((self.key_id,))
            + self.kem.to_bytes(2, "big")
            + self.public_key
            + len(pairs).to_bytes(2, "big")
            + pairs
        )

    @property
    def suite(self) -> Suite:
        """The preferred suite."""
        kdf, aead = self.symmetric[0]
        return Suite(self.kem, kdf, aead)

    def allows(self, suite: Suite) -> bool:
        """Whether the configuration offers `suite`."""
        return suite.kem is self.kem and (suite.kdf, suite.aead) in self.symmetric

    @classmethod
    def decode(cls, data: bytes) -> "KeyConfiguration | None":
        """One configuration, or `None` if this client does not know its KEM or none of its algorithms.

        Raises `MalformedMessage`.
        """
        if len(data) < 3:
            raise MalformedMessage("a key configuration is too short")
        try:
            kem = KemId(int.from_bytes(data[1:3], "big"))
        except ValueError:
            return None
        at = 3 + PUBLIC_KEY_LENGTH[kem]
        pairs = data[at + 2 :]
        if int.from_bytes(data[at : at + 2], "big") != len(pairs) or not pairs or len(pairs) % 4:
            raise MalformedMessage("a key configuration's lengths do not add up")
        known: list[tuple[KdfId, AeadId]] = []
        for i in range(0, len(pairs), 4):
            try:
                kdf = KdfId(int.from_bytes(pairs[i : i + 2], "big"))
                known.append((kdf, AeadId(int.from_bytes(pairs[i + 2 : i + 4], "big"))))
            except ValueError:
                continue
        return cls(data[0], kem, data[3:at], tuple(known)) if known else None


def encode_list(configurations: tuple[KeyConfiguration, ...]) -> bytes:
    """The body of `application/ohttp-keys`."""
    encoded = [configuration.encode() for configuration in configurations]
    return b"".join(len(item).to_bytes(2, "big") + item for item in encoded)


def decode_list(data: bytes) -> tuple[KeyConfiguration, ...]:
    """The known configurations of an `application/ohttp-keys` body, in its order.

    Raises `MalformedMessage` on any encoding error, because a client discards the whole list (RFC 9458, 3.2), and if
    the list has no configuration that this client knows.
    """
    known: list[KeyConfiguration] = []
    at = 0
    while at < len(data):
        length = int.from_bytes(data[at : at + 2], "big")
        item = data[at + 2 : at + 2 + length]
        if len(item) != length:
            raise MalformedMessage("the list of key configurations is truncated")
        configuration = KeyConfiguration.decode(item)
        if configuration is not None:
            known.append(configuration)
        at += 2 + length
    if not known:
        raise MalformedMessage("the list has no key configuration that this client knows")
    return tuple(known)
