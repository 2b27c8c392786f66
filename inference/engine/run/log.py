"""An engine's output on its way to a file: whole until the engine serves, reduced to places and kinds after that.

vLLM's own lines can quote a request: a warning about it, a traceback with its arguments. So from the moment an engine
takes traffic, none of its output is written as it came. What remains tells an operator where to look: the level, time,
file and line of a warning, the files and lines of a traceback, the kind of its exception. Each of them is written only
if it is on a list that does not come from the engine: files of the installed vLLM, exceptions of Python and torch.
Everything else is counted.
"""

import builtins
import contextlib
import os
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path

_LEVELS = (b"WARNING", b"ERROR", b"CRITICAL")
_WHO = rb"(?:\([A-Za-z]+(?:_[A-Z]+\d+)* pid=\d+\) )?"
_LINE = re.compile(_WHO + rb"([A-Z]+) (\d\d-\d\d \d\d:\d\d:\d\d) \[(?:[\w/]+/)?(\w+\.py):(\d{1,5})\]")
_FRAME = re.compile(_WHO + rb'(?:[A-Z]+ [\d:\- ]+\[\S+\])?\s+File "[^"]*?(\w+\.py)", line (\d{1,5}), in ')
_RAISED = re.compile(_WHO + rb"(?:[A-Z]+ [\d:\- ]+\[\S+\] )?(?:[a-z_]+\.)*([A-Z]\w+)(?::|$)")
_EXCEPTIONS = frozenset(
    name.encode()
    for name in (
        *(name for name, kind in vars(builtins).items() if isinstance(kind, type) and issubclass(kind, BaseException)),
        *("OutOfMemoryError", "AcceleratorError", "EngineDeadError", "EngineGenerateError", "DistBackendError"),
    )
)  # fmt: skip
_LONGEST = 16_384
"""Bytes of a line that are looked at; the rest is dropped."""
_PER_MINUTE = 200
"""Lines written at most."""


class LogFilter:
    """Takes whole lines and returns what may be kept of them. `files`: names of source files that may be written."""

    def __init__(self, files: frozenset[bytes], clock: Callable[[], float] = time.monotonic) -> None:
        self._files = files
        self._clock = clock
        self._withheld = 0
        self._minute = clock()
        self._written = 0

    def line(self, line: bytes) -> bytes:
        """What is written for one line; empty for most."""
        kept = self._kept(line[:_LONGEST])
        now = self._clock()
        if now - self._minute >= 60:
            self._minute, self._written = now, 0
        if not kept or self._written >= _PER_MINUTE:
            self._withheld += 1
            return b""
        self._written += 1
        before, self._withheld = self._withheld, 0
        return (b"(%d lines withheld)\n" % before if before else b"") + kept + b"\n"

    def _kept(self, line: bytes) -> bytes:
        # The frame of a logged traceback begins like a line of the log, and tells more.
        if (found := _FRAME.match(line)) and found[1] in self._files:
            return b"  at %b:%b" % (found[1], found[2])
        if (found := _RAISED.match(line)) and found[1] in _EXCEPTIONS:
            return b"  %b (text withheld)" % found[1]
        if (found := _LINE.match(line)) and found[1] in _LEVELS and found[3] in self._files:
            return b"%b %b [%b:%b] (text withheld)" % (found[1], found[2], found[3], found[4])
        return b""


class EngineLog:
    """Reads an engine's output from a pipe and appends it to a file, in a thread of its own."""

    def __init__(self, path: Path, python: Path) -> None:
        """`python`: the engines' interpreter; the names of files come from the vLLM beside it. Raises `OSError`."""
        self._filter = LogFilter(_source_files(python))
        self._shut = False
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        os.fchmod(self._file, 0o600)
        self._read_end, self.write_end = os.pipe()
        self._thread = threading.Thread(target=self._work, name="engine log", daemon=True)

    def start(self) -> None:
        """Called once the engine has its end of the pipe."""
        os.close(self.write_end)
        self._thread.start()

    def shut(self) -> None:
        """From now on nothing is written as it came, including what is still in the pipe."""
        self._shut = True

    def join(self, seconds: float = 2.0) -> None:
        """After the engine's end: waits until all its output is written."""
        self._thread.join(seconds)

    def abandon(self) -> None:
        """Called instead of `start` if no engine was started."""
        for descriptor in (self.write_end, self._read_end, self._file):
            os.close(descriptor)

    def _work(self) -> None:
        held = b""
        with contextlib.suppress(OSError):
            while data := os.read(self._read_end, 65_536):
                if not self._shut:
                    # Whole lines, so that none is half written when the filter begins.
                    *lines, held = (held + data).split(b"\n")
                    self._write(b"".join(line + b"\n" for line in lines))
                    continue
                *lines, held = (held + data).split(b"\n")
                held = held[:_LONGEST]
                self._write(b"".join(self._filter.line(line) for line in lines))
            if held and not self._shut:
                self._write(held + b"\n")
        os.close(self._read_end)
        os.close(self._file)

    def _write(self, data: bytes) -> None:
        # A full disk must not stop the reading, or the engine would block at its next line.
        with contextlib.suppress(OSError):
            while data:
                data = data[os.write(self._file, data) :]


def _source_files(python: Path) -> frozenset[bytes]:
    packages = (python.parent.parent / "lib").glob("python3*/site-packages/vllm")
    return frozenset(os.fsencode(path.name) for package in packages for path in package.rglob("*.py"))
