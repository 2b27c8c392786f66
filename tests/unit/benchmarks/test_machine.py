"""A run's label is what the GPUs' driver says, or nothing is measured."""

import copy
import struct
from typing import Any

import pytest

from adytum.benchmarks.__main__ import main
from adytum.benchmarks.errors import Unusable
from adytum.benchmarks.runs import machine
from tests.unit.attestation.nvidia import nvml
from tests.unit.attestation.nvidia.authority import Authority
from tests.unit.attestation.nvidia.nvml import Driver

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def authority() -> Authority:
    nvml.load()
    return Authority()


@pytest.fixture(scope="module")
def here() -> dict[str, Any]:
    return machine.facts()


def of(here: dict[str, Any], mode: str, tee: str | None) -> dict[str, Any]:
    changed = copy.deepcopy(here)
    changed["gpu"]["mode"] = mode
    changed["tee"] = machine.known(tee, "not known in this test")
    return changed


@pytest.mark.parametrize(
    ("mode", "tee", "label"),
    [
        ("on", "sev-snp", "cc-on"),
        ("off", "sev-snp", "tee-only"),
        ("off", "azure", "tee-only"),
        ("off", "none", "cc-off"),
        ("no GPU", "none", "no-gpu"),
    ],
)
def test_only_the_true_label_is_taken(here: dict[str, Any], mode: str, tee: str, label: str) -> None:
    found = of(here, mode, tee)
    assert machine.labelled(found, None) == machine.labelled(found, label) == label
    for wrong in set(machine.LABELS) - {label}:
        with pytest.raises(Unusable, match=f"the label is {wrong} and the machine is {label}"):
            machine.labelled(found, wrong)


@pytest.mark.parametrize(
    ("mode", "tee", "says"), [("devtools", "sev-snp", "DevTools"), ("off", None, "is unknown whether")]
)
def test_what_has_no_label(here: dict[str, Any], mode: str, tee: str | None, says: str) -> None:
    for wanted in (None, *machine.LABELS):
        with pytest.raises(Unusable, match=says):
            machine.labelled(of(here, mode, tee), wanted)


@pytest.mark.parametrize(("cc", "devtools", "mode"), [(1, 0, "on"), (0, 0, "off"), (1, 1, "devtools")])
def test_the_mode_is_the_drivers(authority: Authority, cc: int, devtools: int, mode: str) -> None:
    with Driver.of(authority, 2) as driver:
        driver.cc, driver.devtools = cc, devtools
        found = machine.facts()["gpu"]
    assert (found["mode"], found["count"]["value"]) == (mode, 2)
    assert found["products"]["value"] == [nvml.NAME] * 2
    # The stand-in has no clocks: null, with the reason, and no invention.
    assert found["clocks_mhz"]["value"] is None
    assert found["clocks_mhz"]["reason"]


def test_an_unknown_mode_is_no_mode(authority: Authority) -> None:
    with Driver.of(authority) as driver:
        driver.results["settings"] = struct.pack("=4I", 2, 7, 0, 0)
        found = machine.facts()["gpu"]
    assert found["mode"] == machine.NO_GPU
    assert "unknown state" in found["count"]["reason"]


def test_the_command_refuses_before_anything_starts(authority: Authority, capsys: pytest.CaptureFixture[str]) -> None:
    with Driver.of(authority) as driver:
        driver.cc = 0
        assert main(["serve", "--label", "cc-on", "--quick"]) == 2
        assert main(["transfer", "--label", "cc-on"]) == 2
    assert capsys.readouterr().err.count("Nothing was measured") == 2


def test_without_a_gpu_transfers_fail(capsys: pytest.CaptureFixture[str], tmp_path: Any) -> None:
    out = tmp_path / "transfer.json"
    assert main(["transfer", "--out", str(out)]) == 2
    assert "nothing was written" in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--arms", "nothing"], "no arm is called nothing"),
        (["--repetitions", "2"], "at least 3"),
        (["--concurrency", "0"], "greater than 0"),
        (["--rate", "-1"], "greater than 0"),
        (["--model", "unknown"], "no model for chat"),
        (["--config", "/nowhere.toml"], "cannot read"),
    ],
)
def test_bad_options(arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", *arguments]) == 2
    assert says in capsys.readouterr().err
