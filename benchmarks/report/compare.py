"""Two runs side by side, for example CC-Off and CC-On, or two arms of one run: a table, and a self-contained report.

    python -m adytum.benchmarks compare off.json on.json [--html report.html]
    python -m adytum.benchmarks compare run.json --base direct --against ohttp

An overhead is positive if the second side is slower. Each has a 95 % interval over repetitions. If the interval
contains 0, the difference is within noise, and no conclusion should be drawn from it. Arms of one run are compared in
neighbouring pairs, two runs as independent. Runs that differ in model, load, flags or versions are refused.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from adytum.benchmarks.errors import Unusable
from adytum.benchmarks.report.pairs import NOISE, Pair, Side, between, taxes
from adytum.benchmarks.runfile import runfile
from adytum.benchmarks.runfile.runfile import Run


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `compare`."""
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="two run files, or one with --base")
    parser.add_argument("--base", help="the arm of the one run with which the others are compared")
    parser.add_argument("--against", nargs="+", help="arms of the one run; default: all others")
    parser.add_argument("--html", type=Path, help="write the report here")


def run(options: argparse.Namespace) -> int:
    """Returns exit status 0. Raises `Unusable` if the runs cannot be compared."""
    runs = [runfile.load(path) for path in options.runs]
    pairs = between(*runs) if len(runs) == 2 and options.base is None else _within(runs, options)
    print(table(pairs))
    if options.html is not None:
        # Imported here: the table needs no matplotlib.
        try:
            from adytum.benchmarks.report import report
        except ImportError as error:
            raise Unusable(f"the report needs the `bench` extra ({error}): pip install '.[bench]'") from error
        try:
            options.html.parent.mkdir(parents=True, exist_ok=True)
            options.html.write_text(report.page(pairs))
        except OSError as error:
            raise Unusable(f"{options.html} cannot be written: {error.strerror}") from error
        print(f"report: {options.html}")
    return 0


def _within(runs: Sequence[Run], options: argparse.Namespace) -> list[Pair]:
    if len(runs) != 1 or options.base is None:
        raise Unusable("give two run files, or one and --base with one of its arms")
    run = runs[0]
    against = options.against or [arm for arm in run.arms if arm != options.base]
    missing = [arm for arm in (options.base, *against) if arm not in run.arms]
    if missing or not against:
        raise Unusable(f"the run has no other arm {' '.join(missing)}; it has {', '.join(run.arms)}")
    return [
        Pair(f"{arm} against {options.base}", Side(run, options.base, options.base), Side(run, arm, arm), paired=True)
        for arm in against
    ]


def table(pairs: Sequence[Pair]) -> str:
    """The comparison, for a terminal."""
    lines = []
    for pair in pairs:
        lines.append(f"\n{pair.title}" + (f" - {runfile.MODEL_NOTE}" if pair.b.run.is_model else ""))
        lines.append(
            f"{'level':>10} {'metric':<16} {pair.a.name[:16]:>16} {pair.b.name[:16]:>16} "
            f"{'overhead % [95 %]':>24} {'added [95 %]':>28}"
        )
        for level in pair.levels:
            for item in pair.overheads(level):
                percent = f"{item.percent.value:+.1f} [{item.percent.low:+.1f}, {item.percent.high:+.1f}]"
                added = f"{item.added.value:+.3g} [{item.added.low:+.3g}, {item.added.high:+.3g}] {item.metric.unit}"
                lines.append(
                    f"{level!s:>10} {item.metric.name + ' ' + item.quantile:<16} {item.a:>16.4g} {item.b:>16.4g} "
                    f"{percent:>24} {added:>28}" + (f"  {NOISE}" if item.noise else "")
                )
        lines += [f"  {line}" for line in taxes(pair)]
    return "\n".join(lines)
