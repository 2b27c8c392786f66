"""A hostile engine in the sandbox: each escape is shown to work outside it, and to fail inside.

The program below runs in place of vLLM. It does what it is told and prints what it got: the same lines outside and in
the sandbox, so a test that asserted nothing would pass neither way.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

SANDBOX = Path(__file__).resolve().parents[2] / "inference" / "engine" / "run" / "sandbox.py"
USER = 64_123
# Escapes by name; each returns what it got, or raises.
HOSTILE = """
import ctypes, importlib.util, json, os, socket, subprocess, sys
from pathlib import Path
told = json.loads(sys.argv[1])
if told["inside"]:
    spec = importlib.util.spec_from_file_location("sandbox", told["sandbox"])
    module = importlib.util.module_from_spec(spec); sys.modules["sandbox"] = module; spec.loader.exec_module(module)
    paths = {key: tuple(Path(p) for p in told[key]) for key in ("read_only", "writable")}
    module.enter(module.Sandbox(**paths, user=told["user"]))
libc = ctypes.CDLL(None, use_errno=True)

def tcp():
    with socket.create_connection(("127.0.0.1", told["port"]), 3) as peer: return peer.recv(64).decode()
def udp_route():
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s: s.connect(("192.0.2.1", 9)); return "routed"
def abstract():
    with socket.socket(socket.AF_UNIX) as s: s.connect("\\0" + told["abstract"]); return s.recv(64).decode()
def unix():
    with socket.socket(socket.AF_UNIX) as s: s.connect(told["unix"]); return s.recv(64).decode()
def secret(): return Path(told["secret"]).read_text()
def neighbour(): return os.listdir(told["neighbour"])
def environment(): return Path(f"/proc/{told['pid']}/environ").read_bytes().decode()
def memory():
    with open(f"/proc/{told['pid']}/maps") as maps: first = maps.readline().split("-")[0]
    with open(f"/proc/{told['pid']}/mem", "rb", 0) as mem: mem.seek(int(first, 16)); return mem.read(4).hex()
def any_command_line():
    others = [p for p in os.listdir("/proc") if p.isdigit() and p != str(os.getpid())]
    return [p for p in others if told["marker"].encode() in Path(f"/proc/{p}/cmdline").read_bytes()]
def signal(): os.kill(told["pid"], 0); return "reached"
def write_model():
    with open(told["model"], "r+b") as f: f.write(b"w"); return "written"
def write_system():
    p = Path("/usr/lib/adytum-test"); p.write_text("x"); p.unlink(); return "written"
def mount():
    if libc.mount(b"tmpfs", told["writable"][0].encode(), b"tmpfs", 0, None): raise OSError(ctypes.get_errno(), "mount")
    libc.umount2(told["writable"][0].encode(), 2); return "mounted"
def namespace():
    pid = os.fork()
    if pid == 0: os._exit(0 if libc.unshare(0x00020000) == 0 else 1)
    if os.waitpid(pid, 0)[1]: raise OSError("unshare")
    return "unshared"
def node():
    p = told["writable"][0] + "/node"; os.mknod(p, 0o20666, os.makedev(1, 5)); os.unlink(p); return "made"
def root(): os.setuid(0); return os.getuid()
def capabilities():
    lines = dict(l.split(":\\t") for l in Path("/proc/self/status").read_text().splitlines())
    held = [lines[n] for n in ("CapEff", "CapPrm", "CapInh", "CapBnd", "CapAmb") if int(lines[n], 16)]
    if not held: raise OSError("none")
    return held
def new_privileges():
    if "NoNewPrivs:\\t1" in Path("/proc/self/status").read_text(): raise OSError("no_new_privs")
    return "allowed"
def tmp(): return Path(told["in_tmp"]).read_text()
def shm(): return Path(told["in_shm"]).read_text()
def home(): p = Path(told["writable"][0], "x"); p.write_text("x"); p.unlink(); return "mine"
def model(): return Path(told["model"]).read_bytes().decode()
def loopback():
    with socket.create_server(("127.0.0.1", 0)) as s: return s.getsockname()[0]
def child(): return subprocess.check_output([sys.executable, "-c", "import ssl; print(1)"], text=True)
def leave_behind():
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            for n in (0, 1, 2): os.dup2(os.open("/dev/null", os.O_RDWR), n)
            os.execv(sys.executable, [sys.executable, "-c", "import time; time.sleep(60)", told["marker"] + "-left"])
        os._exit(0)
    os.wait(); return "left"

found = {}
for name in told["tries"]:
    try: found[name] = ["got", globals()[name]()]
    except BaseException as error: found[name] = ["failed", f"{type(error).__name__}: {error}"]
