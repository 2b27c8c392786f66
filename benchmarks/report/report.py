"""The comparison as one self-contained HTML file: its plots are inline SVG, made by matplotlib."""

import io
import json
from collections.abc import Callable, Sequence
from html import escape

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from adytum.benchmarks.report.pairs import NOISE, Pair
from adytum.benchmarks.report.summary import METRICS, SHARES, Metric, Overhead
from adytum.benchmarks.runfile import stats
from adytum.benchmarks.runfile.runfile import MODEL_NOTE, Level, Run

# Okabe and Ito's palette, which colour-blind people can tell apart.
_A, _B, _QUIET = "#0072B2", "#D55E00", "#8a8f98"
_BY_NAME = {metric.name: metric for metric in METRICS}
_STYLE = """
:root { --ink: #1c1f24; --dim: #5b626d; --line: #dde1e6; --a: #0072B2; --b: #D55E00; --soft: #f6f7f9; }
* { box-sizing: border-box; }
body { margin: 0; color: var(--ink); background: #fff; font: 15px/1.5 system-ui, "DejaVu Sans", sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 36px 28px 64px; }
h1 { font-size: 27px; margin: 0 0 4px; letter-spacing: -.01em; } h2 { font-size: 19px; margin: 44px 0 6px; }
h3 { font-size: 15px; margin: 26px 0 4px; }
p { margin: 6px 0 12px; max-width: 76ch; } .dim { color: var(--dim); }
.model { background: #7a2e00; color: #fff; padding: 12px 18px; border-radius: 8px; font-weight: 600; margin: 0 0 22px; }
.cards { display: flex; flex-wrap: wrap; gap: 12px; margin: 18px 0 8px; }
.card { border: 1px solid var(--line); border-radius: 10px; padding: 12px 16px; min-width: 200px; flex: 1; }
.card b { display: block; font-size: 25px; font-variant-numeric: tabular-nums; letter-spacing: -.01em; }
.card span { color: var(--dim); font-size: 13px; } .card .noise { margin-left: 6px; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: 13.5px; }
th { text-align: right; color: var(--dim); font-weight: 600; border-bottom: 2px solid var(--line); padding: 5px 8px; }
td { text-align: right; padding: 4px 8px; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
tr.level td { background: var(--soft); font-weight: 600; text-align: left; }
.noise { color: var(--dim); background: #eceef1; border-radius: 9px; padding: 1px 8px; font-size: 12px;
         white-space: nowrap; }
.plots { display: grid; grid-template-columns: 1fr 1fr; gap: 8px 20px; } .plots figure.wide { grid-column: 1 / -1; }
figure { margin: 10px 0; } figure svg { width: 100%; height: auto; display: block; }
figcaption { color: var(--dim); font-size: 13px; }
.key { font-weight: 600; } .key.a { color: var(--a); } .key.b { color: var(--b); }
details { border: 1px solid var(--line); border-radius: 8px; padding: 8px 14px; margin: 8px 0; }
summary { cursor: pointer; font-weight: 600; } pre { white-space: pre-wrap; word-break: break-word; font-size: 12px; }
@media (max-width: 800px) { .plots { grid-template-columns: 1fr; } }
"""


def page(pairs: Sequence[Pair]) -> str:
    """The report."""
    a, b = pairs[0].a.run, pairs[0].b.run
    names = (
        f"{pairs[0].a.name} and {pairs[0].b.name}" if len(pairs) == 1 or a is not b else f"{pairs[0].a.name} and others"
    )
    load = a.head["load"]
    banner = (
        f'<p class="model">{MODEL_NOTE}: these times were computed, no such hardware ran.</p>' if b.is_model else ""
    )
    lengths = f"{load['prompt_tokens']} tokens in" + (
        f", {load['output_tokens']} out" if load["task"] == "chat" else ""
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(names)}</title><style>{_STYLE}</style></head><body><main>"
        f"{banner}<h1>What {escape(pairs[0].b.name)} costs beside {escape(pairs[0].a.name)}</h1>"
        f'<p class="dim">{escape(load["model"])}, {escape(load["task"])}, {lengths}, '
        f"{load['repetitions']} repetitions of each load, alternated within a run; warm-up dropped. "
        f"{escape(a.head['machine']['name'])}, {escape(a.head['began'][:10])}.</p>"
        + "".join(_section(pair, place) for place, pair in enumerate(pairs))
        + _method(pairs)
        + "<h2>The runs</h2>"
        + "".join(_facts(run) for run in ([a] if a is b else [a, b]))
        + "</main></body></html>\n"
    )


