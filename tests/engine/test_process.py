"""Engines as processes: what they get, and that none outlives its backend. Real vLLM throughout."""

import asyncio
import contextlib
import json
import os
import re
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import aiohttp
import pytest

from adytum.inference.engine.run.process import Engine, EngineError, EngineSpec, command, environment
from tests.support import ROOT

Make = Callable[..., EngineSpec]
CANARY = "canary-5b1e77a0"
READY_SECONDS = 900

# A backend that only starts an engine and then hangs.
BACKEND = """
import asyncio, json, sys
from pathlib import Path
from adytum.inference.engine.run.process import Engine, EngineSpec
async def main():
    fields = json.loads(sys.argv[1])
    paths = {name: Path(fields.pop(name)) for name in ("python", "socket", "log")}
    engine = Engine(EngineSpec(**fields, **paths))
    await engine.start()
    print(engine.pid, flush=True)
    await asyncio.sleep(600)
asyncio.run(main())
"""


def test_command_and_environment_are_explicit(spec: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ADYTUM_API_KEY", CANARY)
    monkeypatch.setenv("HF_TOKEN", CANARY)
    made = spec(aliases=("llama",), arguments=("--max-model-len", "512"), environment={"A": "b"})
    values = environment(made, tmp_path)
    assert CANARY not in repr(values)
    assert {name for name in values if not name.startswith(("VLLM_", "OMP_"))} == {
        *("PATH", "HOME", "TMPDIR", "LANG", "DO_NOT_TRACK", "HF_HUB_OFFLINE", "TQDM_DISABLE", "A"),
    }
    assert "HF_HUB_OFFLINE" not in environment(spec(model="org/model"), tmp_path)
    assert command(made)[-2:] == ["--max-model-len", "512"]
    place = command(made).index("--served-model-name")
    assert command(made)[place + 1 : place + 3] == ["demo/llama-awq", "llama"]
    assert "--tool-call-parser" not in command(spec(tool_parser=None))
    assert "--enforce-eager" not in command(spec(device="cuda"))


def test_a_ready_engine_and_the_death_of_its_guard(spec: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """One start, everything that needs a ready engine; then the hardest end: the guard itself is killed."""
    monkeypatch.setenv("ADYTUM_API_KEY", CANARY)
    asyncio.run(_ready_engine(spec()))


async def _ready_engine(made: EngineSpec) -> None:
    engine = Engine(made)
    assert not engine.alive
    memory_before = set(os.listdir("/dev/shm"))
    await engine.start()
    try:
        assert engine.alive
        with pytest.raises(EngineError, match="twice"):
            await engine.start()
        await engine.wait_ready(READY_SECONDS)
        assert await _answer(made) == _first_answer()

        guard = engine.pid
        assert guard is not None
        processes = session(guard)
        # The guard, the API server, the engine core and the worker at least.
        assert len(processes) >= 4
        for process in processes:
            limits = Path(f"/proc/{process}/limits").read_text()
            assert re.search(r"^Max core file size +0 +0 ", limits, re.MULTILINE)
            if _is_tracker(process):
                continue
            about = Path(f"/proc/{process}/environ")
            if os.getuid() == 0:
                assert CANARY.encode() not in about.read_bytes()
                assert b"ADYTUM" not in about.read_bytes()
            else:
                # Not dumpable: not even the same user may read its memory or environment.
                with pytest.raises(PermissionError):
                    about.read_bytes()
        assert CANARY.encode() not in made.log.read_bytes()
        assert stat.S_IMODE(made.log.stat().st_mode) == 0o600
        assert stat.S_IMODE(made.socket.parent.stat().st_mode) == 0o700

        os.kill(guard, signal.SIGKILL)
        await asyncio.to_thread(wait_gone, guard)
        while engine.alive:
            await asyncio.sleep(0.05)
    finally:
        await engine.stop()
    assert not engine.alive
    assert not made.socket.exists()
    # Nobody was left to remove shared memory but the resource trackers, which end by themselves.
    await asyncio.sleep(0.5)
    assert set(os.listdir("/dev/shm")) <= memory_before
    await engine.stop()


def test_stop_while_starting(spec: Make) -> None:
    async def run() -> None:
        engine = Engine(spec())
        await engine.start()
        guard = engine.pid
        assert guard is not None
        await asyncio.to_thread(_wait_for, lambda: len(session(guard)) >= 2)
        await engine.stop()
        assert session(guard) == []
        assert not engine.alive

    asyncio.run(run())


def test_sigkill_of_the_backend_leaves_no_process(spec: Make, tmp_path: Path) -> None:
    made = spec()
    fields = {
        "id": made.id,
        "model": made.model,
        "task": made.task,
        "sandbox": made.sandbox,
        **{name: str(getattr(made, name)) for name in ("python", "socket", "log")},
    }
    homes = tmp_path / "homes"
    homes.mkdir()
    backend = subprocess.Popen(
        [sys.executable, "-c", BACKEND, json.dumps(fields)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(homes)},
    )
    try:
        assert backend.stdout is not None
        guard = int(backend.stdout.readline())
        # The guard, the server and the server's first child.
        _wait_for(lambda: len(session(guard)) >= 3)
        assert len(list(homes.iterdir())) == 1
    finally:
        backend.kill()
        backend.wait()
    wait_gone(guard)
    # The guard also cleans up behind a backend that cannot.
    _wait_for(lambda: not list(homes.iterdir()))
    assert not made.socket.exists()


def test_an_engine_that_ends_while_starting(spec: Make, tmp_path: Path) -> None:
    async def run() -> None:
        made = spec(arguments=("--no-such-argument",))
        engine = Engine(made)
        await engine.start()
        with pytest.raises(EngineError, match=f"ended with status 2.*{made.log.name}"):
            await engine.wait_ready(READY_SECONDS)
        assert not engine.alive
        await engine.stop()
        assert b"--no-such-argument" in made.log.read_bytes()

    asyncio.run(run())


def test_not_ready_in_time(spec: Make) -> None:
    async def run() -> None:
        engine = Engine(spec())
        await engine.start()
        try:
            with pytest.raises(EngineError, match="not ready after 0 s"):
                await engine.wait_ready(0.3)
        finally:
            await engine.stop(grace=0)

    asyncio.run(run())


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"python": Path("/nonexistent/python")}, "cannot be started"),
        ({"log": Path("/nonexistent/folder/log")}, "cannot be started"),
        ({"socket": Path("/tmp") / ("x" * 100) / "s.sock"}, "longer than 107 bytes"),
    ],
)
def test_cannot_be_started(spec: Make, changes: dict[str, Path], reason: str) -> None:
    async def run() -> None:
        engine = Engine(spec(**changes))
        before = len(os.listdir("/proc/self/fd"))
        with pytest.raises(EngineError, match=reason):
            await engine.start()
        assert len(os.listdir("/proc/self/fd")) == before
        await engine.stop()

    asyncio.run(run())


def session(leader: int) -> list[int]:
    """Processes in the session that `leader` made, dead ones not counted."""
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(OSError):
                state, _, _, sid, *_ = Path("/proc", entry, "stat").read_text().rpartition(")")[2].split()
                if int(sid) == leader and state not in "ZX":
                    found.append(int(entry))
    return found


def wait_gone(leader: int, seconds: float = 10) -> None:
    _wait_for(lambda: not session(leader), seconds)


def _wait_for(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def _is_tracker(process: int) -> bool:
    return b"resource_tracker" in Path(f"/proc/{process}/cmdline").read_bytes()


def _first_answer() -> str:
    from adytum.deploy.demo.faq import load

    return load(ROOT / "docs" / "faq.md")[0].answer


async def _answer(made: EngineSpec) -> str:
    from adytum.deploy.demo.faq import load

    question = load(ROOT / "docs" / "faq.md")[0].question
    async with aiohttp.ClientSession(connector=aiohttp.UnixConnector(str(made.socket))) as http:
        body = {"model": made.id, "messages": [{"role": "user", "content": question}], "max_tokens": 100}
        async with http.post("http://engine/v1/chat/completions", json=body) as answer:
            assert answer.status == 200
            return str((await answer.json())["choices"][0]["message"]["content"])