print(json.dumps(found))
"""
ESCAPES = (
    *("tcp", "udp_route", "abstract", "unix", "secret", "neighbour", "environment", "memory", "any_command_line"),
    *("signal", "write_model", "write_system", "mount", "namespace", "node", "root", "capabilities"),
    *("new_privileges", "tmp", "shm"),
)
RIGHTS = ("home", "model", "loopback", "child")


@dataclass
class World:
    """What there is to be found."""

    folder: Path
    told: dict[str, Any]

    def run(self, tries: tuple[str, ...], *, inside: bool) -> dict[str, list[Any]]:
        told = {**self.told, "inside": inside, "tries": tries}
        command = [sys.executable, "-P", "-c", HOSTILE, json.dumps(told)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        found: dict[str, list[Any]] = json.loads(done.stdout)
        return found


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    if os.getuid() != 0:
        pytest.skip("what fails in the sandbox is shown to work for root outside it")
    folder = Path(tempfile.mkdtemp(prefix="adytum-sandbox-"))
    for name in ("home", "model", "gateway", "neighbour"):
        (folder / name).mkdir(mode=0o755)
    os.chown(folder / "home", USER, USER)
    (folder / "model" / "weights").write_text("weights")
    (folder / "gateway" / "secret").write_text("the key")
    (folder / "neighbour" / "engine.sock").touch()
    in_tmp, in_shm = Path("/tmp/adytum-test-tmp"), Path("/dev/shm/adytum-test-shm")
    for path in (in_tmp, in_shm):
        path.write_text("another's")
    marker = f"adytum-marker-{os.getpid()}"
    gateway = subprocess.Popen(
        [sys.executable, "-c", "import time; time.sleep(600)", marker], env={"SECRET": "in the environment"}
    )
    servers = [socket.create_server(("127.0.0.1", 0)), socket.socket(socket.AF_UNIX), socket.socket(socket.AF_UNIX)]
    servers[1].bind("\0" + marker)
    servers[2].bind(str(folder / "gateway" / "sock"))
    for server in servers:
        server.listen()
        threading.Thread(target=_greet, args=(server,), daemon=True).start()
    told = {
        "sandbox": str(SANDBOX),
        "read_only": [*_interpreter(), str(SANDBOX), str(folder / "model")],
        "writable": [str(folder / "home")],
        "user": USER,
        "port": servers[0].getsockname()[1],
        "abstract": marker,
        "unix": str(folder / "gateway" / "sock"),
        "secret": str(folder / "gateway" / "secret"),
        "neighbour": str(folder / "neighbour"),
        "pid": gateway.pid,
        "marker": marker,
        "model": str(folder / "model" / "weights"),
        "in_tmp": str(in_tmp),
        "in_shm": str(in_shm),
    }
    yield World(folder, told)
    gateway.kill()
    gateway.wait()
    for server in servers:
        server.close()
    for path in (in_tmp, in_shm):
        path.unlink()
    shutil.rmtree(folder)


def _greet(server: socket.socket) -> None:
    while True:
        try:
            peer, _ = server.accept()
        except OSError:
            return
        peer.sendall(b"hello")
        peer.close()


def _interpreter() -> list[str]:
    code = f"import runpy; print(*runpy.run_path({str(SANDBOX)!r})['interpreter'](), sep='\\n')"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split("\n")[
        :-1
    ]


@pytest.mark.root
def test_every_escape_works_outside_and_fails_inside(world: World) -> None:
    outside = world.run(ESCAPES, inside=False)
    works = {name for name, (what, got) in outside.items() if what == "got" and got != []}
    # A test machine may have no network at all.
    assert set(ESCAPES) - {"udp_route"} <= works, outside
    inside = world.run(ESCAPES, inside=True)
    # An empty list of processes is a failed search.
    escaped = {name: got for name, (what, got) in inside.items() if what == "got" and got != []}
    assert not escaped


@pytest.mark.root
def test_what_an_engine_needs_works_inside(world: World) -> None:
    inside = world.run(RIGHTS, inside=True)
    assert {name: what for name, (what, _) in inside.items()} == dict.fromkeys(RIGHTS, "got"), inside
    assert inside["model"][1] == "weights"


@pytest.mark.root
def test_nothing_is_left_when_the_first_process_ends(world: World) -> None:
    left = world.told["marker"] + "-left"
    try:
        assert world.run(("leave_behind",), inside=False)["leave_behind"][0] == "got"
        time.sleep(0.3)
        assert _pids(left), "outside, a process that was sent to the background stays"
    finally:
        for pid in _pids(left):
            os.kill(pid, 9)
    assert world.run(("leave_behind",), inside=True)["leave_behind"][0] == "got"
    time.sleep(0.3)
    assert not _pids(left)


@pytest.mark.root
def test_a_missing_folder_is_named(world: World) -> None:
    told = {**world.told, "read_only": [*world.told["read_only"], "/nowhere/model"], "inside": True, "tries": ()}
    done = subprocess.run(
        [sys.executable, "-P", "-c", HOSTILE, json.dumps(told)], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode != 0
    assert "/nowhere/model is missing" in done.stderr


@pytest.mark.root
def test_the_sandbox_without_root() -> None:
    """In a user namespace, where the kernel allows one; with the system's Python, which such a user can read."""
    if os.getuid() != 0 or not shutil.which("setpriv") or not Path("/usr/bin/python3").exists():
        pytest.skip("needs root, setpriv and /usr/bin/python3")
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        copy = Path(folder, "sandbox.py")
        copy.write_bytes(SANDBOX.read_bytes())
        copy.chmod(0o644)
        told = {
            "sandbox": str(copy),
            "read_only": [str(copy)],
            "writable": [],
            "user": None,
            "inside": True,
            "marker": "no-such-process",
            "pid": os.getpid(),
            "tries": ["any_command_line", "environment", "capabilities", "new_privileges", "namespace"],
        }
        command = [
            "setpriv",
            "--reuid",
            "65534",
            "--regid",
            "65534",
            "--clear-groups",
            "/usr/bin/python3",
            "-c",
            HOSTILE,
        ]
        done = subprocess.run([*command, json.dumps(told)], capture_output=True, text=True, timeout=60, check=False)
        if "refuses new namespaces" in done.stderr:
            pytest.skip("the kernel has no user namespaces for ordinary users")
        found = json.loads(done.stdout)
        assert [name for name, (what, got) in found.items() if what == "got" and got != []] == []


def test_the_probe(engine_python: Path) -> None:
    launcher = SANDBOX.with_name("launcher.py")
    done = subprocess.run([engine_python, "-P", launcher, "--probe"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def _pids(marker: str) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and marker.encode() in (entry / "cmdline").read_bytes().split(b"\0"):
                found.append(int(entry.name))
        except OSError:
            continue
    return found
