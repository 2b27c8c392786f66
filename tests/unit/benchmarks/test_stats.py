"""Percentiles and intervals against known answers, and how often an interval of three repetitions is right."""

import random

import pytest

from adytum.benchmarks.runfile import stats
from adytum.benchmarks.runfile.stats import Pooled


def test_percentiles() -> None:
    values = [4.0, 1.0, 3.0, 2.0]
    assert [stats.percentile(values, share) for share in (0, 0.5, 0.9, 1)] == [1.0, 2.5, pytest.approx(3.7), 4.0]
    with pytest.raises(ValueError, match="no values"):
        stats.percentile([], 0.5)


@pytest.mark.parametrize("picks", [(0, 1, 2), (0, 0, 1), (2, 2, 2), (0, 2, 2)])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 0.9, 0.99, 1.0])
def test_a_quantile_of_picked_groups_is_that_of_their_values(picks: tuple[int, ...], share: float) -> None:
    rng = random.Random(5)
    groups = [[rng.random() for _ in range(size)] for size in (7, 13, 4)]
    wanted = stats.percentile([value for pick in picks for value in groups[pick]], share)
    assert Pooled(groups).quantile(share, picks) == pytest.approx(wanted)


def test_intervals_of_few_repetitions_hold_the_truth() -> None:
    rng, held = random.Random(7), 0
    for _ in range(300):
        values = [rng.gauss(10, 1) for _ in range(3)]
        held += stats.estimate(3, lambda picks, v=values: stats.mean([v[i] for i in picks])).holds(10)  # type: ignore[misc]
    # A percentile bootstrap of three has about 75 %.
    assert 0.90 < held / 300 < 0.99


def test_pairs_take_out_what_both_share() -> None:
    drift = [1.0, 1.4, 0.8, 1.2, 0.9]
    a, b = drift, [value * 1.1 for value in drift]

    def ratio(x: object, y: object) -> float:
        return stats.mean([b[i] for i in y]) / stats.mean([a[i] for i in x])  # type: ignore[attr-defined]

    together = stats.difference((5, 5), ratio, paired=True)
    apart = stats.difference((5, 5), ratio, paired=False)
    assert together.value == pytest.approx(1.1)
    assert together.high - together.low < 0.001
    assert apart.high - apart.low > 0.3
    with pytest.raises(ValueError, match="the same number of repetitions"):
        stats.difference((5, 4), ratio, paired=True)
    with pytest.raises(ValueError, match="two repetitions"):
        stats.estimate(1, lambda picks: 0.0)
