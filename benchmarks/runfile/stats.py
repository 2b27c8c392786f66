"""Percentiles and bootstrap intervals over repetitions, without dependencies.

Requests of one repetition share the machine's state at that moment, so whole repetitions are resampled, never single
requests: ten thousand times from one bad minute prove nothing. There are few repetitions (at least three), for which a
percentile bootstrap is far too narrow. So the bootstrap supplies only the standard error, widened by sqrt(n / (n - 1)).
The interval is this error times Student's t with n - 1 degrees of freedom (Hesterberg, "What Teachers Should Know about
the Bootstrap", 2015, section 4).
"""

import bisect
import math
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

_RESAMPLES = 400
_SEED = 20261123
# Student's t, 97.5 %, by degrees of freedom.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)
_T_NORMAL = 1.960


@dataclass(frozen=True)
class Estimate:
    """A value and its 95 % interval, in the value's unit."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.4g} [{self.low:.4g}, {self.high:.4g}]"

    def holds(self, value: float) -> bool:
        """Whether `value` is inside the interval."""
        return self.low <= value <= self.high


def percentile(values: Sequence[float], share: float) -> float:
    """The `share` (0 to 1) quantile, interpolated. Raises `ValueError` for no values."""
    return quantile(sorted(values), share)


def quantile(ordered: Sequence[float], share: float) -> float:
    """Like `percentile`, for sorted values."""
    if not ordered:
        raise ValueError("no values")
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def mean(values: Sequence[float]) -> float:
    """The arithmetic mean."""
    return sum(values) / len(values)


class Pooled:
    """The values of several repetitions, sorted once, so that the quantile of any multiset of them is fast."""

    def __init__(self, groups: Sequence[Sequence[float]]) -> None:
        tagged = sorted((value, place) for place, group in enumerate(groups) for value in group)
        self._values = [value for value, _ in tagged]
        self._sizes = [len(group) for group in groups]
        self._places: list[list[int]] = [[] for _ in groups]
        """The places of each group's values among all, ascending."""
        for at, (_, place) in enumerate(tagged):
            self._places[place].append(at)

    def quantile(self, share: float, picks: Sequence[int]) -> float:
        """The weighted quantile (the smallest value that `share` of all do not exceed, interpolated for no weights)."""
        weights = Counter(picks)
        if len(weights) == len(self._sizes) and len(picks) == len(weights):
            return quantile(self._values, share)
        total = sum(self._sizes[place] * count for place, count in weights.items())
        if not total:
            raise ValueError("no values")

        def rank(at: int) -> int:
            return sum(bisect.bisect_right(self._places[place], at) * count for place, count in weights.items())

        # A binary search: a run has a hundred thousand gaps, and each figure needs a thousand multisets.
        all_of_them = range(len(self._values))
        wanted = share * (total - 1)
        low = bisect.bisect_right(all_of_them, math.floor(wanted), key=rank)
        high = bisect.bisect_right(all_of_them, min(math.floor(wanted) + 1, total - 1), key=rank)
        return self._values[low] + (self._values[high] - self._values[low]) * (wanted - math.floor(wanted))


def estimate(repetitions: int, statistic: Callable[[Sequence[int]], float]) -> Estimate:
    """`statistic` of a multiset of repetitions (indices below `repetitions`), and its interval.

    Raises `ValueError` for fewer than two repetitions.
    """
    value = statistic(range(repetitions))
    reach = _reach(repetitions, statistic)
    return Estimate(value, value - reach, value + reach)


def difference(
    counts: tuple[int, int], statistic: Callable[[Sequence[int], Sequence[int]], float], *, paired: bool
) -> Estimate:
    """`statistic` of two sets of repetitions, and its interval.

    `paired`: repetition i of both ran next to each other, so both are resampled together; otherwise each by itself.
    """
    a, b = counts
    value = statistic(range(a), range(b))
    if paired:
        if a != b:
            raise ValueError("paired sides must have the same number of repetitions")
        reach = _reach(a, lambda picks: statistic(picks, picks))
    else:
        reach = math.hypot(
            _reach(a, lambda picks: statistic(picks, range(b))), _reach(b, lambda picks: statistic(range(a), picks))
        )
    return Estimate(value, value - reach, value + reach)


def _reach(repetitions: int, statistic: Callable[[Sequence[int]], float]) -> float:
    """Half the width of the interval."""
    if repetitions < 2:
        raise ValueError("an interval needs at least two repetitions")
    rng = random.Random(_SEED)
    known: dict[tuple[int, ...], float] = {}
    found = []
    for _ in range(_RESAMPLES):
        picks = tuple(sorted(rng.randrange(repetitions) for _ in range(repetitions)))
        if picks not in known:
            known[picks] = statistic(picks)
        found.append(known[picks])
    middle = mean(found)
    error = math.sqrt(mean([(item - middle) ** 2 for item in found]) * repetitions / (repetitions - 1))
    return error * (_T[repetitions - 2] if repetitions - 2 < len(_T) else _T_NORMAL)
