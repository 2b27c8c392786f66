"""Key rotation, expiry and the refusal of replays, on a clock that the test moves."""

import pytest

from inference import keys
from inference.channel.errors import UnknownKey
from inference.channel.hpke import KemId
from inference.keys import KeyRing, Replayed
from inference.lifecycle import NEXT, Lifecycle, Step


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def ring(clock: Clock) -> KeyRing:
    return KeyRing(clock, lifetime_s=3600, overlap_s=600)


def test_both_kems_are_announced_best_first() -> None:
    assert [item.kem for item in ring(Clock()).configurations] == [KemId.MLKEM768_X25519, KemId.X25519]


def test_a_rotated_key_is_answered_for_the_overlap_and_not_a_moment_longer() -> None:
    clock = Clock()
    held = ring(clock)
    old = held.configurations
    assert held.rotate_at == clock.now + 3600
    clock.now += 3600
    held.rotate()
    assert {item.key_id for item in held.configurations}.isdisjoint(item.key_id for item in old)
    clock.now += 599
    assert [held.find(item.key_id)[0] for item in old] == list(old)
    assert len(held.ehbp_keys()) == 2
    clock.now += 1
    for item in old:
        with pytest.raises(UnknownKey):
            held.find(item.key_id)
    assert len(held.ehbp_keys()) == 1


def test_an_early_rotation_shortens_the_old_keys_life_to_the_overlap() -> None:
    clock = Clock()
    held = ring(clock)
    old = held.configurations[0].key_id
    clock.now += 10
    held.rotate()
    clock.now += 600
    with pytest.raises(UnknownKey):
        held.find(old)


def test_identifiers_never_collide_among_live_keys_and_leave_zero_to_ehbp() -> None:
    clock = Clock()
    held = ring(clock)
    for _ in range(300):
        clock.now += 300
        held.rotate()
        ids = [item for generation in held._generations for item in generation.keys]
        assert len(ids) == len(set(ids))
        assert 0 not in ids


def test_an_encapsulated_key_is_spent_once_and_across_a_rotation() -> None:
    clock = Clock()
    held = ring(clock)
    held.spend(b"a" * 32)
    with pytest.raises(Replayed):
        held.spend(b"a" * 32)
    held.rotate()
    with pytest.raises(Replayed):
        held.spend(b"a" * 32)
    held.spend(b"b" * 32)


def test_the_replay_memory_is_bounded_by_an_early_rotation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keys, "REPLAY_LIMIT", 3)
    held = ring(Clock())
    first = held.configurations
    for i in range(4):
        held.spend(bytes([i]) * 32)
    assert held.configurations != first
    with pytest.raises(Replayed):
        held.spend(bytes([0]) * 32)


def test_no_repr_shows_a_key() -> None:
    held = ring(Clock())
    for generation in held._generations:
        for configuration, key in generation.keys.values():
            assert repr(key) in ("XWingKey(...)", "X25519Key(...)")
            assert configuration.public_key.hex()[:16] not in repr(generation)


def test_the_lifecycle_moves_only_along_its_table() -> None:
    for start in Step:
        for target in Step:
            life = Lifecycle(step=start)
            if target in NEXT[start]:
                life.advance(target)
                assert life.step is target
            else:
                with pytest.raises(ValueError, match="is not followed by"):
                    life.advance(target)
    assert not Lifecycle(step=Step.FAILED).evidence_ready
    assert [step for step in Step if Lifecycle(step=step).serving] == [Step.SERVING]
