"""A comparison: two sides, each an arm of a run, level by level."""

from dataclasses import dataclass

from adytum.benchmarks.errors import Unusable
from adytum.benchmarks.report import summary
from adytum.benchmarks.report.summary import Cell, Overhead
from adytum.benchmarks.runfile import runfile
from adytum.benchmarks.runfile.runfile import Level, Run

NOISE = "within noise"


@dataclass(frozen=True)
class Side:
    """One side of a comparison: an arm of a run."""

    run: Run
    arm: str
    name: str


@dataclass(frozen=True)
class Pair:
    """Two sides, compared at every level that both have."""

    title: str
    a: Side
    b: Side
    paired: bool

    @property
    def levels(self) -> list[Level]:
        ours = {item.level for item in self.a.run.repetitions if item.arm == self.a.arm}
        theirs = {item.level for item in self.b.run.repetitions if item.arm == self.b.arm}
        return sorted(ours & theirs)

    def cells(self, level: Level) -> tuple[Cell, Cell]:
        """The cells of both sides."""
        return summary.cell(self.a.run, self.a.arm, level), summary.cell(self.b.run, self.b.arm, level)

    def overheads(self, level: Level) -> list[Overhead]:
        """Every metric that both have at the level."""
        return summary.overheads(*self.cells(level), paired=self.paired)


def between(a: Run, b: Run) -> list[Pair]:
    """A pair for every arm that both runs have. Raises `Unusable` with the differences."""
    if found := list(runfile.differences(a, b)):
        raise Unusable("these runs cannot be compared:\n  " + "\n  ".join(found))
    names = _names(a, b)
    return [
        Pair(f"arm {arm}: {names[0]} and {names[1]}", Side(a, arm, names[0]), Side(b, arm, names[1]), paired=False)
        for arm in a.arms
        if arm in b.arms
    ]


def _names(a: Run, b: Run) -> tuple[str, str]:
    return (a.label, b.label) if a.label != b.label else (f"{a.label} (first)", f"{b.label} (second)")


def taxes(pair: Pair) -> list[str]:
    """The tax on each decode step: the median time per output token, second side less first."""
    lines = []
    for level in pair.levels:
        for item in pair.overheads(level):
            if (item.metric.name, item.quantile) == ("TPOT", "p50"):
                value = item.added
                lines.append(
                    f"tax per decode step, {level}: {value.value:+.3f} ms [{value.low:+.3f}, {value.high:+.3f}]"
                    + (f", {NOISE}" if item.noise else "")
                )
    return lines
