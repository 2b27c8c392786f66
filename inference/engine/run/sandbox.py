"""What an engine may see: its model, its socket, its devices, loopback. Standard library only; Linux.

`enter` is called in the engine's process before vLLM is imported. It creates new namespaces (network, mounts,
processes, IPC, host name; a user namespace if it is not root), builds a file system that holds only what `Sandbox`
names, gives up every capability and its user, and returns in a child that is process 1 of its own PID namespace: when
that child ends, the kernel ends all that it started. If the kernel refuses a step, `SandboxError` is raised: no step is
optional.

Sources: namespaces(7), mount_namespaces(7), pid_namespaces(7), user_namespaces(7), capabilities(7), pivot_root(2).
"""

import ctypes
import fcntl
import os
import select
import signal
import socket
import struct
import sys
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

_NEWNS, _NEWUTS, _NEWIPC, _NEWUSER, _NEWPID, _NEWNET = (
    0x00020000, 0x04000000, 0x08000000, 0x10000000, 0x20000000, 0x40000000,
)  # fmt: skip
_RDONLY, _NOSUID, _NODEV, _NOEXEC, _REMOUNT, _BIND, _REC, _PRIVATE = 1, 2, 4, 8, 32, 4096, 16384, 1 << 18
_MNT_DETACH = 2
_SIOCGIFFLAGS, _SIOCSIFFLAGS, _IFF_UP = 0x8913, 0x8914, 0x1
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_CAPBSET_DROP, _PR_SET_NO_NEW_PRIVS, _PR_CAP_AMBIENT = 1, 4, 24, 38, 47
_PR_CAP_AMBIENT_CLEAR_ALL = 4
_CAPABILITY_VERSION_3 = 0x20080522
_SYS_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
_SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32")
"""Programs and libraries. Symbolic links among them stay links."""
_ETC = ("/etc/ld.so.cache", "/etc/ld.so.conf", "/etc/ld.so.conf.d", "/etc/localtime", "/etc/alternatives")
_DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")
_libc = ctypes.CDLL(None, use_errno=True)


class SandboxError(Exception):
    """The kernel refused a step. The message names it and says what an operator can do."""


@dataclass(frozen=True)
class Sandbox:
    """What is visible. Paths keep their place.

    `read_only`: folders and files. `writable`: folders, its home and its socket's. `devices`: device nodes. `user`: the
    user, and the group of the same number, that a process of root becomes. `shm_bytes`: the size of `/dev/shm` and of
    `/tmp`, each.
    """

    read_only: tuple[Path, ...]
    writable: tuple[Path, ...]
    devices: tuple[Path, ...] = ()
    user: int | None = None
    shm_bytes: int = 16 << 30


def enter(sandbox: Sandbox) -> None:
    """Returns in the sandbox, in a new process. The old one waits for it and exits with its status.

    Raises `SandboxError`.
    """
    is_root = os.getuid() == 0
    _unshare(is_root)
    _loopback_up()
    alive, held = os.pipe()
    child = os.fork()
    if child:
        _stand_by(child)  # It holds the pipe's other end as long as it lives.
    os.close(held)
    # The engine's user must be able to traverse the new root's folders.
    mask = os.umask(0o022)
    try:
        _build(sandbox)
    except OSError as error:
        raise SandboxError(f"the sandbox's file system: {error}") from error
    finally:
        os.umask(mask)
    _give_up(sandbox.user if is_root else None)
    # Last, because a change of user cancels the request.
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if select.select([alive], [], [], 0)[0]:
        os._exit(1)
    os.close(alive)


def _unshare(is_root: bool) -> None:
    user, group = os.getuid(), os.getgid()
    flags = _NEWNS | _NEWUTS | _NEWIPC | _NEWPID | _NEWNET
    if _libc.unshare(flags if is_root else flags | _NEWUSER) != 0:
        reason = os.strerror(ctypes.get_errno())
        raise SandboxError(
            f"the kernel refuses new namespaces ({reason}). Run the backend as root, or allow user namespaces "
            "(kernel.unprivileged_userns_clone = 1, kernel.apparmor_restrict_unprivileged_userns = 0)"
        )
    if not is_root:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"{user} {user} 1")
        Path("/proc/self/gid_map").write_text(f"{group} {group} 1")


def _loopback_up() -> None:
    with socket.socket() as probe:
        request = struct.pack("16sH14x", b"lo", 0)
        flags = struct.unpack("16sH14x", fcntl.ioctl(probe, _SIOCGIFFLAGS, request))[1]
        fcntl.ioctl(probe, _SIOCSIFFLAGS, struct.pack("16sH14x", b"lo", flags | _IFF_UP))


def _stand_by(child: int) -> None:
    """Passes signals on and exits with the status of `child`. Never returns."""

    def pass_on(number: int, _frame: FrameType | None) -> None:
        os.kill(child, number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, pass_on)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    os._exit(128 - code if code < 0 else code)


