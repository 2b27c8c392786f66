"""configfs-tsm (Linux 6.7 and later): a directory that turns 64 bytes into a signed report.

Linux, Documentation/ABI/testing/configfs-tsm-report. A process owns the directory that it makes, but root may write
into every one. `generation` counts writes: if it is one higher after the report than before the request, the kernel
took the request and nobody else wrote in between.
"""

import contextlib
import errno
import os
from dataclasses import dataclass
from pathlib import Path

from adytum.attestation.core.errors import CollectionError
from adytum.attestation.core.limits import LIMITS

ROOT = Path("/sys/kernel/config/tsm/report")
INBLOB_SIZE = 64
_TRIES = 3
_REASONS = {
    errno.EBUSY: "the platform is busy; it limits how often it signs",
    errno.ETIMEDOUT: "the platform did not answer in time; the host limits how often it signs",
    errno.EINVAL: "the platform refuses the request, or its privilege level",
    errno.ENOTTY: "the kernel gave up its key after an earlier error, and the machine has to be restarted",
    errno.ENXIO: "the platform's module is not loaded, or its firmware failed",
}
"""The causes that the kernel's own texts do not name (drivers/virt/coco/guest/report.c, sev-guest.c, tdx-guest.c)."""


@dataclass(frozen=True)
class TsmReport:
    """One report, as the kernel returns it."""

    outblob: bytes
    """The report or quote."""
    auxblob: bytes
    """Certificates from the host; empty if it sends none."""
    generation: int


class Tsm:
    """The interface at `root`, which is an argument so that tests can act as the kernel."""

    def __init__(self, root: Path = ROOT) -> None:
        self._root = root

    @property
    def present(self) -> bool:
        """Whether this kernel has the interface."""
        return self._root.is_dir()

    def report(self, inblob: bytes, provider: str) -> TsmReport:
        """A report that carries `inblob`, 64 bytes, from the platform `provider` (sev_guest or tdx_guest).

        If the platform has privilege levels (VMPL), the report is for the most privileged level that this kernel may
        request. Below a service module or paravisor, which runs at 0, that is not 0. Raises `CollectionError`.
        """
        if len(inblob) != INBLOB_SIZE:
            raise CollectionError(f"report data has {INBLOB_SIZE} bytes")
        entry = self._root / f"adytum-{os.getpid()}-{os.urandom(8).hex()}"
        try:
            entry.mkdir()
        except OSError as error:
            raise CollectionError(
                f"{self._root} cannot be used ({error.strerror}): is configfs mounted, and this process root?"
            ) from error
        try:
            found = _read(entry / "provider", 64).decode("ascii", "replace").strip()
            if found != provider:
                raise CollectionError(f"this machine's reports come from {found!a}, not from {provider}")
            floor = _floor(entry)
            if floor:
                # The kernel requests level 0 by default, which the firmware refuses to a guest above 0.
                _write(entry / "privlevel", str(floor).encode())
            for _ in range(_TRIES):
                report = self._once(entry, inblob)
                if report is not None:
                    return report
            raise CollectionError(
                "another process keeps writing into this process's report request, or the kernel ignores it"
            )
        except OSError as error:
            raise CollectionError(f"the kernel gave no report: {_reason(error)}") from error
        finally:
            # A directory that stays costs kernel memory; the report is complete or has failed by now.
            with contextlib.suppress(OSError):
                entry.rmdir()

    def _once(self, entry: Path, inblob: bytes) -> TsmReport | None:
        """None if another process wrote meanwhile."""
        before = _number(entry / "generation")
        _write(entry / "inblob", inblob)
        outblob = _read(entry / "outblob", LIMITS.report)
        try:
            auxblob = _read(entry / "auxblob", LIMITS.auxblob)
        except OSError as error:
            # Only some platforms have the attribute, and it is empty if the host sends nothing.
            if error.errno not in (errno.ENOENT, errno.EOPNOTSUPP, errno.ENODATA):
                raise
            auxblob = b""
        # The kernel drops the result of writing a binary attribute, so this also shows that it accepted the request.
        if _number(entry / "generation") != before + 1:
            return None
        if not outblob:
            raise CollectionError("the kernel gave an empty report")
        return TsmReport(outblob, auxblob, before + 1)


def _floor(entry: Path) -> int:
    """0 on a platform without levels, which has no such attribute."""
    try:
        return _number(entry / "privlevel_floor")
    except FileNotFoundError:
        return 0


def _number(path: Path) -> int:
    text = _read(path, 32)
    try:
        return int(text)
    except ValueError as error:
        raise CollectionError(f"the kernel's {path.name} is not a number") from error


def _read(path: Path, limit: int) -> bytes:
    with path.open("rb", buffering=0) as file:
        data = b""
        while part := file.read(limit + 1 - len(data)):
            data += part
            if len(data) > limit:
                raise CollectionError(f"{path.name} has more than {limit} bytes")
        return data


def _write(path: Path, data: bytes) -> None:
    # One write: configfs reads a binary attribute's content at close, and text in one piece.
    with path.open("wb", buffering=0) as file:
        file.write(data)


def _reason(error: OSError) -> str:
    return _REASONS.get(error.errno or 0) or error.strerror or type(error).__name__
