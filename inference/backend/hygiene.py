"""What the process does with its memory and environment before it holds a secret. Each raises `StepFailed`."""

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
# Compressed memory: what is swapped there leaves no trace outside of it.
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
"""Names of the environment that a backend keeps. None is for secrets: a proxy that wants a password is not for here."""


def clean_environment() -> None:
    """Starts this program again without the rest of its environment, where there is any.

    Deleting variables would leave the block that the kernel shows as /proc/<pid>/environ as it was; a new program's
    block has only what it is given. The process stays the same one.
    """
    environment = {name: value for name, value in os.environ.items() if name in KEPT}
    if environment.keys() != os.environ.keys():
        sys.stdout.flush()
        sys.stderr.flush()
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)  # noqa: S606 - our own command


def no_core_dumps() -> None:
    """A core dump of this process would hold keys and requests."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # The limit does not hold where core_pattern is a pipe; this does. It also keeps other processes of the same user
    # from reading this one's memory.
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0) != 0:
        raise StepFailed("the kernel does not let this process refuse core dumps (PR_SET_DUMPABLE)")


def no_swap(*, allowed: bool, swaps: Path = _SWAPS) -> None:
    """Neither this process's memory nor the engines' may be written to a disk."""
    try:
        used = [line.split()[0] for line in swaps.read_text().splitlines()[1:] if line.strip()]
    except OSError as error:
        raise StepFailed(
            f"{swaps} cannot be read ({error.strerror}), so nobody knows whether memory is swapped"
        ) from error
    disks = [name for name in used if not name.startswith(_IN_MEMORY)]
    if not disks:
        return
    told = f"memory can be swapped to {', '.join(disks)}, and with it prompts and keys"
    if not allowed:
        raise StepFailed(f'{told}. Switch it off (`swapoff -a`), or set server.swap = "allowed"')
    _log.warning('%(reason)s: server.swap = "allowed"', {"reason": told})
