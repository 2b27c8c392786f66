"""One model's engine for as long as the backend lives: started, checked, watched, started again.

    STARTING -> CHECKING -> LIVE -> RESTARTING -> CHECKING -> ...         FAILED: the canary did not pass

An engine that ends, or has a request and makes no progress, loses its requests at once (their clients get a sealed
error) and is started again after a pause. One that answers wrongly is stopped and stays stopped: what makes a wrong
answer does not go away by itself. Neither touches another model.
"""

import asyncio
import contextlib
import hashlib
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

import aiohttp

from inference.engine.canary import CanaryFailed
from inference.engine.process import Engine, EngineError, EngineSpec

_log = logging.getLogger("cloister.engine")
# What moves while an engine computes: tokens of each step, and requests that were taken or ended.
_PROGRESS = (b"vllm:iteration_tokens_total_sum", b"vllm:prompt_tokens_total", b"vllm:generation_tokens_total")
_PAUSES_S = (1.0, 2.0, 5.0, 15.0, 30.0, 60.0)
"""Before the first, second, ... start in a row; the last one from then on."""
_ENDED = "ended while its canary ran"
_ENDING_S = 1.0
_CRASHES = 3
"""So often in a row an engine may end under its canary before that counts as failing it."""
_STEADY_S = 600.0
"""An engine that lived this long has earned the first pause again."""


class State(StrEnum):
    """Where a model is."""

    STARTING = "starting"
    CHECKING = "checking"
    LIVE = "live"
    RESTARTING = "restarting"
    FAILED = "failed"
    STOPPED = "stopped"


class Gate(Protocol):
    """Where requests go through to an engine."""

    def open(self, name: str) -> None: ...
    def shut(self, name: str) -> None: ...
    def in_progress(self, name: str) -> int: ...


@dataclass(frozen=True)
class Timing:
    """Seconds. `ready`: from start to the first answer. `hung`: without progress, with a request. `canary`: between two
    checks of a live engine, which wait until it is idle. `poll`: between two looks at it."""

    ready: float
    hung: float
    canary: float
    poll: float = 2.0


Canary = Callable[[], Awaitable[None]]
"""Asks the engine and compares. Raises `CanaryFailed`."""


class Supervisor:
    """One model. `begin`, `check` and `watch` in this order, `stop` at any time."""

    def __init__(self, spec: EngineSpec, canary: Canary | None, gate: Gate, timing: Timing) -> None:
        self.spec = spec
        self.state = State.STARTING
        self.reason = ""
        self.restarts = 0
        """Starts after the first."""
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
        """Runs the canary, and opens the gate where it passes; else the model is FAILED and its engine stopped."""
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
            _log.info("%s is live", self.spec.id)

    async def watch(self) -> None:
        """Keeps the engine live. Returns only where the model is FAILED."""
        while self.state is State.LIVE:
            self.reason = await self._until_broken()
            if self.state is State.FAILED:
                return
            await self._again(self.reason)
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
        _log.error("%s: the engine %s; starting it again", self.spec.id, reason)
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
                _log.error("%s: %s", self.spec.id, error)
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
                # It gave no wrong answer, it gave none: that is for a restart, and not for ever.
                self._crashes += 1
                return False
            # Whatever it was, the engine has not shown that it answers rightly.
            self.state = State.FAILED
            self.reason = str(failed) if isinstance(failed, CanaryFailed) else type(failed).__name__
            self._gate.shut(self.spec.id)
            _log.critical("%s is taken out of service: %s", self.spec.id, self.reason)
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

    async def _until_broken(self) -> str:
        """What happened to the engine: it ended, it hangs, or (the state is FAILED then) its canary did not pass."""
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
                    found = await _progress(session)
                    if found is not None and (found != progress or not self._gate.in_progress(self.spec.id)):
                        progress, moved_at = found, now
                    if now - moved_at > self._timing.hung:
                        return f"has made no progress for {now - moved_at:.0f} s"
                    if now - self._checked_at > self._timing.canary and not self._gate.in_progress(self.spec.id):
                        self._checked_at = now
                        if not await self._passes():
                            return self.reason if self.state is State.FAILED else _ENDED
                        moved_at = time.monotonic()
        finally:
            ended.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await ended


async def _progress(session: aiohttp.ClientSession) -> bytes | None:
    """A digest of the engine's counters, or `None` where it does not answer."""
    try:
        async with session.get("http://engine/metrics") as answer:
            text = await answer.read()
    except (aiohttp.ClientError, OSError, TimeoutError):
        return None
    lines = [line for line in text.split(b"\n") if line.startswith(_PROGRESS)]
    return hashlib.sha256(b"\n".join(lines)).digest()
