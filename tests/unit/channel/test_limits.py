"""The default limits: a change of one is a change of what peers may send."""

from dataclasses import FrozenInstanceError, asdict

import pytest

from adytum.inference.channel.limits import DEFAULT_LIMITS, Limits


def test_the_defaults() -> None:
    assert asdict(DEFAULT_LIMITS) == {
        "message": 33_554_432,
        "chunk": 1_048_576,
        "frame": 67_108_864,
        "chunks": 65_536,
        "control": 16_384,
        "field_lines": 128,
        "field_section": 65_536,
        "informational": 8,
        "padding": 4_194_304,
    }
    assert Limits() == DEFAULT_LIMITS


def test_limits_do_not_change() -> None:
    with pytest.raises(FrozenInstanceError):
        DEFAULT_LIMITS.message = 1  # type: ignore[misc]
