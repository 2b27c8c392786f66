"""Known overheads are found, noise is called noise, unlike runs are refused, and the report needs nothing else."""

import copy
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from adytum.benchmarks.__main__ import main
from adytum.benchmarks.errors import Unusable
from adytum.benchmarks.report import compare, summary
from adytum.benchmarks.report.summary import Overhead
from adytum.benchmarks.runfile import runfile
from adytum.benchmarks.runfile.runfile import Run
from tests.unit.benchmarks.support import LEVELS, composed

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def off() -> Run:
    return composed("cc-off", step_ms=10.0, seed=1)


@pytest.fixture(scope="module")
def on() -> Run:
    return composed("cc-on", step_ms=11.0, ttft_ms=48.0, seed=2)


def of(found: list[Overhead], name: str, quantile: str = "p50") -> Overhead:
    return next(item for item in found if (item.metric.name, item.quantile) == (name, quantile))


def test_a_known_overhead(off: Run, on: Run) -> None:
    for pair in compare.between(off, on):
        for level in LEVELS:
            found = pair.overheads(level)
            step, first, good = of(found, "TPOT"), of(found, "TTFT"), of(found, "goodput", "")
            assert step.percent.holds(10.0)
            assert step.added.holds(1.0)
            assert first.percent.holds(20.0)
            assert not step.noise
            assert not first.noise
            # 21 tokens in 240 ms, then in 268; and of 48 ms few first tokens are within 45.
            assert of(found, "throughput", "").percent.holds(100 * (1 - 240 / 268))
            assert good.percent.value > 90
    assert "tax per decode step, 8 at once: +1.0" in compare.table(compare.between(off, on)[:1])


def test_noise_is_called_noise(off: Run) -> None:
    again = composed("cc-on", step_ms=10.0, seed=3)
    for pair in compare.between(off, again):
        for level in LEVELS:
            found = pair.overheads(level)
            assert all(of(found, name).noise for name in ("TPOT", "TTFT", "end-to-end"))
    assert compare.NOISE in compare.table(compare.between(off, again))


def test_arms_of_one_run_are_paired(off: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run.json"
    off.save(path)
    assert main(["compare", str(path), "--base", "direct"]) == 0
    assert "ohttp against direct" in capsys.readouterr().out
    assert main(["compare", str(path), "--base", "nothing"]) == 2
    assert main(["compare", str(path)]) == 2
    assert main(["compare", str(path), str(tmp_path / "none.json")]) == 2


@pytest.mark.parametrize(
    ("where", "value", "says"),
    [
        (("load", "prompt_tokens"), 64, "load: prompt_tokens: 128 against 64"),
        (("load", "seed"), 2, "load: seed"),
        (("models", 0, "lock_sha256", "value"), "01", "model"),
        (("engine_flags", "value"), ["--enforce-eager"], "engine flags"),
        (("software", "engine", "vllm"), "0.29.0", "versions of the engine"),
        (("kind",), runfile.MODEL_NOTE, "kind"),
    ],
)
def test_unlike_runs_are_refused(off: Run, on: Run, where: tuple[Any, ...], value: Any, says: str) -> None:
    head = copy.deepcopy(on.head)
    inner: Any = head
    for key in where[:-1]:
        inner = inner[key]
    inner[where[-1]] = value
    with pytest.raises(Unusable, match=says):
        compare.between(off, Run(head, on.repetitions))


def test_other_levels_are_refused(off: Run, on: Run) -> None:
    fewer = Run(on.head, tuple(item for item in on.repetitions if item.level == LEVELS[0]))
    with pytest.raises(Unusable, match="levels: 1 at once, 8 at once against 1 at once"):
        compare.between(off, fewer)


@pytest.mark.parametrize("name", ["run.json", "run.json.gz"])
def test_a_run_file_comes_back_as_it_was(on: Run, tmp_path: Path, name: str) -> None:
    path = tmp_path / "folder" / name
    on.save(path)
    again = runfile.load(path)
    assert again.head == on.head
    assert len(again.repetitions) == len(on.repetitions)
    assert again.repetitions[5].requests[3].ttft_s == pytest.approx(on.repetitions[5].requests[3].ttft_s, abs=1e-6)
    summary.table(again)


@pytest.mark.parametrize("kept", [0, 10, 200])
def test_a_file_that_was_cut_is_told(on: Run, tmp_path: Path, kept: int) -> None:
    path = tmp_path / "run.json.gz"
    on.save(path)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(Unusable, match=r"run\.json\.gz"):
        runfile.load(path)


@pytest.mark.parametrize("name", ["machine", "label", "repetitions", "software"])
def test_a_file_without_its_facts_is_no_run(on: Run, tmp_path: Path, name: str) -> None:
    path = tmp_path / "run.json"
    on.save(path)
    content = json.loads(path.read_text())
    del content[name]
    path.write_text(json.dumps(content))
    with pytest.raises(Unusable, match=name):
        runfile.load(path)


def test_null_takes_a_reason(on: Run, tmp_path: Path) -> None:
    head = copy.deepcopy(on.head)
    head["machine"]["kernel"] = {"value": None}
    with pytest.raises(Unusable, match="machine/kernel"):
        Run(head, on.repetitions).save(tmp_path / "run.json")
    assert not (tmp_path / "run.json").exists()


class _Links(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.found += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "srcset", "data")]


def test_the_report_stands_alone(off: Run, on: Run, tmp_path: Path) -> None:
    for run, name in ((off, "off"), (on, "on")):
        run.save(tmp_path / f"{name}.json")
    out = tmp_path / "report.html"
    assert main(["compare", str(tmp_path / "off.json"), str(tmp_path / "on.json"), "--html", str(out)]) == 0
    text = out.read_text()
    links = _Links()
    links.feed(text)
    assert links.tags.count("svg") == 6  # Two arms of three plots.
    assert not {"script", "link", "img", "iframe", "b>"} & set(links.tags)
    assert all(link.startswith("#") for link in links.found)
    assert not re.search(r"url\((?!#)|@import", text)
    # What a file says of itself is text.
    assert "a machine of a test <b>" not in text
    assert compare.NOISE in text
    assert runfile.MODEL_NOTE not in text


def test_kept_results_are_runs() -> None:
    kept = sorted((ROOT / "benchmarks" / "results").glob("*.json*"))
    assert kept
    for path in kept:
        found = runfile.load(path)
        assert path.stat().st_size < 1 << 20
        assert not any(request.error for item in found.repetitions for request in item.requests)
        assert len({item.index for item in found.repetitions}) >= 3
