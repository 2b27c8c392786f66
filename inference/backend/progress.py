"""Shows how far a long step of the start is: in `/readyz`, and on the terminal or in the log."""

import logging

from adytum.inference.core.lifecycle import Lifecycle
from adytum.inference.engine.weights.progress import ProgressLine

_log = logging.getLogger("adytum")


def _logged(line: str) -> None:
    _log.info("%(progress)s", {"progress": line})


class Shown:
    """Shows one model's progress. It is a `weights.Progress`, and may be called from another thread."""

    def __init__(self, model_id: str, lifecycle: Lifecycle) -> None:
        self._model_id = model_id
        self._lifecycle = lifecycle
        self._line = ProgressLine(f"weights {model_id}", _logged)

    def __call__(self, done: int, total: int) -> None:
        """`done` of `total` bytes."""
        self._lifecycle.progress = f"{self._model_id}: {done / total if total else 1:.0%}"
        self._line(done, total)
