"""One engine as a process: what it is started with, whether it is ready, and its end.

An engine gets nothing from the backend but what is listed here: a fixed environment, no file descriptors except its log
and its lifeline, a home directory that is made for it and removed with it, and a Unix socket in a directory of mode
0700.
"""

import asyncio
import contextlib
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Literal

import aiohttp

from adytum.inference.engine.run.log import EngineLog

LAUNCHER = Path(__file__).resolve().with_name("launcher.py")
POLL_SECONDS = 0.25
NO_SANDBOX = 78
"""The launcher's exit status if the kernel refuses the sandbox."""
GUARD_SECONDS = 10.0
"""How long the launcher's guard may take to kill an engine; it needs a fraction of a second."""
MAX_SOCKET_PATH = 107
"""Bytes; the kernel's limit (`sun_path`)."""


class EngineError(Exception):
    """The engine cannot be started, or it ended. The text says where to look; it quotes nothing from the log."""


@dataclass(frozen=True)
class EngineSpec:
    """What an engine serves and how.

    `id` and `aliases` are the model names that it answers to. `model` is a local folder or a hub id. `python` is the
    interpreter of the engines' own environment. `socket` is where it will listen. Its output is appended to the file
    `log`, which is made with mode 0600. `arguments` go to `vllm serve` last, so they win. `tool_parser` is vLLM's name
    of the parser for the model's tool calls; None turns tool calls off.
    """

    id: str
    model: str
    task: Literal["generate", "embed"]
    python: Path
    socket: Path
    log: Path
    aliases: tuple[str, ...] = ()
    arguments: tuple[str, ...] = ()
    placement: tuple[str, ...] = ()
    """The plan's decisions as arguments: KV cache, lengths, sequences."""
    tool_parser: str | None = None
    device: Literal["cpu", "cuda"] = "cpu"
    sandbox: bool = True
    """Whether it sees only its model, its socket, its devices and loopback (sandbox.py). Needs root, or permission to
    make user namespaces. The socket needs a directory of its own."""
    user: int | None = None
    """The user that it becomes if the backend is root."""
    devices: tuple[Path, ...] = ()
    """Device nodes that the sandbox shows."""
    environment: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    """Added to the engine's environment. Never put a secret here."""


def command(spec: EngineSpec) -> list[str]:
    """Arguments of `vllm serve` (docs/reference/engines.md says why each is there)."""
    arguments = [spec.model, "--served-model-name", spec.id, *spec.aliases, "--uds", str(spec.socket)]
    arguments += ["--disable-uvicorn-access-log", "--disable-fastapi-docs"]
    arguments += spec.placement
    if spec.device == "cpu":
        arguments += ["--enforce-eager"]
    if spec.task == "embed":
        arguments += ["--runner", "pooling"]
    else:
        # Otherwise a structured answer can go on with whitespace without end.
        arguments += ["--structured-outputs-config", '{"backend": "xgrammar", "disable_any_whitespace": true}']
        # Otherwise a bill cannot tell computed tokens from cached ones.
        arguments += ["--enable-prompt-tokens-details"]
    if spec.tool_parser is not None:
        arguments += ["--enable-auto-tool-choice", "--tool-call-parser", spec.tool_parser]
    return [*arguments, *spec.arguments]


