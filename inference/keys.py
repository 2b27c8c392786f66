"""The channel's keys: made in the TEE, in memory only, rotated, erased, each encapsulated key answered once.

A generation is one key per KEM. The newest is announced; the one before is answered until its overlap ends.
Erasing means dropping the last reference: CPython and OpenSSL free the memory, and OpenSSL clears it as it does.
"""

import secrets
from collections.abc import Callable
from dataclasses import dataclass, field

from inference.channel import hpke
from inference.channel.errors import UnknownKey
from inference.channel.hpke import KemId, PrivateKey
from inference.channel.keyconfig import KeyConfiguration

KEMS = (KemId.MLKEM768_X25519, KemId.X25519)
"""Offered, best first."""

EHBP_KEY_ID = 0
REPLAY_LIMIT = 1 << 20
"""Encapsulated keys remembered per generation (about 130 MB); a full generation is rotated early."""


class Replayed(Exception):
    """This encapsulated key has been answered."""


@dataclass(frozen=True)
class _Generation:
    keys: dict[int, tuple[KeyConfiguration, PrivateKey]]
    made_at: float
    answered_until: float
    seen: set[bytes] = field(default_factory=set)

    def __repr__(self) -> str:
        return f"_Generation(ids={sorted(self.keys)})"


class KeyRing:
    """Holds the generations. `clock` gives Unix seconds."""

    def __init__(self, clock: Callable[[], float], lifetime_s: float, overlap_s: float) -> None:
        self._clock = clock
        self._lifetime = lifetime_s
        self._overlap = overlap_s
        self._generations: list[_Generation] = []
        # Not the same after each start, so that a client with a key from before is told so at once.
        self._next_id = secrets.randbelow(255) + 1
        self.rotate()

    def rotate(self) -> None:
        """Makes a new generation and erases those whose time is over."""
        now = self._clock()
        keys: dict[int, tuple[KeyConfiguration, PrivateKey]] = {}
        for kem in KEMS:
            key = hpke.generate(kem)
            keys[self._next_id] = (KeyConfiguration(self._next_id, kem, key.public_bytes), key)
            # Identifiers are one byte and only tell live keys apart; 0 is left to EHBP.
            self._next_id = self._next_id % 255 + 1
        self._generations.insert(0, _Generation(keys, now, now + self._lifetime + self._overlap))
        # The generation that was current is answered for the overlap from now, however early it was replaced.
        self._generations[1:2] = [
            _Generation(old.keys, old.made_at, min(old.answered_until, now + self._overlap), old.seen)
            for old in self._generations[1:2]
        ]
        self.expire()

    def expire(self) -> None:
        """Erases the generations that are no longer answered."""
        now = self._clock()
        # The newest stays even past its time: were the rotation late, a backend without keys would help nobody.
        self._generations[1:] = [item for item in self._generations[1:] if item.answered_until > now]

    @property
    def rotate_at(self) -> float:
        """When the newest generation is due for replacement, Unix seconds."""
        return self._generations[0].made_at + self._lifetime

    @property
    def expires_at(self) -> float:
        """When the announced keys are answered for the last time, if nothing replaces them earlier."""
        return self._generations[0].answered_until

    @property
    def configurations(self) -> tuple[KeyConfiguration, ...]:
        """The announced key configurations, best first."""
        return tuple(configuration for configuration, _ in self._generations[0].keys.values())

    @property
    def ehbp_configuration(self) -> KeyConfiguration:
        """The announced X25519 key as EHBP serves it."""
        public = next(item.public_key for item in self.configurations if item.kem is KemId.X25519)
        return KeyConfiguration(EHBP_KEY_ID, KemId.X25519, public)

    def find(self, key_id: int) -> tuple[KeyConfiguration, PrivateKey]:
        """The key with this identifier. Raises `UnknownKey`."""
        self.expire()
        for generation in self._generations:
            if key_id in generation.keys:
                return generation.keys[key_id]
        raise UnknownKey("no key with this identifier is held")

    def ehbp_keys(self) -> tuple[PrivateKey, ...]:
        """All X25519 keys that are answered, newest first."""
        self.expire()
        return tuple(key for item in self._generations for _, key in item.keys.values() if key.kem is KemId.X25519)

    def spend(self, enc: bytes) -> None:
        """Marks an opened request's encapsulated key as answered. Raises `Replayed`.

        Exact, no false positives: what is kept is the ephemeral X25519 public key, with which both KEMs' encapsulated
        keys end. A changed `enc` opens nothing, since both KEMs hash it into the shared secret.
        """
        name = enc[-32:]
        if any(name in item.seen for item in self._generations):
            raise Replayed
        if len(self._generations[0].seen) >= REPLAY_LIMIT:
            self.rotate()
        # The newest generation outlives the one that the request was sealed for, so this is remembered long enough.
        self._generations[0].seen.add(name)
