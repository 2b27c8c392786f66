"""The arithmetic of `benchmarks channel`."""

import pytest

from adytum.benchmarks.channel.measure import Load, slope


@pytest.mark.parametrize("load", [Load(64, 100, 10, 1), Load(64, 800, 0, 16), Load(64, 48, 0, 16)])
def test_a_requests_own_cost_is_not_an_events(load: Load) -> None:
    request, event = 500e-6, 10e-6
    few, many = (load.streams * (request + event * events) for events in (load.few, load.events))
    assert slope(few, many, load) == pytest.approx(event)
    assert load.batch <= load.few < load.events