def environment(spec: EngineSpec, home: Path) -> dict[str, str]:
    """The engine's whole environment: nothing is inherited."""
    values = {
        "PATH": f"{spec.python.parent}:/usr/local/bin:/usr/bin:/bin",
        "HOME": str(home),
        "TMPDIR": str(home),
        "LANG": "C.UTF-8",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "VLLM_RPC_BASE_PATH": str(home),
        # The launcher controls vLLM's processes only if they are spawned.
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
        "VLLM_LOGGING_COLOR": "0",
        # A tqdm bar per start-up step makes a log unreadable.
        "TQDM_DISABLE": "1",
        # Longer than the gateway keeps an idle connection, so that it never sends on one that is being closed.
        "VLLM_HTTP_TIMEOUT_KEEP_ALIVE": "300",
    }
    if Path(spec.model).is_dir():
        values["HF_HUB_OFFLINE"] = "1"
    if spec.device == "cpu":
        # Several engines share the cores: threads are not bound to a core, and an idle one sleeps instead of spinning.
        # One thread per engine, because small models lose more by waiting for each other's threads than they gain.
        values |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": "1"}
        # The model runs inside vLLM's core process. Otherwise the CPU build gives it a process of its own, even if the
        # executor is set to "uni", and the two spin while they wait for each other: on two cores that starves the API
        # server, and a stream comes in bursts of a second. On CUDA one GPU needs no such process anyway.
        values["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    return values | dict(spec.environment)


class Engine:
    """A vLLM server's life: `start`, `wait_ready`, `stop`. One object is one start."""

    def __init__(self, spec: EngineSpec) -> None:
        self.spec = spec
        self._process: asyncio.subprocess.Process | None = None
        self._lifeline: int | None = None
        self._home: Path | None = None
        self._log: EngineLog | None = None

    def __repr__(self) -> str:
        return f"Engine({self.spec.id!r})"

    @property
    def pid(self) -> int | None:
        """The process id of the launcher's guard; its descendants are the engine's processes. None before `start`."""
        return None if self._process is None else self._process.pid

    @property
    def alive(self) -> bool:
        """Whether it was started and has not ended. It may not be ready yet, or may hang: `/health` tells."""
        return self._process is not None and self._process.returncode is None

    async def start(self) -> None:
        """Starts the process and returns without waiting for the model. Raises `EngineError`."""
        spec = self.spec
        if self._process is not None:
            raise EngineError(f"{spec.id}: started twice")
        if len(os.fsencode(spec.socket)) > MAX_SOCKET_PATH:
            raise EngineError(f"{spec.id}: the socket's path is longer than {MAX_SOCKET_PATH} bytes: {spec.socket}")
        read_end, write_end = os.pipe()
        try:
            _private_directory(spec.socket.parent)
            spec.socket.unlink(missing_ok=True)
            self._home = Path(tempfile.mkdtemp(prefix="adytum-engine-"))
            isolation = self._isolation(self._home) if spec.sandbox else []
            log = await asyncio.to_thread(EngineLog, spec.log, spec.python)
            try:
                self._process = await asyncio.create_subprocess_exec(
                    *(str(spec.python), "-P", str(LAUNCHER)),
                    *("--lifeline", str(read_end), "--home", str(self._home), "--socket", str(spec.socket), *isolation),
                    *("--", *command(spec)),
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=log.write_end,
                    stderr=log.write_end,
                    close_fds=True,
                    pass_fds=(read_end,),
                    start_new_session=True,
                    cwd=self._home,
                    env=environment(spec, self._home),
                )
            except BaseException:
                log.abandon()
                raise
            log.start()
            self._log = log
        except OSError as error:
            os.close(write_end)
            self._clean_up()
            raise EngineError(f"{spec.id}: cannot be started: {error}") from error
        finally:
            os.close(read_end)
        self._lifeline = write_end

    async def wait_ready(self, timeout: float) -> None:
        """Returns when `/health` answers 200; `EngineError` if the engine ends first or `timeout` seconds pass."""
        if self._process is None:
            raise EngineError(f"{self.spec.id}: not started")
        deadline = time.monotonic() + timeout
        connector = aiohttp.UnixConnector(str(self.spec.socket))
        async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=5)) as session:
            while time.monotonic() < deadline:
                if not self.alive:
                    if self._process.returncode == NO_SANDBOX:
                        raise EngineError(f"{self.spec.id}: no sandbox; {self.spec.log} says which step was refused")
                    raise EngineError(
                        f"{self.spec.id}: ended with status {self._process.returncode} while starting; "
                        f"the last lines of {self.spec.log} say why"
                    )
                with contextlib.suppress(aiohttp.ClientError, OSError, TimeoutError):
                    async with session.get("http://engine/health") as answer:
                        if answer.status == 200:
                            return
                await asyncio.sleep(POLL_SECONDS)
        raise EngineError(f"{self.spec.id}: not ready after {timeout:.0f} s; see {self.spec.log}")

    def shut_log(self) -> None:
        """Called before the engine takes traffic: from now on its output is not written as it comes."""
        if self._log is not None:
            self._log.shut()

    async def ended(self) -> int:
        """Waits for the engine's end. Returns its exit status, 128 + n if signal n ended it. Raises `EngineError`."""
        if self._process is None:
            raise EngineError(f"{self.spec.id}: not started")
        return await self._process.wait()

    async def stop(self, grace: float = 5.0) -> None:
        """Ends the engine with all its processes and removes its socket and home. May be called at any time, and twice.

        vLLM has `grace` seconds for its own shutdown after SIGTERM; then the remaining processes are killed.
        """
        process, self._process = self._process, None
        if process is None:
            return
        try:
            if process.returncode is None and grace > 0:
                with contextlib.suppress(ProcessLookupError):
                    process.terminate()
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(process.wait(), grace)
        finally:
            # The guard kills everything below it when the lifeline closes.
            self._close_lifeline()
            try:
                await asyncio.wait_for(process.wait(), GUARD_SECONDS)
            except TimeoutError:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process.pid, signal.SIGKILL)
                await process.wait()
            finally:
                self._clean_up()
                if self._log is not None:
                    await asyncio.to_thread(self._log.join)

    def _isolation(self, home: Path) -> list[str]:
        """The launcher's arguments for the sandbox. Hands the home and the socket's folder to the engine's user."""
        spec = self.spec
        found = ["--sandbox", "--read-only", spec.model]
        for device in spec.devices:
            found += ["--device", str(device)]
        if spec.user is not None and os.getuid() == 0:
            found += ["--user", str(spec.user)]
            for folder in (home, spec.socket.parent):
                os.chown(folder, spec.user, spec.user)
        return found

    def _close_lifeline(self) -> None:
        if self._lifeline is not None:
            os.close(self._lifeline)
            self._lifeline = None

    def _clean_up(self) -> None:
        """Does what the guard has done already, unless it was killed."""
        with contextlib.suppress(OSError):
            self.spec.socket.unlink()
        if self._home is not None:
            shutil.rmtree(self._home, ignore_errors=True)


def _private_directory(folder: Path) -> None:
    """Makes `folder` with mode 0700, or checks that it is one of ours. Raises `PermissionError` if it is not."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    about = folder.stat()
    # If we are root it may belong to an engine's user, since an earlier start.
    if about.st_uid != os.getuid() and os.getuid() != 0:
        raise PermissionError(f"{folder} belongs to another user")
    if about.st_mode & 0o077:
        folder.chmod(0o700)
