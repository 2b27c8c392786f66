"""One model's engine for as long as the backend lives: started, checked, watched, restarted.

    STARTING -> CHECKING -> LIVE -> RESTARTING -> CHECKING -> ...         FAILED: the canary did not pass

An engine that ends, or has a request and makes no progress, loses its requests at once (their clients get a sealed
error) and is restarted after a pause. An engine that answers wrongly is stopped and stays stopped: the cause of a wrong
answer does not go away by itself. Neither affects another model.
"""

import asyncio
import contextlib
import hashlib
import logging
import math
import re
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

import aiohttp

from adytum.inference.engine.run.process import Engine, EngineError, EngineSpec
from adytum.inference.engine.supervise.canary import CanaryFailed

_log = logging.getLogger("adytum.engine")
# These grow while an engine computes: tokens of each step, and requests that were accepted or ended.
_PROGRESS = (b"vllm:iteration_tokens_total_sum", b"vllm:prompt_tokens_total", b"vllm:generation_tokens_total")
NUMBERS = {
    b"num_requests_running": "adytum_engine_running",
    b"num_requests_waiting": "adytum_engine_waiting",
    b"kv_cache_usage_perc": "adytum_engine_kv_cache_used",
}
_NUMBER = re.compile(
    rb"^vllm:(%b)(?:\{[^}\n]*\})? (\d{1,9}(?:\.\d{1,20})?(?:e-\d{1,3})?)$" % b"|".join(NUMBERS), re.MULTILINE
)
_SHARE = 0.05
_LONGEST_PAGE = 4 * 1024 * 1024
_PAUSES_S = (1.0, 2.0, 5.0, 15.0, 30.0, 60.0)
"""Before the first, second, ... start in a row; the last value from then on."""
_ENDED = "ended while its canary ran"
_ENDING_S = 1.0
_CRASHES = 3
"""An engine may end this often in a row during its canary before that counts as failing it."""
_STEADY_S = 600.0
"""An engine that lived this long starts with the first pause again."""


class State(StrEnum):
    """A model's state."""

    STARTING = "starting"
    CHECKING = "checking"
    LIVE = "live"
    RESTARTING = "restarting"
    FAILED = "failed"
    STOPPED = "stopped"


class Gate(Protocol):
    """Lets requests through to an engine."""

    def open(self, name: str) -> None: ...
    def shut(self, name: str) -> None: ...
    def in_progress(self, name: str) -> int: ...


@dataclass(frozen=True)
class Timing:
    """Seconds. `ready`: from start to the first answer. `hung`: without progress while it has a request. `canary`:
    between two checks of a live engine, which wait until it is idle. `poll`: between two looks at it."""

    ready: float
    hung: float
    canary: float
    poll: float = 2.0


Canary = Callable[[], Awaitable[None]]
"""Asks the engine and compares its answers. Raises `CanaryFailed`."""


