"""How far a long step is, where nobody watches a terminal: in `/readyz` at once, in the log now and then."""

import logging
import time

from inference.lifecycle import Lifecycle

_log = logging.getLogger("cloister")
_LOG_S = 10.0


class Shown:
    """Shows one model's progress."""

    def __init__(self, model_id: str, lifecycle: Lifecycle) -> None:
        self._model_id = model_id
        self._lifecycle = lifecycle
        self._started = self._logged = time.monotonic()

    def progress(self, done: int, total: int) -> None:
        """`done` of `total` bytes. May be called from another thread."""
        share = done / total if total else 1.0
        self._lifecycle.progress = f"{self._model_id}: {share:.0%}"
        now = time.monotonic()
        if now - self._logged >= _LOG_S:
            self._logged = now
            _log.info(
                "%s: %.1f of %.1f GB, %.2f GB/s",
                self._model_id,
                done / 1e9,
                total / 1e9,
                done / 1e9 / (now - self._started),
            )
