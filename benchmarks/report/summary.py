"""From a run's raw times to metrics with intervals: per arm and level, and between two arms or two runs."""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from adytum.benchmarks.runfile import stats
from adytum.benchmarks.runfile.runfile import Level, Repetition, Request, Run
from adytum.benchmarks.runfile.stats import Estimate, Pooled

CHECKS = (("direct", "own-relay"), ("ohttp", "own-proxy"))
"""Pairs of arms that differ only in the client."""

SHARES = {"p50": 0.5, "p90": 0.9, "p99": 0.99}
_Times = Callable[[Request], Sequence[float]]


def _one(value: float | None) -> list[float]:
    return [] if value is None else [value]


@dataclass(frozen=True)
class Metric:
    """`times` returns a request's values in seconds. A `rate` metric has one value per repetition instead."""

    name: str
    unit: str
    times: _Times | None = None
    rate: Callable[[Repetition, dict[str, float | None]], float | None] | None = None
    more_is_better: bool = False


def _tokens(item: Repetition, _limits: dict[str, float | None]) -> float | None:
    tokens = sum(request.tokens for request in item.requests)
    return tokens / item.wall_s if tokens else None


def _answers(item: Repetition, _limits: dict[str, float | None]) -> float | None:
    return sum(not request.error for request in item.requests) / item.wall_s


def _good(item: Repetition, limits: dict[str, float | None]) -> float | None:
    if all(value is None for value in limits.values()):
        return None
    return sum(_meets(request, limits) for request in item.requests) / item.wall_s


def _meets(request: Request, limits: dict[str, float | None]) -> bool:
    if request.error:
        return False
    times = {"ttft_ms": request.ttft_s, "tpot_ms": request.tpot_s, "e2e_ms": request.e2e_s}
    # A limit on a value that an answer lacks (a single token has no time per token) is met.
    for name, limit in limits.items():
        seconds = times[name]
        if limit is not None and seconds is not None and seconds * 1000 > limit:
            return False
    return True


METRICS = (
    Metric("TTFT", "ms", times=lambda request: _one(request.ttft_s)),
    Metric("TPOT", "ms", times=lambda request: _one(request.tpot_s)),
    Metric("inter-chunk", "ms", times=lambda request: request.gaps_s),
    Metric("end-to-end", "ms", times=lambda request: [request.e2e_s]),
    Metric("throughput", "tokens/s", rate=_tokens, more_is_better=True),
    Metric("requests", "1/s", rate=_answers, more_is_better=True),
    Metric("goodput", "1/s", rate=_good, more_is_better=True),
)


class Cell:
    """One arm at one level: statistics of any multiset of its repetitions."""

    def __init__(self, repetitions: Sequence[Repetition], limits: dict[str, float | None]) -> None:
        self.repetitions = repetitions
        self._limits = limits
        self._pooled: dict[str, Pooled] = {}

    def __len__(self) -> int:
        return len(self.repetitions)

    def has(self, metric: Metric) -> bool:
        """Whether every repetition has values of this metric."""
        if metric.rate is not None:
            return all(metric.rate(item, self._limits) is not None for item in self.repetitions)
        return all(self.times(metric, item) for item in self.repetitions)

    def times(self, metric: Metric, item: Repetition) -> list[float]:
        """The metric's values in milliseconds, without failed requests."""
        assert metric.times is not None
        return [value * 1000 for request in item.requests if not request.error for value in metric.times(request)]

    def statistic(self, metric: Metric, share: float) -> Callable[[Sequence[int]], float]:
        """The metric's quantile (or mean rate) over picked repetitions."""
        if metric.rate is not None:
            rates = [metric.rate(item, self._limits) or 0.0 for item in self.repetitions]
            return lambda picks: stats.mean([rates[place] for place in picks])
        pooled = self._pooled.get(metric.name)
        if pooled is None:
            pooled = self._pooled[metric.name] = Pooled([self.times(metric, item) for item in self.repetitions])
        return lambda picks: pooled.quantile(share, picks)

    def estimate(self, metric: Metric, share: float = 0.5) -> Estimate:
        """The metric's quantile (or mean rate), with its interval."""
        return stats.estimate(len(self), self.statistic(metric, share))


def cell(run: Run, arm: str, level: Level) -> Cell:
    """The cell of an arm that has repetitions at the level."""
    return Cell(run.cell(arm, level), run.head["limits"])


