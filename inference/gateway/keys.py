"""The channel's keys: made in the TEE, kept in memory only, rotated, erased. Each encapsulated key is answered once.

A generation is one key per KEM. The newest is announced; older ones are answered until their overlap ends. Every
look-up first replaces a key that is due, so no key outlives its time even if the rotating task dies.

Replays: each generation remembers all encapsulated keys that it answered, up to its share of `REPLAY_LIMIT`. From then
on it accepts only requests with a `Date` inside `WINDOW_S`, and remembers each for as long as its date is acceptable
(RFC 9458, 6.5.1 and 6.5.2). It never forgets a key that could be replayed, and never mistakes a new key for an old one.
This holds for the whole backend because the keys exist in one process only.

Erasing means dropping the last reference; docs/explanation/keys.md describes what that achieves.
"""

import math
import secrets
from collections.abc import Callable
from dataclasses import dataclass, field

from adytum.inference.channel import hpke
from adytum.inference.channel.errors import UnknownKey
from adytum.inference.channel.hpke import KemId, PrivateKey
from adytum.inference.channel.keyconfig import KeyConfiguration

KEMS = (KemId.MLKEM768_X25519, KemId.X25519)
"""Offered, best first."""
EHBP_KEY_ID = 0
REPLAY_LIMIT = 1 << 20
"""Encapsulated keys remembered by all generations together: at most 250 MB (docs/explanation/keys.md)."""
WINDOW_S = 60.0
"""How far a required `Date` may be from this clock."""
GENERATIONS = 120
"""At most so many are held at once. Identifiers are one byte, and each generation takes two."""


class Replayed(Exception):
    """This encapsulated key has already been answered."""


class DateNeeded(Exception):
    """So many requests were answered that a new one must carry a `Date` inside the window. `now`: Unix seconds."""

    def __init__(self, now: float) -> None:
        super().__init__()
        self.now = now


class ReplayMemoryFull(Exception):
    """Even the requests inside the window are too many to remember."""


@dataclass(frozen=True)
class _Generation:
    keys: dict[int, tuple[KeyConfiguration, PrivateKey]]
    made_at: float
    answered_until: float
    seen: set[bytes] = field(default_factory=set)
    recent: dict[bytes, float] = field(default_factory=dict)
    """Keys answered inside the window, oldest first, and the time until which each is remembered."""

    def __repr__(self) -> str:
        return f"_Generation(ids={sorted(self.keys)})"


