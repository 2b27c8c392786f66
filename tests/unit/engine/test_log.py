"""Nothing that an engine says while it serves is written as it came."""

import os
import sys
import time
from pathlib import Path

import pytest

from adytum.inference.engine.run.log import EngineLog, LogFilter

FILES = frozenset((b"serving.py", b"core.py"))
CANARY = b"patient-7731"


@pytest.mark.parametrize(
    ("line", "kept"),
    [
        (
            b"(APIServer pid=7) WARNING 11-23 10:00:00 [serving.py:12] refused " + CANARY,
            b"WARNING 11-23 10:00:00 [serving.py:12] (text withheld)\n",
        ),
        (
            b"ERROR 11-23 10:00:00 [v1/engine/core.py:3] prompt=" + CANARY,
            b"ERROR 11-23 10:00:00 [core.py:3] (text withheld)\n",
        ),
        (b'(EngineCore_DP0 pid=9)   File "/x/vllm/core.py", line 44, in step', b"  at core.py:44\n"),
        (b'ERROR 11-23 10:00:00 [core.py:3]   File "/x/vllm/core.py", line 44, in step', b"  at core.py:44\n"),
        (b"ValueError: cannot read " + CANARY, b"  ValueError (text withheld)\n"),
        (b"torch.OutOfMemoryError: CUDA out of memory", b"  OutOfMemoryError (text withheld)\n"),
    ],
)
def test_places_and_kinds_are_kept(line: bytes, kept: bytes) -> None:
    assert LogFilter(FILES).line(line) == kept


@pytest.mark.parametrize(
    "line",
    [
        CANARY,
        b"INFO 11-23 10:00:00 [serving.py:12] Received request " + CANARY,
        b"WARNING 11-23 10:00:00 [patient7731.py:12] x",
        b"PATIENT 11-23 10:00:00 [serving.py:12] x",
        b'  File "/patient7731.py", line 1, in x',
        b"PatientError: x",
        b"    prompt = " + CANARY,
        b" WARNING 11-23 10:00:00 [serving.py:12] indented as content may be",
        b"",
        b"\xff\xfe" + CANARY,
        CANARY * 100_000,
    ],
)
def test_everything_else_is_withheld(line: bytes) -> None:
    assert LogFilter(FILES).line(line) == b""


def test_what_is_withheld_is_counted_and_a_flood_is_bounded() -> None:
    now = [0.0]
    filtered = LogFilter(FILES, lambda: now[0])
    for _ in range(5):
        assert filtered.line(CANARY) == b""
    warning = b"WARNING 11-23 10:00:00 [serving.py:12] x"
    assert filtered.line(warning).startswith(b"(5 lines withheld)\nWARNING")
    assert sum(bool(filtered.line(warning)) for _ in range(1000)) == 199
    now[0] = 60.0
    assert filtered.line(warning).startswith(b"(801 lines withheld)\n")


def test_the_file_has_all_until_it_is_shut_and_then_only_what_passes(tmp_path: Path) -> None:
    log = EngineLog(tmp_path / "log", Path(sys.executable))
    engine = os.dup(log.write_end)
    log.start()
    os.write(engine, b"loading weights\nhalf of a li")
    _until(lambda: b"loading" in (tmp_path / "log").read_bytes())
    log.shut()
    os.write(engine, b"ne with " + CANARY + b"\nValueError: " + CANARY + b"\n" + CANARY)
    os.close(engine)
    log.join()
    assert (tmp_path / "log").read_bytes() == b"loading weights\n(1 lines withheld)\n  ValueError (text withheld)\n"
    assert (tmp_path / "log").stat().st_mode & 0o777 == 0o600


def test_a_line_without_end_takes_no_memory(tmp_path: Path) -> None:
    log = EngineLog(tmp_path / "log", Path(sys.executable))
    engine = os.dup(log.write_end)
    log.start()
    log.shut()
    for _ in range(2000):
        os.write(engine, b"x" * 65_536)
    os.write(engine, b"\nValueError\n")
    os.close(engine)
    log.join(10)
    assert (tmp_path / "log").read_bytes().endswith(b"ValueError (text withheld)\n")


def _until(true: object) -> None:
    deadline = time.monotonic() + 5
    while not true():  # type: ignore[operator]
        assert time.monotonic() < deadline
        time.sleep(0.01)