def _section(pair: Pair, place: int) -> str:
    found = {level: pair.overheads(level) for level in pair.levels}
    plots = [
        _plot("Throughput and latency", "Each point is a load; right and down is better.", _curve, pair, found, place),
        _plot(
            "Overhead against load", "Bars are 95 % intervals; grey points are within noise.", _load, pair, found, place
        ),
        _plot(
            "Time to first token",
            "Share of requests answered within; all repetitions.",
            _ttft,
            pair,
            found,
            place,
            wide=True,
        ),
    ]
    heading = escape(pair.title)
    key = (
        f'<p><span class="key a">&#9679; {escape(pair.a.name)}</span> &nbsp; '
        f'<span class="key b">&#9679; {escape(pair.b.name)}</span></p>'
    )
    return f'<h2>{heading}</h2>{_cards(found)}{key}<div class="plots">{"".join(plots)}</div>{_table(pair, found)}'


def _cards(found: dict[Level, list[Overhead]]) -> str:
    cards = []
    for level, items in found.items():
        by_name = {(item.metric.name, item.quantile): item for item in items}
        step = by_name.get(("TPOT", "p50")) or by_name.get(("end-to-end", "p50"))
        rate = by_name.get(("throughput", "")) or by_name.get(("requests", ""))
        if step is None or rate is None:
            continue
        what = "per decode step" if step.metric.name == "TPOT" else "per request"
        cards.append(
            f'<div class="card"><span>{escape(str(level))}</span><b>{step.added.value:+.2f} ms</b>'
            f"<span>{what} [{step.added.low:+.2f}, {step.added.high:+.2f}]{_noise(step)}<br>"
            f"throughput {-rate.percent.value:+.1f} % [{-rate.percent.high:+.1f}, {-rate.percent.low:+.1f}]"
            f"{_noise(rate)}</span></div>"
        )
    return f'<div class="cards">{"".join(cards)}</div>'


def _noise(item: Overhead) -> str:
    return f'<span class="noise">{NOISE}</span>' if item.noise else ""


_Draw = Callable[[Figure, Pair, dict[Level, list[Overhead]]], None]


def _plot(
    title: str,
    says: str,
    draw: _Draw,
    pair: Pair,
    found: dict[Level, list[Overhead]],
    place: int,
    *,
    wide: bool = False,
) -> str:
    with mpl.rc_context(
        {
            "svg.fonttype": "none",
            # Two plots of a page must not share the names of their parts.
            "svg.hashsalt": f"{place} {title}",
            "font.family": "sans-serif",
            "font.size": 10,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.edgecolor": _QUIET,
            "axes.grid": True,
            "grid.color": "#e8eaee",
            "axes.axisbelow": True,
        }
    ):
        rows = -(-len(found) // 3) if wide else 1
        figure = Figure(figsize=(10.4, 2.7 * rows) if wide else (5.1, 3.5), layout="constrained")
        draw(figure, pair, found)
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Creator": None, "Date": None, "Format": None, "Type": None})
    svg = out.getvalue()
    svg = svg[svg.index("<svg") :].replace("<svg", f'<svg role="img" aria-label="{escape(title)}"', 1)
    return (
        f'<figure class="{"wide" if wide else ""}"><h3>{escape(title)}</h3>{svg}'
        f"<figcaption>{escape(says)}</figcaption></figure>"
    )


def _latency(pair: Pair, level: Level) -> Metric:
    """The latency that is shown beside throughput: TPOT if answers have tokens, else the whole time."""
    a, b = pair.cells(level)
    tpot = _BY_NAME["TPOT"]
    return tpot if a.has(tpot) and b.has(tpot) else _BY_NAME["end-to-end"]


def _curve(figure: Figure, pair: Pair, found: dict[Level, list[Overhead]]) -> None:
    axes = figure.add_subplot()
    metric = _latency(pair, next(iter(found)))
    rate = _BY_NAME["throughput" if metric.name == "TPOT" else "requests"]
    for place, colour in enumerate((_A, _B)):
        cells = [pair.cells(level)[place] for level in found]
        x = [cell.estimate(rate).value for cell in cells]
        y = [cell.estimate(metric) for cell in cells]
        reach = [value.high - value.value for value in y]
        for kind in dict.fromkeys(level.kind for level in found):  # Clients at once and rates are two curves.
            part = [at for at, level in enumerate(found) if level.kind == kind]
            axes.errorbar(
                [x[at] for at in part],
                [y[at].value for at in part],
                yerr=[reach[at] for at in part],
                color=colour,
                marker="o",
                ms=4.5,
                lw=1.6,
                ls="-" if kind == "closed" else "--",
                capsize=2.5,
            )
        for level, across, up in zip(found, x, y, strict=True):
            if place == 0:
                label = f"{level.value:g}" + ("" if level.kind == "closed" else "/s")
                axes.annotate(label, (across, up.value), (4, -11), textcoords="offset points", color=_QUIET, size=9)
    axes.set_xlabel(f"{rate.name} ({rate.unit})")
    axes.set_ylabel(f"{metric.name} p50 (ms)")
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)


