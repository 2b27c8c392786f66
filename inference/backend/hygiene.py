"""What the process does with its memory and environment before it holds a secret."""

import ctypes
import logging
import os
import resource
import sys
from pathlib import Path

from adytum.inference.core.lifecycle import StepFailed

_log = logging.getLogger("adytum")
_PR_SET_DUMPABLE = 4
_SWAPS = Path("/proc/swaps")
# Compressed memory: what is swapped there does not leave the memory.
_IN_MEMORY = "/dev/zram"
KEPT = frozenset(
    [
        "PATH",
        "HOME",
        "LANG",
        "LC_ALL",
        "LC_CTYPE",
        "TZ",
        "TMPDIR",
        "PYTHONPATH",
        "PYTHONUNBUFFERED",
        "PYTHONDONTWRITEBYTECODE",
        "VIRTUAL_ENV",
        "SSL_CERT_FILE",
        "SSL_CERT_DIR",
        "HTTPS_PROXY",
        "NO_PROXY",
        "LD_LIBRARY_PATH",
    ]
)
"""Names in the environment that a backend keeps. None may carry a secret: a proxy with a password cannot be used."""


def clean_environment() -> None:
    """Starts this program again without the rest of its environment, if there is any.

    Deleting variables would not change the block that the kernel shows as /proc/<pid>/environ; a new program's block
    has only the variables that it is given. The process stays the same.
    """
    environment = {name: value for name, value in os.environ.items() if name in KEPT}
    if environment.keys() != os.environ.keys():
        sys.stdout.flush()
        sys.stderr.flush()
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)  # noqa: S606 - our own command


def no_core_dumps() -> None:
    """Turns core dumps off: one of this process would contain keys and requests. Raises `StepFailed`."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # The limit has no effect if core_pattern is a pipe; this has. It also keeps other processes of the same user from
    # reading this one's memory.
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0) != 0:
        raise StepFailed("the kernel does not let this process refuse core dumps (PR_SET_DUMPABLE)")


def no_swap(*, allowed: bool, swaps: Path = _SWAPS) -> None:
    """Checks that neither this process's memory nor the engines' can be swapped to a disk. Raises `StepFailed`."""
    try:
        used = [line.split()[0] for line in swaps.read_text().splitlines()[1:] if line.strip()]
    except OSError as error:
        raise StepFailed(
            f"{swaps} cannot be read ({error.strerror}), so it is unknown whether memory is swapped"
        ) from error
    disks = [name for name in used if not name.startswith(_IN_MEMORY)]
    if not disks:
        return
    danger = f"memory can be swapped to {', '.join(disks)}, and with it prompts and keys"
    if not allowed:
        raise StepFailed(f'{danger}. Switch it off (`swapoff -a`), or set server.swap = "allowed"')
    _log.warning('%(reason)s: server.swap = "allowed"', {"reason": danger})
