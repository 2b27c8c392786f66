"""An engine that ends, hangs or answers wrongly: what happens to it, and that nothing happens to another model."""

import asyncio
import os
import signal
import sys
import time
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest

from adytum.inference.core.config import Model
from adytum.inference.engine.run import process
from adytum.inference.engine.run.process import EngineError, EngineSpec
from adytum.inference.engine.supervise import supervisor
from adytum.inference.engine.supervise.canary import CanaryFailed
from adytum.inference.engine.supervise.fleet import Fleet
from adytum.inference.engine.supervise.supervisor import State, Supervisor, Timing
from adytum.inference.gateway.admission.admission import EngineCall
from adytum.inference.gateway.exchange.engines import EngineCut, Engines, EngineUnavailable

pytestmark = pytest.mark.slow

_TIMING = Timing(ready=10, hung=0.6, canary=3600, poll=0.05)
_CHAT = "/v1/chat/completions"


@pytest.fixture(autouse=True)
def _scripted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "LAUNCHER", Path(__file__).with_name("scripted_engine.py"))
    monkeypatch.setattr(process, "POLL_SECONDS", 0.05)
    monkeypatch.setattr(supervisor, "_PAUSES_S", (0.1, 0.3))


class _Canary:
    """Counts its runs; fails from the `fails_from`th on."""

    def __init__(self, fails_from: int = 1_000) -> None:
        self.runs = 0
        self.fails_from = fails_from

    async def __call__(self) -> None:
        self.runs += 1
        if self.runs >= self.fails_from:
            raise CanaryFailed("the first token differs")


class _One:
    """One model with its folder, gate and supervisor."""

    def __init__(self, folder: Path, name: str = "m", canary: _Canary | None = None, timing: Timing = _TIMING) -> None:
        self.folder = folder / name
        self.folder.mkdir()
        self.name = name
        self.socket = self.folder / "run" / "e.sock"
        self.canary = canary or _Canary()
        self.gate = Engines({name: self.socket})
        spec = EngineSpec(
            id=name,
            model=str(self.folder),
            task="generate",
            python=Path(sys.executable),
            socket=self.socket,
            log=self.folder / "log",
            sandbox=False,
            environment={"SCRIPT": str(self.folder)},
        )
        self.supervisor = Supervisor(spec, self.canary, self.gate, timing)
        self.model = Model(id=name, task="generate", source=str(self.folder))

    @property
    def starts(self) -> list[int]:
        return [int(line) for line in (self.folder / "starts").read_text().split()]

    async def up(self) -> "asyncio.Task[None]":
        await self.supervisor.begin()
        await self.supervisor.check()
        return asyncio.create_task(self.supervisor.watch())

    async def ask(self) -> str:
        """What became of a streamed request."""
        call = EngineCall(self.model, _CHAT, b"{}", True)
        try:
            answer = await self.gate.send(call)
        except EngineUnavailable:
            return "unavailable"
        try:
            await answer.pour(lambda data: None)
        except EngineCut:
            return "cut"
        finally:
            self.gate.done(call, answer)
        return "complete"

    async def down(self, watching: "asyncio.Task[None]") -> None:
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)
        await self.supervisor.stop(grace=0)