def _build(sandbox: Sandbox) -> None:
    """Builds the new root, inside the new namespaces."""
    _mount(None, "/", None, _REC | _PRIVATE)
    # Any folder will do as the mount point: it is hidden here and unchanged outside.
    root = "/tmp"  # noqa: S108 (hidden by the mount)
    descriptors = {path: os.open(path, os.O_PATH) for path in _visible(sandbox)}
    _mount("tmpfs", root, "tmpfs", _NOSUID | _NODEV, "mode=0755,size=16m")
    for name in _SYSTEM:
        if os.path.islink(name):
            os.symlink(os.readlink(name), root + name)
        elif os.path.isdir(name):
            _bind(name, root + name, _RDONLY | _NOSUID | _NODEV)
    for name in _ETC:
        if os.path.exists(name):
            _bind(name, root + name, _RDONLY | _NOSUID | _NODEV)
    number = sandbox.user if sandbox.user is not None and os.getuid() == 0 else os.getuid()
    Path(root, "etc/passwd").write_text(f"engine:x:{number}:{number}::/:/bin/false\n")
    Path(root, "etc/group").write_text(f"engine:x:{number}:\n")
    _bind("/sys", root + "/sys", _RDONLY | _NOSUID | _NODEV | _NOEXEC, recursive=True)
    os.mkdir(root + "/proc")
    _mount("proc", root + "/proc", "proc", _NOSUID | _NODEV | _NOEXEC)
    os.mkdir(root + "/dev")
    for name in (*_DEVICES, *map(str, sandbox.devices)):
        if os.path.exists(name):
            _bind(name, root + name, _NOSUID)
    for name, target in (("fd", "/proc/self/fd"), ("stdout", "/proc/self/fd/1"), ("stderr", "/proc/self/fd/2")):
        os.symlink(target, f"{root}/dev/{name}")
    for name in ("/dev/shm", "/tmp"):  # noqa: S108 (the sandbox's own)
        os.makedirs(root + name, exist_ok=True)
        _mount("tmpfs", root + name, "tmpfs", _NOSUID | _NODEV, f"mode=1777,size={sandbox.shm_bytes}")
    for path in sandbox.read_only:
        _bind(f"/proc/self/fd/{descriptors[path]}", root + str(path), _RDONLY | _NOSUID | _NODEV)
    for path in sandbox.writable:
        _bind(f"/proc/self/fd/{descriptors[path]}", root + str(path), _NOSUID | _NODEV)
    for descriptor in descriptors.values():
        os.close(descriptor)
    _pivot(root)


def _visible(sandbox: Sandbox) -> tuple[Path, ...]:
    missing = [path for path in (*sandbox.read_only, *sandbox.writable) if not path.exists()]
    if missing:
        raise SandboxError(f"{missing[0]} is missing")
    return (*sandbox.read_only, *sandbox.writable)


def _bind(source: str, target: str, flags: int, *, recursive: bool = False) -> None:
    if os.path.isdir(source):
        os.makedirs(target, exist_ok=True)
    else:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        Path(target).touch()
    _mount(source, target, None, _BIND | (_REC if recursive else 0))
    # A second call sets the flags of a bind. It must keep those of the source's mount: a user namespace locks them.
    _mount(None, target, None, _BIND | _REMOUNT | flags | _locked(target))


def _locked(target: str) -> int:
    found = os.statvfs(target).f_flag
    # ST_NOATIME, ST_NODIRATIME and ST_RELATIME have other values as mount flags.
    return (found & (_RDONLY | _NOSUID | _NODEV | _NOEXEC)) | (found & 0x400) | (found & 0x800) | (found & 0x1000) << 9


def _pivot(root: str) -> None:
    machine = os.uname().machine
    if machine not in _SYS_PIVOT_ROOT:
        raise SandboxError(f"the number of pivot_root is unknown for {machine}")
    os.chdir(root)
    os.mkdir("old")
    if _libc.syscall(_SYS_PIVOT_ROOT[machine], b".", b"old") != 0:
        raise OSError(ctypes.get_errno(), "pivot_root")
    os.chdir("/")
    if _libc.umount2(b"/old", _MNT_DETACH) != 0:
        raise OSError(ctypes.get_errno(), "umount of the old root")
    os.rmdir("/old")
    _mount(None, "/", None, _REMOUNT | _BIND | _RDONLY | _NOSUID | _NODEV)


def _give_up(user: int | None) -> None:
    """Gives up every capability, for good, and the user."""
    for capability in range(64):
        # The kernel answers EINVAL beyond its last capability.
        if _libc.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0) != 0 and ctypes.get_errno() != 22:
            raise SandboxError(f"capability {capability} cannot be given up")
    if user is not None:
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
    _libc.prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0)
    header = struct.pack("=Ii", _CAPABILITY_VERSION_3, 0)
    if _libc.capset(header, bytes(24)) != 0:
        raise SandboxError("the capabilities cannot be given up")
    if _libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0:
        raise SandboxError("no_new_privs cannot be set")
    # A change of user sets it again.
    if _libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0) != 0:
        raise SandboxError("core dumps cannot be turned off")


def _mount(source: str | None, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
    encoded = [None if text is None else text.encode() for text in (source, target, kind, data)]
    if _libc.mount(encoded[0], encoded[1], encoded[2], ctypes.c_ulong(flags), encoded[3]) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"mount on {target}: {os.strerror(number)}")


def probe() -> None:
    """Tries the whole sandbox around this interpreter. Raises `SandboxError`; otherwise exits with status 0."""
    enter(Sandbox(read_only=interpreter(), writable=(), user=_NOBODY))
    os._exit(0)


_NOBODY = 65534


def interpreter() -> tuple[Path, ...]:
    """The folders of this Python and its packages, except those in the system's folders."""
    found = {Path(sys.prefix), Path(sys.base_prefix), Path(os.path.realpath(sys.executable)).parent.parent}
    return tuple(sorted(path for path in found if not path.is_relative_to("/usr")))