class KeyRing:
    """Holds the generations. `clock` returns Unix seconds; if it goes back, the ring's own time stands still."""

    def __init__(
        self, clock: Callable[[], float], lifetime_s: float, overlap_s: float, replay_limit: int = REPLAY_LIMIT
    ) -> None:
        """Raises `ValueError` if more than `GENERATIONS` would be held at once."""
        held = 2 + math.ceil(overlap_s / lifetime_s)
        if held > GENERATIONS:
            raise ValueError(
                f"an overlap of {overlap_s:g} s with a life of {lifetime_s:g} s keeps {held} generations of keys, and "
                f"at most {GENERATIONS} can be held"
            )
        self._clock = clock
        self._lifetime = lifetime_s
        self._overlap = overlap_s
        self._share = max(1, replay_limit // held)
        self._latest = 0.0
        self._generations: list[_Generation] = []
        # Different after each start, so that a client with a key from before the start is told at once.
        self._next_id = secrets.randbelow(255) + 1
        self.rotate()

    def rotate(self) -> None:
        """Makes a new generation and erases expired ones."""
        now = self._now()
        keys: dict[int, tuple[KeyConfiguration, PrivateKey]] = {}
        for kem in KEMS:
            key = hpke.generate(kem)
            keys[self._next_id] = (KeyConfiguration(self._next_id, kem, key.public_bytes), key)
            # Identifiers are one byte and only tell live keys apart; 0 is reserved for EHBP.
            self._next_id = self._next_id % 255 + 1
        self._generations.insert(0, _Generation(keys, now, now + self._lifetime + self._overlap))
        # The replaced generation is answered for one overlap from now, however early it was replaced.
        self._generations[1:2] = [
            _Generation(old.keys, old.made_at, min(old.answered_until, now + self._overlap), old.seen, old.recent)
            for old in self._generations[1:2]
        ]
        self._expire(now)

    def refresh(self) -> None:
        """Replaces keys that are due, and erases keys that are no longer answered."""
        now = self._now()
        if now >= self._generations[0].made_at + self._lifetime:
            self.rotate()
        else:
            self._expire(now)

    def _expire(self, now: float) -> None:
        self._generations[:] = [item for item in self._generations if item.answered_until > now]

    def _now(self) -> float:
        # The host sets a guest's clock. If it turned it back, expired keys and old dates would be valid again.
        self._latest = max(self._latest, self._clock())
        return self._latest

    @property
    def rotate_at(self) -> float:
        """When the newest generation is due for replacement, Unix seconds."""
        return self._generations[0].made_at + self._lifetime

    @property
    def age(self) -> float:
        """Seconds since the announced keys were made."""
        return self._now() - self._generations[0].made_at

    @property
    def expires_at(self) -> float:
        """When the announced keys are answered for the last time, unless they are replaced earlier. Unix seconds."""
        self.refresh()
        return self._generations[0].answered_until

    @property
    def configurations(self) -> tuple[KeyConfiguration, ...]:
        """The announced key configurations, best first."""
        self.refresh()
        return tuple(configuration for configuration, _ in self._generations[0].keys.values())

    @property
    def ehbp_configuration(self) -> KeyConfiguration:
        """The announced X25519 key as EHBP serves it."""
        public = next(item.public_key for item in self.configurations if item.kem is KemId.X25519)
        return KeyConfiguration(EHBP_KEY_ID, KemId.X25519, public)

    def find(self, key_id: int) -> tuple[KeyConfiguration, PrivateKey]:
        """The key with this identifier. Raises `UnknownKey`."""
        self.refresh()
        for generation in self._generations:
            if key_id in generation.keys:
                return generation.keys[key_id]
        raise UnknownKey("no key with this identifier is held")

    def ehbp_keys(self) -> tuple[PrivateKey, ...]:
        """All X25519 keys that are still answered, newest first."""
        self.refresh()
        return tuple(key for item in self._generations for _, key in item.keys.values() if key.kem is KemId.X25519)

    def spend(self, enc: bytes, recipient: bytes, date: Callable[[], float | None]) -> None:
        """Marks an opened request's encapsulated key as answered. `recipient`: the public key it was sealed to. `date`:
        returns its `Date` in Unix seconds.

        Exact, without false positives: it keeps the ephemeral X25519 public key, which ends both KEMs' encapsulated
        keys. A changed `enc` opens nothing, because both KEMs hash it into the shared secret.

        Raises `Replayed`, `DateNeeded`, `ReplayMemoryFull`, and `UnknownKey` if the key has expired since.
        """
        self.refresh()
        generation = self._of(recipient)
        name = enc[-32:]
        if name in generation.seen or name in generation.recent:
            raise Replayed
        if len(generation.seen) < self._share:
            generation.seen.add(name)
            return
        now, said = self._now(), date()
        if said is None or abs(said - now) > WINDOW_S:
            raise DateNeeded(now)
        recent = generation.recent
        while recent and next(iter(recent.values())) < now:
            del recent[next(iter(recent))]
        if len(recent) >= self._share:
            raise ReplayMemoryFull
        # A date up to one window ahead can be replayed until one window after it.
        recent[name] = now + 2 * WINDOW_S

    def _of(self, recipient: bytes) -> _Generation:
        for generation in self._generations:
            if any(configuration.public_key == recipient for configuration, _ in generation.keys.values()):
                return generation
        raise UnknownKey("the key has expired")