@dataclass(frozen=True)
class Overhead:
    """What `b` costs compared with `a`, both as measured. `percent` is positive if b is slower."""

    metric: Metric
    quantile: str
    """p50, p90, p99; empty for rates."""
    a: float
    b: float
    percent: Estimate
    added: Estimate
    """b less a, in the metric's unit."""

    @property
    def noise(self) -> bool:
        """Whether the interval includes no difference."""
        return self.percent.holds(0.0)


def overheads(a: Cell, b: Cell, *, paired: bool) -> list[Overhead]:
    """The overheads of every metric that both have."""
    found = []
    for metric in METRICS:
        if not (a.has(metric) and b.has(metric)):
            continue
        for name, share in SHARES.items() if metric.rate is None else (("", 0.5),):
            one, two = a.statistic(metric, share), b.statistic(metric, share)
            everything = one(range(len(a))), two(range(len(b)))
            if everything[0] <= 0:
                continue  # There is no percentage of zero.

            def added(
                x: Sequence[int],
                y: Sequence[int],
                one: Callable[[Sequence[int]], float] = one,
                two: Callable[[Sequence[int]], float] = two,
            ) -> float:
                return two(y) - one(x)

            counts = len(a), len(b)
            found.append(
                Overhead(
                    metric,
                    name,
                    *everything,
                    _percent(counts, one, two, paired=paired, inverse=metric.more_is_better),
                    stats.difference(counts, added, paired=paired),
                )
            )
    return found


def _percent(
    counts: tuple[int, int],
    one: Callable[[Sequence[int]], float],
    two: Callable[[Sequence[int]], float],
    *,
    paired: bool,
    inverse: bool,
) -> Estimate:
    """Computed from the ratio's logarithm, so that no interval includes a negative time."""

    def percent(ratio: float) -> float:
        return 100 * (1 - ratio if inverse else ratio - 1)

    try:
        found = stats.difference(counts, lambda x, y: math.log(two(y) / one(x)), paired=paired)
    except (ValueError, ZeroDivisionError):
        # A rate or a gap of zero has no logarithm, so the plain difference is used.
        base = one(range(counts[0]))
        return stats.difference(counts, lambda x, y: percent(1 + (two(y) - one(x)) / base), paired=paired)
    # An interval beyond a factor of a thousand carries no information, so it is clamped.
    ends = [percent(math.exp(max(-7.0, min(7.0, value)))) for value in (found.low, found.high)]
    return Estimate(percent(math.exp(found.value)), min(ends), max(ends))


def table(run: Run) -> str:
    """The run as text: each arm and level, p50, p90 and p99 with 95 % intervals."""
    lines = [f"{run.label}: {run.head['machine']['name']}" + (" - model, not measurement" if run.is_model else "")]
    lines.append(f"{'level':>10} {'arm':<18} {'metric':<12} {'p50 [95 %]':>28} {'p90 [95 %]':>28} {'p99 [95 %]':>28}")
    for level, arm in itertools.product(run.levels, run.arms):
        here = cell(run, arm, level)
        for metric in METRICS:
            if not here.has(metric):
                continue
            shares = SHARES.values() if metric.rate is None else (0.5,)
            columns = " ".join(f"{here.estimate(metric, share)!s:>28}" for share in shares)
            lines.append(f"{level!s:>10} {arm:<18} {metric.name:<12} {columns} {metric.unit}")
        if here.repetitions[0].gateway_cpu_s is not None:
            lines.append(f"{level!s:>10} {arm:<18} {_cpu(here.repetitions)}")
    return "\n".join(lines)


def _cpu(repetitions: Sequence[Repetition]) -> str:
    cpu = sum(item.gateway_cpu_s or 0.0 for item in repetitions)
    requests = [request for item in repetitions for request in item.requests if not request.error]
    chunks = sum(len(request.gaps_s) + 1 for request in requests)
    if not requests:
        return "gateway CPU: no answers"
    return f"gateway CPU  {cpu / len(requests) * 1e3:.2f} ms per request, {cpu / chunks * 1e6:.0f} us per chunk"


def agreement(run: Run) -> str:
    """Our own client compared with vllm bench serve on the same way, if the run has both."""
    lines = []
    for theirs, ours in CHECKS:
        if {theirs, ours} <= set(run.arms):
            for level in run.levels:
                found = overheads(cell(run, theirs, level), cell(run, ours, level), paired=True)
                parts = [
                    f"{item.metric.name} {item.percent.value:+.1f} % "
                    f"[{item.percent.low:+.1f}, {item.percent.high:+.1f}]"
                    for item in found
                    if item.quantile in ("p50", "")
                ]
                lines.append(f"own client against vllm bench serve ({ours}, {theirs}), {level}: {', '.join(parts)}\n")
    return "".join(lines)
