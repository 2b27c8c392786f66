"""The log's two forms, and what stands in them: constant texts, and named values from one list."""

import ast
import json
import logging
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from adytum.inference.core.logs import FIELDS, Form, Json, Text, configure
from tests.support import ROOT, config_text

CANARY = "canary-92ab4e"
_VALUE = re.compile(r"%(?:\((\w+)\)s|(.?))")
_LEVELS = {"debug", "info", "warning", "error", "critical", "exception", "log"}


def faults(source: str) -> Iterator[str]:
    """What of the calls of `_log` is not a constant text with values by name, all of them listed."""
    for node in ast.walk(ast.parse(source)):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
            continue
        if ast.unparse(node.func.value) != "_log" or node.func.attr not in _LEVELS:
            continue
        call, arguments = ast.unparse(node), node.args[1 if node.func.attr == "log" else 0 :]
        if node.func.attr == "exception" or node.keywords:
            yield f"a traceback or more: {call}"
        if not arguments or not isinstance(arguments[0], ast.Constant):
            yield f"no constant text: {call}"
            continue
        placed = _VALUE.findall(str(arguments[0].value))
        given: set[str] = set()
        if len(arguments) > 2 or (len(arguments) == 2 and not isinstance(arguments[1], ast.Dict)):
            yield f"values without names: {call}"
        elif len(arguments) == 2 and isinstance(arguments[1], ast.Dict):
            given = {ast.unparse(key).strip("'") if key else "" for key in arguments[1].keys}
        if any(other for _, other in placed) or {name for name, _ in placed} != given:
            yield f"names and values differ: {call}"
        if not given <= FIELDS:
            yield f"not in FIELDS: {call}"


def sources() -> list[Path]:
    """The backend's; the client's log is on the client's own machine."""
    return [path for path in (ROOT / "inference").rglob("*.py") if "client" not in path.relative_to(ROOT).parts]


def test_every_call_is_a_constant_text_with_listed_names() -> None:
    texts = [path.read_text() for path in sources() if path.name != "process.py"]  # There `_log` is an engine's file.
    assert sum(text.count("_log.") for text in texts) > 15
    assert [fault for text in texts for fault in faults(text)] == []


@pytest.mark.parametrize(
    "call",
    [
        "_log.info(text)",
        "_log.info(f'{prompt}')",
        "_log.info('said %s', prompt)",
        "_log.info('%(model)s', {'prompt': 1})",
        "_log.info('%(prompt)s', {'prompt': 1})",
        "_log.error('failed', exc_info=True)",
        "_log.exception('failed')",
        "_log.log(level, '%(model)s', values)",
        "_log.warning('%(model)s said %d', {'model': 1})",
    ],
)
def test_another_call_is_found(call: str) -> None:
    assert list(faults(call))


def test_no_logger_goes_by_another_name() -> None:
    """Else the calls above would not be all."""
    for path in sources():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and node.attr == "getLogger" and path.name not in ("logs.py", "main.py"):
                assert '_log = logging.getLogger("adytum' in path.read_text(), path


def record(
    name: str, text: str, values: dict[str, object] | None = None, error: BaseException | None = None
) -> logging.LogRecord:
    info = (type(error), error, error.__traceback__) if error is not None else None
    return logging.LogRecord(name, logging.ERROR, "/somewhere/part.py", 7, text, (values,) if values else (), info)


@pytest.mark.parametrize("form", [Text(), Json()])
def test_what_is_not_ours_keeps_its_place_only(form: logging.Formatter) -> None:
    line = form.format(record("aiohttp.server", f"failed on {CANARY}", None, ValueError(CANARY)))
    assert CANARY not in line
    assert "[part.py:7] ValueError (text withheld)" in line
    assert CANARY not in form.format(record("adytumish", CANARY))
    ours = form.format(record("adytum.x", "failed", None, ValueError(CANARY)))
    assert "failed ValueError" in ours
    assert CANARY not in ours


def test_a_line_of_json() -> None:
    line = Json().format(record("adytum.engine", "%(model)s is down", {"model": "m\n1", "prompt": CANARY}))
    assert "\n" not in line
    found = json.loads(line)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", found.pop("time"))
    assert found == {
        "level": "error",
        "logger": "adytum.engine",
        "message": "m\n1 is down",
        "event": "%(model)s is down",
        "model": "m\n1",
    }


def test_a_line_of_text_is_one_line() -> None:
    line = Text().format(record("adytum", "%(reason)s", {"reason": "a\n2026-01-01T00:00:00+0000 INFO adytum b"}))
    assert line.count("\n  ") == line.count("\n") == 1


@pytest.mark.parametrize("form", ["text", "json"])
def test_configuring_replaces_what_was(form: Form, capsys: pytest.CaptureFixture[str]) -> None:
    root = logging.getLogger()
    before, level = root.handlers[:], root.level
    try:
        configure(form)
        logging.getLogger("adytum.test").info("%(step)s", {"step": "SERVING"})
        logging.getLogger("other").warning(CANARY)
    finally:
        root.handlers[:] = before
        root.setLevel(level)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert CANARY not in lines[1]
    assert (json.loads(lines[0])["step"] if form == "json" else lines[0].split()[-1]) == "SERVING"


@pytest.mark.slow
def test_a_backend_that_cannot_start_says_so_in_json(tmp_path: Path) -> None:
    text = config_text(port=0, runtime=tmp_path, changes={"python": '"/nothing/bin/python"'})
    path = tmp_path / "c.toml"
    path.write_text(text.replace("[server]", '[server]\nlog = "json"'))
    ended = subprocess.run(
        [sys.executable, "-m", "adytum.inference", "serve", "--config", str(path)],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert ended.returncode == 1
    lines = [json.loads(line) for line in ended.stderr.splitlines()]
    assert (lines[-1]["step"], lines[-1]["level"]) == ("PREFLIGHT", "error")
    assert "/nothing/bin/python" in lines[-1]["reason"]
