"""Each row of SECURITY.md's threat table names tests that exist, or says plainly that there is none."""

import ast
import re
from functools import cache

import pytest

from tests.support import ROOT

_TEST = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")
_UNTESTED = "not tested: "


def rows(text: str) -> list[list[str]]:
    """The cells of each row of the threat tables: tables whose head is threat, what stands against it, test."""
    found, inside = [], False
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")] if line.startswith("|") else []
        if cells[:1] == ["threat"]:
            assert cells == ["threat", "what stands against it", "test"]
            inside = True
        elif not cells:
            inside = False
        elif inside and set(cells[0]) != {"-"}:
            found.append(cells)
    return found


@cache
def functions(path: str) -> set[str]:
    """The names of a file's test functions."""
    tree = ast.parse((ROOT / path).read_text())
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}


def fault(cells: list[str]) -> str | None:
    """What is wrong with a row."""
    if len(cells) != 3:
        return "three cells"
    cell = cells[2]
    if cell.startswith(_UNTESTED) and len(cell) > len(_UNTESTED):
        return None
    named = _TEST.findall(cell)
    if not named or _TEST.sub("", cell).replace(",", "").strip():
        return "only tests, as `file::test`"
    for path, name in named:
        if not (ROOT / path).is_file() or name not in functions(path):
            return f"no such test: {path}::{name}"
    return None


THREATS = rows((ROOT / "SECURITY.md").read_text())


def test_there_is_a_table() -> None:
    assert len(THREATS) >= 40


@pytest.mark.parametrize("cells", THREATS, ids=[cells[0] for cells in THREATS])
def test_each_threat_has_its_test(cells: list[str]) -> None:
    assert fault(cells) is None


@pytest.mark.parametrize(
    "cell",
    [
        "",
        "not tested: ",
        "`tests/house/test_security.py`",
        "`tests/house/test_security.py::test_that_is_not_there`",
        "`tests/nowhere.py::test_there_is_a_table`",
        "`tests/house/test_security.py::test_there_is_a_table` and more",
    ],
)
def test_a_row_without_a_test_is_a_fault(cell: str) -> None:
    assert fault(["threat", "defence", cell]) is not None