def _load(figure: Figure, pair: Pair, found: dict[Level, list[Overhead]]) -> None:
    axes = figure.add_subplot()
    wanted = [("throughput", "", "s"), ("requests", "", "s"), ("TPOT", "p50", "o"), ("TTFT", "p50", "^")]
    have = {(item.metric.name, item.quantile) for items in found.values() for item in items}
    if ("throughput", "") in have:
        wanted.remove(("requests", "", "s"))
    wanted = [item for item in wanted if item[:2] in have]
    for place, (name, quantile, marker) in enumerate(wanted):
        axes.plot([], [], color=_B, marker=marker, ls="", label=f"{name} {quantile}".strip())
        for at, items in enumerate(found.values()):
            for item in items:
                if (item.metric.name, item.quantile) == (name, quantile):
                    axes.errorbar(
                        at + 0.17 * (place - (len(wanted) - 1) / 2),
                        item.percent.value,
                        yerr=[[item.percent.value - item.percent.low], [item.percent.high - item.percent.value]],
                        color=_QUIET if item.noise else _B,
                        marker=marker,
                        ms=5.5,
                        capsize=3,
                    )
    axes.axhline(0, color=_QUIET, lw=1)
    axes.set_xticks(range(len(found)), [str(level) for level in found])
    axes.set_ylabel("overhead (%)")
    # A huge interval would flatten all others.
    low, high = axes.get_ylim()
    axes.set_ylim(max(low, -110), min(high, 200))
    axes.legend(frameon=False, fontsize=9, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0))


def _ttft(figure: Figure, pair: Pair, found: dict[Level, list[Overhead]]) -> None:
    columns = min(3, len(found))
    grid = figure.subplots(-(-len(found) // columns), columns, squeeze=False)
    metric = _BY_NAME["TTFT"]
    places: list[Axes] = list(grid.flat)
    for axes, level in zip(places, found, strict=False):
        ends = []
        for cell, colour in zip(pair.cells(level), (_A, _B), strict=True):
            shown = metric if cell.has(metric) else _BY_NAME["end-to-end"]
            values = sorted(time for item in cell.repetitions for time in cell.times(shown, item))
            if values:
                axes.step(
                    values, [(n + 1) / len(values) for n in range(len(values))], where="post", color=colour, lw=1.6
                )
                ends.append(stats.quantile(values, 0.99))
        axes.set_title(str(level), size=10, loc="left")
        axes.set_xlim(0, 1.15 * max(ends, default=1.0))
        axes.set_ylim(0, 1.02)
        axes.set_xlabel("ms")
    for axes in places[len(found) :]:
        axes.set_visible(False)


def _table(pair: Pair, found: dict[Level, list[Overhead]]) -> str:
    rows = []
    for level, items in found.items():
        rows.append(f'<tr class="level"><td colspan="6">{escape(str(level))}</td></tr>')
        for item in items:
            rows.append(
                f"<tr><td>{item.metric.name} {item.quantile}</td><td>{item.a:,.4g}</td><td>{item.b:,.4g}</td>"
                f"<td>{item.percent.value:+.1f} % [{item.percent.low:+.1f}, {item.percent.high:+.1f}]</td>"
                f"<td>{item.added.value:+.3g} [{item.added.low:+.3g}, {item.added.high:+.3g}] "
                f"{item.metric.unit}</td><td>{_noise(item)}</td></tr>"
            )
    return (
        f"<h3>Every metric</h3><table><thead><tr><th>metric</th><th>{escape(pair.a.name)}</th>"
        f"<th>{escape(pair.b.name)}</th><th>overhead [95 %]</th><th>added [95 %]</th><th></th></tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table>"
    )


def _method(pairs: Sequence[Pair]) -> str:
    paired = "neighbouring repetitions of one run" if pairs[0].paired else "two runs, taken as independent"
    return (
        "<h2>How to read this</h2><p>Overhead is positive if the second side is slower: longer times, or less "
        f"throughput. {', '.join(SHARES)} are over all requests of all repetitions. Intervals are 95 %: the standard "
        f"error from resampling whole repetitions, times Student's t; here of {paired}. "
        f'A difference whose interval contains 0 is marked <span class="noise">{NOISE}</span>: this run cannot '
        "distinguish it from no difference. TPOT is the time per output token after the first; while every stream gets "
        "one token per step, its increase is the tax per decode step. Inter-chunk times are between events as they "
        "arrived.</p>"
    )


def _facts(run: Run) -> str:
    head = escape(json.dumps(run.head, indent=1, ensure_ascii=False))
    name, began = escape(run.head["machine"]["name"]), escape(run.head["began"])
    return f"<details><summary>{escape(run.label)}: {name}, began {began}</summary><pre>{head}</pre></details>"