async def _until(true: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "it did not happen in time"
        await asyncio.sleep(0.02)


def _run(test: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(test, 200))


def test_an_engine_that_is_killed_cuts_its_requests_and_comes_back(tmp_path: Path) -> None:
    async def run() -> None:
        one = _One(tmp_path)
        watching = await one.up()
        assert one.supervisor.state is State.LIVE
        asking = asyncio.create_task(one.ask())
        await _until(lambda: one.gate.in_progress("m") == 1)
        os.kill(one.starts[0], signal.SIGKILL)
        # The scripted engine would go on for a minute.
        assert await asyncio.wait_for(asking, 20) == "cut"
        await _until(lambda: one.supervisor.state is State.RESTARTING)
        assert await one.ask() == "unavailable"
        await _until(lambda: one.supervisor.state is State.LIVE)
        assert len(one.starts) == 2
        assert one.canary.runs == 2, "the canary has to pass again"
        assert one.supervisor.restarts == 1
        await one.down(watching)
        assert not one.socket.exists()

    _run(run())


class _Killing(_Canary):
    """Kills the engine as often as `times` while it runs."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self.times = times
        self.one: _One

    async def __call__(self) -> None:
        await super().__call__()
        if self.runs <= self.times:
            os.kill(self.one.starts[-1], signal.SIGKILL)
            raise ConnectionResetError


def test_an_engine_that_ends_under_its_canary_is_started_again_and_not_for_ever(tmp_path: Path) -> None:
    async def run() -> None:
        killing = _Killing(1)
        one = killing.one = _One(tmp_path, canary=killing)
        watching = await one.up()
        assert one.supervisor.state is State.LIVE
        assert (len(one.starts), killing.runs) == (2, 2)
        await one.down(watching)

    _run(run())


def test_an_engine_that_ends_under_every_canary_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "_PAUSES_S", (0.01,))

    async def run() -> None:
        killing = _Killing(100)
        one = killing.one = _One(tmp_path, canary=killing)
        await one.supervisor.begin()
        await one.supervisor.check()
        assert one.supervisor.state is State.FAILED
        assert killing.runs == 4

    _run(run())


def test_an_engine_without_progress_is_restarted_only_while_it_has_a_request(tmp_path: Path) -> None:
    async def run() -> None:
        one = _One(tmp_path)
        watching = await one.up()
        await asyncio.sleep(1.2)
        assert one.supervisor.restarts == 0, "an idle engine makes no progress, and that is not a fault"
        (one.folder / "progress").touch()
        asking = asyncio.create_task(one.ask())
        await asyncio.sleep(1.2)
        assert one.supervisor.restarts == 0, "a request that takes long is not a fault while tokens are made"
        (one.folder / "progress").unlink()
        assert await asking == "cut"
        await _until(lambda: one.supervisor.state is State.LIVE)
        assert one.supervisor.restarts == 1
        await one.down(watching)

    _run(run())


def test_an_engine_that_answers_nothing_is_restarted_even_when_idle(tmp_path: Path) -> None:
    async def run() -> None:
        one = _One(tmp_path)
        watching = await one.up()
        (one.folder / "hung").touch()
        await _until(lambda: one.supervisor.state is State.RESTARTING)
        (one.folder / "hung").unlink()
        await _until(lambda: one.supervisor.state is State.LIVE)
        await one.down(watching)

    _run(run())


def test_starts_that_fail_are_repeated_with_longer_pauses(tmp_path: Path) -> None:
    async def run() -> None:
        one = _One(tmp_path)
        watching = await one.up()
        (one.folder / "dead").touch()
        os.kill(one.starts[0], signal.SIGKILL)
        await _until(lambda: len(one.starts) >= 4)
        assert one.supervisor.state is State.RESTARTING
        assert await one.ask() == "unavailable"
        (one.folder / "dead").unlink()
        await _until(lambda: one.supervisor.state is State.LIVE)
        await one.down(watching)

    _run(run())


def test_a_first_start_that_fails_is_said_and_not_repeated(tmp_path: Path) -> None:
    async def run() -> None:
        one = _One(tmp_path)
        (one.folder / "dead").touch()
        with pytest.raises(EngineError, match="status 3"):
            await one.supervisor.begin()
        await one.supervisor.stop()

    _run(run())


def test_a_wrong_canary_fails_the_model_and_no_other(tmp_path: Path) -> None:
    async def run() -> None:
        bad, good = _One(tmp_path, "bad", _Canary(fails_from=1)), _One(tmp_path, "good")
        fleet = Fleet([bad.supervisor, good.supervisor], one_by_one=False)
        await fleet.begin()
        await fleet.check()
        assert fleet.states == {"bad": "failed", "good": "live"}
        assert fleet.alive
        assert await bad.ask() == "unavailable"
        await _until(lambda: not _running(bad.starts[0]))
        watching = asyncio.create_task(fleet.watch())
        await asyncio.sleep(0.3)
        assert fleet.states == {"bad": "failed", "good": "live"}
        assert len(bad.starts) == 1, "what makes a wrong answer does not go away by itself"
        watching.cancel()
        await fleet.stop()

    _run(run())


def test_a_live_engine_is_checked_again_when_idle_and_not_before(tmp_path: Path) -> None:
    async def run() -> None:
        canary = _Canary(fails_from=3)
        one = _One(tmp_path, canary=canary, timing=Timing(ready=10, hung=60, canary=0.3, poll=0.05))
        watching = await one.up()
        asking = asyncio.create_task(one.ask())
        await _until(lambda: one.gate.in_progress("m") == 1)
        runs = canary.runs
        await asyncio.sleep(0.8)
        assert canary.runs == runs, "a canary beside a request"
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        await asyncio.wait_for(watching, 8)
        assert canary.runs == 3
        assert one.supervisor.state is State.FAILED
        assert "first token" in one.supervisor.reason
        assert await one.ask() == "unavailable"
        await one.down(watching)

    _run(run())


def test_watch_ends_when_no_model_is_left(tmp_path: Path) -> None:
    async def run() -> None:
        one = _One(tmp_path, canary=_Canary(fails_from=2), timing=Timing(ready=10, hung=60, canary=0.1, poll=0.05))
        fleet = Fleet([one.supervisor], one_by_one=True)
        await fleet.begin()
        await fleet.check()
        assert fleet.alive
        await asyncio.wait_for(fleet.watch(), 8)
        assert not fleet.alive
        assert fleet.reasons == ["the first token differs"]
        await fleet.stop()

    _run(run())


def _running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.fixture(autouse=True)
def _nothing_left(tmp_path: Path) -> Iterator[None]:
    yield
    for starts in tmp_path.glob("*/starts"):
        for pid in starts.read_text().split():
            assert not _running(int(pid)), "a process was left behind"
