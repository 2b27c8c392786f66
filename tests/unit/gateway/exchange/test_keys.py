"""Key rotation, expiry and the refusal of replays, on a clock that the test moves."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adytum.inference.channel.errors import UnknownKey
from adytum.inference.channel.hpke import KemId
from adytum.inference.core.lifecycle import NEXT, Lifecycle, Step
from adytum.inference.gateway.keys import WINDOW_S, DateNeeded, KeyRing, Replayed, ReplayMemoryFull


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


def test_a_key_that_is_due_is_replaced_by_whoever_asks_even_if_no_task_rotates() -> None:
    clock = Clock()
    held = ring(clock)
    old = held.configurations
    clock.now += 3600
    assert held.configurations != old
    clock.now += 100_000
    assert len(held.ehbp_keys()) == 1
    with pytest.raises(UnknownKey):
        held.find(old[0].key_id)


def test_a_clock_that_goes_back_revives_nothing() -> None:
    clock = Clock()
    held = ring(clock)
    old = held.configurations[0].key_id
    clock.now += 4200
    held.refresh()
    clock.now -= 4200
    with pytest.raises(UnknownKey):
        held.find(old)


def no_date() -> None:
    return None


def public(held: KeyRing) -> bytes:
    return held.configurations[0].public_key


def test_an_encapsulated_key_is_spent_once_and_across_a_rotation() -> None:
    held = ring(Clock())
    key = public(held)
    held.spend(b"a" * 32, key, no_date)
    with pytest.raises(Replayed):
        held.spend(b"a" * 32, key, no_date)
    held.rotate()
    with pytest.raises(Replayed):
        held.spend(b"a" * 32, key, no_date)
    held.spend(b"b" * 32, key, no_date)
    held.spend(b"c" * 32, public(held), no_date)


def test_a_key_that_expired_while_its_request_came_answers_nothing() -> None:
    clock = Clock()
    held = ring(clock)
    key = public(held)
    clock.now += 4200
    with pytest.raises(UnknownKey):
        held.spend(b"a" * 32, key, no_date)


def filled(clock: Clock, share: int = 3) -> tuple[KeyRing, bytes]:
    """A ring whose first generation remembers all that it can without dates."""
    held = KeyRing(clock, 3600, 600, replay_limit=3 * share)  # Two and one that is being made hold a share each.
    key = public(held)
    for i in range(share):
        held.spend(bytes([i]) * 32, key, no_date)
    return held, key


def test_beyond_the_bound_a_request_needs_a_date_inside_the_window() -> None:
    clock = Clock()
    held, key = filled(clock)
    for date in (None, clock.now - WINDOW_S - 1, clock.now + WINDOW_S + 1):
        with pytest.raises(DateNeeded) as needed:
            held.spend(b"x" * 32, key, lambda date=date: date)
        assert needed.value.now == clock.now
    held.spend(b"x" * 32, key, lambda: clock.now - WINDOW_S)
    held.rotate()
    held.spend(b"y" * 32, public(held), no_date)


def test_beyond_the_bound_nothing_that_was_answered_is_answered_again() -> None:
    """Also not by a date that is as far ahead as can be, nor once it is forgotten, nor with the clock turned back."""
    clock = Clock()
    held, key = filled(clock)
    ahead = clock.now + WINDOW_S
    held.spend(b"x" * 32, key, lambda: ahead)
    for i in range(3):
        with pytest.raises(Replayed):
            held.spend(bytes([i]) * 32, key, lambda: clock.now)
    for _ in range(130):
        with pytest.raises((Replayed, DateNeeded)):
            held.spend(b"x" * 32, key, lambda: ahead)
        clock.now += 1
    held.spend(b"y" * 32, key, lambda: clock.now)
    assert b"x" * 32 not in held._generations[0].recent
    clock.now -= 130
    with pytest.raises((Replayed, DateNeeded)):
        held.spend(b"x" * 32, key, lambda: ahead)


def test_what_does_not_fit_into_the_window_waits_and_nothing_is_forgotten_for_it() -> None:
    clock = Clock()
    held, key = filled(clock)
    for i in range(3):
        held.spend(bytes([100 + i]) * 32, key, lambda: clock.now)
    with pytest.raises(ReplayMemoryFull):
        held.spend(b"z" * 32, key, lambda: clock.now)
    with pytest.raises(Replayed):
        held.spend(bytes([100]) * 32, key, lambda: clock.now)
    clock.now += 2 * WINDOW_S + 1
    held.spend(b"z" * 32, key, lambda: clock.now)


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(-90, 90), st.integers(0, 40)), max_size=120))
def test_nothing_is_ever_answered_twice_and_the_memory_stays_bounded(asked: list[tuple[int, int, int]]) -> None:
    clock = Clock()
    held = KeyRing(clock, 50, 20, replay_limit=12)
    dates: dict[int, float] = {}
    answered: set[tuple[int, bytes]] = set()
    for name, offset, wait in asked:
        clock.now += wait
        key = public(held)
        # A client's date is part of what it sealed: a replay brings the same one.
        date = dates.setdefault(name, clock.now + offset)
        try:
            held.spend(bytes([name]) * 32, key, lambda date=date: date)
        except (Replayed, DateNeeded, ReplayMemoryFull):
            continue
        assert (name, key) not in answered
        answered.add((name, key))
        assert sum(len(item.seen) + len(item.recent) for item in held._generations) <= 2 * 12


def test_more_generations_than_can_be_held_are_refused() -> None:
    with pytest.raises(ValueError, match="generations"):
        KeyRing(Clock(), 1, 600)


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
