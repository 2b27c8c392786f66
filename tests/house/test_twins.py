"""The committed synchronous twins are the ones that scripts/unasync.py generates."""

import runpy
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def script() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "scripts" / "unasync.py"))


def test_the_committed_twins_are_the_generated_ones(script: dict[str, Any]) -> None:
    assert script["TWINS"]
    assert script["differing"]() == [], "run: python scripts/unasync.py"


def test_a_change_on_either_side_shows(script: dict[str, Any], tmp_path: Path) -> None:
    for source, target in script["TWINS"].items():
        for name in (source, target):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text((ROOT / name).read_text("utf-8"), "utf-8")
    script["differing"].__globals__["ROOT"] = tmp_path
    assert script["differing"]() == []
    for source, target in script["TWINS"].items():
        for name in (source, target):
            whole = (tmp_path / name).read_text("utf-8")
            (tmp_path / name).write_text(whole + "# more\n", "utf-8")
            assert script["differing"]() == [target]
            (tmp_path / name).write_text(whole, "utf-8")
        (tmp_path / target).unlink()
        assert script["differing"]() == [target]


def test_a_twin_waits_for_nothing(script: dict[str, Any]) -> None:
    for target in script["TWINS"].values():
        text = (ROOT / target).read_text("utf-8").partition("\n")[2]
        assert "async" not in text.lower()
        assert "await" not in text


def test_a_replacement_that_finds_nothing_is_an_error(script: dict[str, Any]) -> None:
    for source in script["TWINS"]:
        script["twin"].__globals__["REPLACEMENTS"] = (*script["REPLACEMENTS"], (r"\bno_such_word\b", ""))
        with pytest.raises(ValueError, match="no_such_word"):
            script["twin"](source)
