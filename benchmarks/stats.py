"""Percentiles and bootstrap intervals, without dependencies."""

import random
from collections.abc import Callable, Sequence

_RESAMPLES = 2000
_SEED = 20261123


def percentile(values: Sequence[float], share: float) -> float:
    """The `share` (0 to 1) quantile, interpolated. Raises `ValueError` for no values."""
    if not values:
        raise ValueError("no values")
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def interval(
    a: Sequence[float], b: Sequence[float], statistic: Callable[[Sequence[float], Sequence[float]], float]
) -> tuple[float, float]:
    """95 % bootstrap interval of `statistic` over pairs (`a[i]`, `b[i]`), which were measured next to each other."""
    rng = random.Random(_SEED)
    found = []
    for _ in range(_RESAMPLES):
        picks = [rng.randrange(len(a)) for _ in a]
        found.append(statistic([a[i] for i in picks], [b[i] for i in picks]))
    return percentile(found, 0.025), percentile(found, 0.975)


def mean(values: Sequence[float]) -> float:
    """The arithmetic mean."""
    return sum(values) / len(values)
