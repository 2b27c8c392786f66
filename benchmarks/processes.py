"""Processes: how they are started and ended, and their CPU time and memory from the kernel."""

import multiprocessing
import os
import resource
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_TICK = os.sysconf("SC_CLK_TCK")


def many_files() -> None:
    """Raises the limit: thousands of streams are thousands of descriptors, two for each in the gateway."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 65_536), hard))


def cpu(pid: int) -> float:
    """CPU seconds of all current threads of `pid`. From schedstat, in nanoseconds: `stat` counts ticks of 10 ms."""
    return sum(int(path.read_text().split()[0]) for path in Path(f"/proc/{pid}/task").glob("*/schedstat")) / 1e9


def cpu_ticks(pid: int) -> float:
    """CPU seconds of `pid`, in ticks of 10 ms: threads that ended count too, children do not."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICK


def memory(pid: int) -> tuple[int, int]:
    """(RSS, PSS) in bytes."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    found = {line.split()[0]: int(line.split()[1]) * 1024 for line in lines[1:]}
    return found["Rss:"], found["Pss:"]


def free_port() -> int:
    """A TCP port of loopback on which no process listens now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def python(target: Callable[..., None], *arguments: Any) -> Iterator[int]:
    """Runs `target` in a process. Yields its id."""
    process = multiprocessing.get_context("spawn").Process(target=target, args=arguments, daemon=True)
    process.start()
    try:
        yield process.pid or 0
    finally:
        process.terminate()
        process.join(10)


@contextmanager
def program(command: list[str], log: Path, environment: dict[str, str] | None = None) -> Iterator[int]:
    """Runs a program with its output in `log`. Yields its process id."""
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, env=environment)
    try:
        yield process.pid
    finally:
        process.terminate()
        process.wait(20)


def wait_for(port: int, seconds: float) -> bool:
    """Whether a process listens on loopback's `port` within `seconds`."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return True
        time.sleep(0.1)
    return False