class Supervisor:
    """One model. `begin`, `check` and `watch` in this order, `stop` at any time."""

    def __init__(self, spec: EngineSpec, canary: Canary | None, gate: Gate, timing: Timing) -> None:
        self.spec = spec
        self.state = State.STARTING
        self.reason = ""
        self.restarts = 0
        """Starts after the first."""
        self.numbers: dict[str, float] = {}
        """What the engine last reported of itself; empty while it is not live."""
        self._canary = canary
        self._gate = gate
        self._timing = timing
        self._engine = Engine(spec)
        self._crashes = 0
        self._live_since = 0.0
        self._checked_at = 0.0

    def __repr__(self) -> str:
        return f"Supervisor({self.spec.id!r}, {self.state})"

    async def begin(self) -> None:
        """Starts the engine and waits until it answers. Raises `EngineError`."""
        self.state = State.STARTING if not self.restarts else State.RESTARTING
        self._engine = Engine(self.spec)
        await self._engine.start()
        await self._engine.wait_ready(self._timing.ready)

    async def check(self) -> None:
        """Runs the canary. If it passes, the gate opens; if not, the model is FAILED and its engine stopped."""
        self.state = State.CHECKING
        if not await self._passes():
            if self.state is not State.FAILED:
                await self._again(_ENDED)
                await self._restart(self._crashes)
        else:
            self._live_since = self._checked_at = time.monotonic()
            self.state = State.LIVE
            self._engine.shut_log()
            self._gate.open(self.spec.id)
            _log.info("%(model)s is live", {"model": self.spec.id})

    async def watch(self) -> None:
        """Keeps the engine live. Returns only if the model is FAILED."""
        while self.state is State.LIVE:
            broken = await self._until_broken()
            if broken is None:
                return
            await self._again(broken)
            await self._restart(0 if time.monotonic() - self._live_since > _STEADY_S else self.restarts)

    async def stop(self, grace: float = 5.0) -> None:
        """Ends the engine."""
        self._gate.shut(self.spec.id)
        if self.state is not State.FAILED:
            self.state = State.STOPPED
        await self._engine.stop(grace)

    async def _again(self, reason: str) -> None:
        self.reason = reason
        self.state = State.RESTARTING
        self._gate.shut(self.spec.id)
        _log.error("%(model)s: the engine %(reason)s; starting it again", {"model": self.spec.id, "reason": reason})
        await self._engine.stop(grace=0)

    async def _restart(self, failures: int) -> None:
        while True:
            self.restarts += 1
            await asyncio.sleep(_PAUSES_S[min(failures, len(_PAUSES_S) - 1)])
            try:
                await self.begin()
                break
            except EngineError as error:
                failures += 1
                self.reason = str(error)
                _log.error("%(model)s: %(reason)s", {"model": self.spec.id, "reason": error})
                await self._engine.stop(grace=0)
        await self.check()

    async def _passes(self) -> bool:
        """Whether the canary passed. If not, the state is FAILED, or the engine ended meanwhile."""
        if self._canary is None:
            return True
        try:
            await self._canary()
        except Exception as failed:
            if await self._has_ended() and self._crashes < _CRASHES:
                # It gave no answer, not a wrong one: that calls for a restart, a limited number of times.
                self._crashes += 1
                return False
            # Whatever the cause, the engine has not shown that it answers correctly.
            self.state = State.FAILED
            self.reason = str(failed) if isinstance(failed, CanaryFailed) else type(failed).__name__
            self._gate.shut(self.spec.id)
            _log.critical(
                "%(model)s is taken out of service: %(reason)s", {"model": self.spec.id, "reason": self.reason}
            )
            await self._engine.stop(grace=0)
            return False
        self._crashes = 0
        return True

    async def _has_ended(self) -> bool:
        # Its connections break a moment before its process is gone.
        with contextlib.suppress(TimeoutError, EngineError):
            await asyncio.wait_for(self._engine.ended(), _ENDING_S)
            return True
        return False

    async def _until_broken(self) -> str | None:
        """What happened to the engine: it ended or hangs; None if its canary did not pass and the state is FAILED."""
        ended = asyncio.create_task(self._engine.ended())
        progress, moved_at = b"", time.monotonic()
        connector = aiohttp.UnixConnector(str(self.spec.socket))
        limit = aiohttp.ClientTimeout(total=min(self._timing.hung, 10.0))
        try:
            async with aiohttp.ClientSession(connector=connector, timeout=limit) as session:
                while True:
                    await asyncio.wait((ended,), timeout=self._timing.poll)
                    if ended.done():
                        return f"ended with status {ended.result()}"
                    now = time.monotonic()
                    page = await _metrics(session)
                    self.numbers = numbers_of(page) if page is not None else {}
                    found = _progress(page) if page is not None else None
                    if found is not None and (found != progress or not self._gate.in_progress(self.spec.id)):
                        progress, moved_at = found, now
                    if now - moved_at > self._timing.hung:
                        return f"has made no progress for {now - moved_at:.0f} s"
                    if now - self._checked_at > self._timing.canary and not self._gate.in_progress(self.spec.id):
                        self._checked_at = now
                        if not await self._passes():
                            return None if self.state is State.FAILED else _ENDED
                        moved_at = time.monotonic()
        finally:
            self.numbers = {}
            ended.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await ended


async def _metrics(session: aiohttp.ClientSession) -> bytes | None:
    """The engine's metrics, or None if it does not answer or the page is too long."""
    page = bytearray()
    try:
        async with session.get("http://engine/metrics") as answer:
            async for part in answer.content.iter_any():
                page += part
                if len(page) > _LONGEST_PAGE:
                    return None
    except (aiohttp.ClientError, OSError, TimeoutError):
        return None
    return bytes(page)


def _progress(page: bytes) -> bytes:
    """A digest of the engine's counters."""
    lines = [line for line in page.split(b"\n") if line.startswith(_PROGRESS)]
    return hashlib.sha256(b"\n".join(lines)).digest()


def numbers_of(page: bytes) -> dict[str, float]:
    """The few numbers that are passed on, by our names. An engine is not trusted: anything but a number is dropped."""
    found = {}
    for name, number in _NUMBER.findall(page):
        value = float(number)
        if name == b"kv_cache_usage_perc":
            # A share, in coarse steps: finer ones would tell the length of a prompt that is answered alone.
            found[NUMBERS[name]] = min(1.0, math.ceil(value / _SHARE) * _SHARE)
        else:
            found[NUMBERS[name]] = value
    return found
