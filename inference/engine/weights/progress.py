"""The progress of hashing: a bar on a terminal, a line now and then in a log."""

import sys
import time
from collections.abc import Callable
from typing import TextIO

_WIDTH = 24
_REDRAW_S = 0.1
_LINE_S, _LINE_PART, _LINE_MIN_S = 10.0, 0.1, 1.0


class ProgressLine:
    """A `weights.Progress`. One bar on `stream` if that is a terminal, else lines through `say`.

    A line is written every 10 s, or after each tenth of the bytes if it took at least a second, and at the end.
    """

    def __init__(
        self,
        label: str,
        say: Callable[[str], None],
        stream: TextIO = sys.stderr,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._label, self._say, self._stream, self._clock = label, say, stream, clock
        self._terminal = stream.isatty()
        self._start = self._told = clock()
        self._part = 0.0

    def __call__(self, done: int, total: int) -> None:
        """`done` of `total` bytes."""
        now = self._clock()
        part = done / total if total else 1.0
        since, news = now - self._told, part - self._part
        ended = part >= 1
        if self._terminal:
            if ended or since >= _REDRAW_S:
                self._told = now
                bar = ("#" * int(part * _WIDTH)).ljust(_WIDTH, "-")
                left = f", {self._left(now, part):.0f} s left" if 0 < part < 1 else ""
                end = "\n" if ended else ""
                self._stream.write(f"\r\033[K{self._label} |{bar}| {self._text(now, done, total, part)}{left}{end}")
                self._stream.flush()
        elif ended or since >= _LINE_S or (news >= _LINE_PART and since >= _LINE_MIN_S):
            self._told, self._part = now, part
            self._say(f"{self._label}: {self._text(now, done, total, part)}")

    def _text(self, now: float, done: int, total: int, part: float) -> str:
        rate = done / max(now - self._start, 1e-3)
        return f"{part:.0%} of {total / 1e9:.2f} GB, {rate / 1e9:.2f} GB/s"

    def _left(self, now: float, part: float) -> float:
        return (now - self._start) * (1 - part) / part
