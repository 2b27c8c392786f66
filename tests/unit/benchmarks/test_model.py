"""The modelled arm: beside the published tables, and whether the synthetic engine takes the time that it was told."""

from pathlib import Path

import pytest

from adytum.benchmarks.__main__ import main
from adytum.benchmarks.cc import costs
from adytum.benchmarks.cc.costs import LAUNCHES_PER_STEP, MIDDLE, PUBLISHED
from adytum.benchmarks.errors import Unusable
from adytum.benchmarks.report import compare
from adytum.benchmarks.runfile import runfile

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[3]


def test_the_error_of_each_published_row() -> None:
    errors = {(item.row.work, item.row.load): item.points for item in costs.errors()}
    assert len(errors) == len(PUBLISHED) == 17
    known = {load: points for (_, load), points in errors.items() if points is not None}
    assert len([points for points in errors.values() if points is None]) == 2
    # Nothing is fitted, so these are what they are; a change of the model has to show here and in the README.
    assert sum(abs(points) for points in errors.values() if points is not None) / 15 == pytest.approx(3.8, abs=0.05)
    assert errors["ISPASS'25 artifact", "batch 128"] == pytest.approx(1.4, abs=0.1)
    assert errors["Gemma-2-27B, H200", "saturated"] == pytest.approx(-13.2, abs=0.1)
    assert known["concurrency 1"] == pytest.approx(-4.3, abs=0.1)


def test_the_readme_has_the_table() -> None:
    assert costs.table() in (ROOT / "benchmarks" / "README.md").read_text()


def test_transfers_give_a_tax() -> None:
    def transfers(copy: float, launch: float, rate: float) -> dict[str, object]:
        copies = [{"direction": "host to device", "gb_s": rate}, {"direction": "device to host", "gb_s": 99.0}]
        return {"small_copy_us": {"p50": copy}, "launch_us": {"p50": launch}, "copies": copies}

    tax = costs.from_transfers(transfers(2, 5, 40), transfers(24, 10, 3.8))
    # The published costs of one copy and one launch give the published tax of a step.
    assert tax.step_ms == pytest.approx(MIDDLE.step_ms, abs=0.01)
    assert tax.byte_ns == pytest.approx(MIDDLE.byte_ns)
    slower = costs.from_transfers(transfers(2, 5, 40), transfers(24, 15, 3.8))
    assert slower.step_ms - tax.step_ms == pytest.approx(LAUNCHES_PER_STEP * 5 / 1000)


def test_the_synthetic_engine_takes_its_time(tmp_path: Path) -> None:
    arguments = ["--workload", "gemma-2-27b", "--concurrency", "1", "4", "--tokens", "12", "--rounds", "1"]
    assert main(["model", *arguments, "--out", str(tmp_path)]) == 0
    off, on = runfile.load(tmp_path / "off.json"), runfile.load(tmp_path / "on.json")
    assert off.is_model
    assert "model, not measurement" in on.head["machine"]["name"]
    (pair,) = compare.between(off, on)
    assert "model, not measurement" in compare.table([pair])
    for level in pair.levels:
        step = next(item for item in pair.overheads(level) if (item.metric.name, item.quantile) == ("TPOT", "p50"))
        wanted = costs.WORKLOADS["gemma-2-27b"].step_ms(round(level.value))
        # A machine under load is late, never early.
        assert wanted * 0.99 <= step.a < wanted + 8
        assert step.b >= (wanted + MIDDLE.step_ms) * 0.99


def test_what_are_no_transfers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "transfer.json"
    path.write_text("{}")
    assert main(["model", "--transfers", str(path), str(path), "--out", str(tmp_path)]) == 2
    assert "not a file of transfers" in capsys.readouterr().err
    with pytest.raises(Unusable, match="not a file of transfers"):
        ccmodel_load(tmp_path / "nothing.json")


def ccmodel_load(path: Path) -> object:
    from adytum.benchmarks.cc import transfer

    return transfer.load(path)
