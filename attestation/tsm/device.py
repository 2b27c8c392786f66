"""configfs-tsm (Linux 6.7 and later): a directory that turns 64 bytes into a signed report.

Linux, Documentation/ABI/testing/configfs-tsm-report. Whoever makes a directory owns it, but root may write into every
one. `generation` counts writes: one more after the report than before the request means that the request was taken, and
that nobody else wrote in between.
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
"""What the kernel's words for these do not say (drivers/virt/coco/guest/report.c, sev-guest.c, tdx-guest.c)."""


@dataclass(frozen=True)
class TsmReport:
    """One report as the kernel gives it."""

    outblob: bytes
    """The report or quote."""
    auxblob: bytes
    """Certificates from the host, where it gives any; else empty."""
    generation: int


class Tsm:
    """The interface at `root`, which is an argument so that tests can act as the kernel."""

    def __init__(self, root: Path = ROOT) -> None:
        self._root = root

    @property
    def present(self) -> bool:
        """Whether this kernel has it."""
        return self._root.is_dir()

    def report(self, inblob: bytes, provider: str) -> TsmReport:
        """A report that carries `inblob`, 64 bytes, from the platform `provider` (sev_guest or tdx_guest).

        Where the platform has privilege levels (VMPL), at the most privileged one that this kernel may ask for: not 0
        below a service module or paravisor, which has that one. Raises `CollectionError`.
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
                # The kernel asks at 0 if it is not told, and the firmware refuses that to a guest above 0.
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
            # A directory that stays costs kernel memory, and a report has been made or not by now.
            with contextlib.suppress(OSError):
                entry.rmdir()

    def _once(self, entry: Path, inblob: bytes) -> TsmReport | None:
        """None where somebody else wrote meanwhile."""
        before = _number(entry / "generation")
        _write(entry / "inblob", inblob)
        outblob = _read(entry / "outblob", LIMITS.report)
        try:
            auxblob = _read(entry / "auxblob", LIMITS.auxblob)
        except OSError as error:
            # The attribute is there on some platforms only, and empty where the host gives nothing.
            if error.errno not in (errno.ENOENT, errno.EOPNOTSUPP, errno.ENODATA):
                raise
            auxblob = b""
        # The kernel drops the result of writing a binary attribute, so this also shows that it took the request.
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
        raise CollectionError(f"the kernel's {path.name} is no number") from error


def _read(path: Path, limit: int) -> bytes:
    with path.open("rb", buffering=0) as file:
        data = b""
        while part := file.read(limit + 1 - len(data)):
            data += part
            if len(data) > limit:
                raise CollectionError(f"{path.name} has more than {limit} bytes")
        return data


def _write(path: Path, data: bytes) -> None:
    # One write: configfs takes a binary attribute's whole content at close, and text in one piece.
    with path.open("wb", buffering=0) as file:
        file.write(data)


def _reason(error: OSError) -> str:
    return _REASONS.get(error.errno or 0) or error.strerror or type(error).__name__
