"""The records that operators bill from: one JSON line for each request that an engine was asked, without content.

A line is on the disk before the client gets the answer's end, so no completed answer is missing after a crash. Each
line is written once, with an identifier of its own, so none counts twice. Token counts are rounded up to a bucket: the
host reads this file, and an exact length reveals something about the content. The client has the exact numbers in
`usage` and in its receipt.
"""

import asyncio
import contextlib
import fcntl
import json
import logging
import os
import queue
import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from adytum.inference.core.lifecycle import StepFailed

_log = logging.getLogger("adytum.metering")
_TOGETHER = 512
_FIELDS = ("id", "time", "caller", "model", "route", "outcome", "prompt_tokens", "cached_tokens", "completion_tokens")
"""All fields of a line."""

Outcome = Literal["ok", "refused", "cut", "client_gone"]
"""ok: the answer ended. refused: the engine's own error. cut: the engine went away. client_gone: the client left."""


class MeteringFailed(Exception):
    """The record could not be written, so the answer must not end as if it had been."""


@dataclass(frozen=True)
class Charge:
    """One request. Tokens are exact here; `Records` rounds them."""

    caller: str
    model: str
    route: str
    outcome: Outcome
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int


def rounded(tokens: int, bucket: int) -> int:
    """`tokens`, rounded up to a multiple of `bucket`."""
    return -(-tokens // bucket) * bucket


class Records:
    """Appends charges to a file, many with one fsync. `bucket`: tokens. `clock`: Unix seconds. One thread writes."""

    def __init__(self, path: Path, bucket: int, clock: Callable[[], float] = time.time) -> None:
        """Raises `StepFailed` if the file cannot be appended to."""
        self._path = path
        self._bucket = bucket
        self._clock = clock
        self._waiting: queue.SimpleQueue[tuple[bytes, Callable[[BaseException | None], None]] | None] = (
            queue.SimpleQueue()
        )
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = _open(path)
        except BlockingIOError as error:
            raise StepFailed(f"metering.records: {path} is being written by another backend: name another") from error
        except OSError as error:
            raise StepFailed(f"metering.records: {path}: {error.strerror}") from error
        self._thread = threading.Thread(target=self._work, name="metering", daemon=True)
        self._thread.start()

    async def write(self, charge: Charge) -> None:
        """Returns once the line is on the disk. Raises `MeteringFailed`."""
        loop = asyncio.get_running_loop()
        done: asyncio.Future[None] = loop.create_future()

        def settle(error: BaseException | None) -> None:
            if done.done():
                return
            if error is None:
                done.set_result(None)
            else:
                done.set_exception(MeteringFailed())

        self._waiting.put((self._line(charge), lambda error: _tell(loop, settle, error)))
        # Shielded: a line that was handed over is written even if the waiting request is cancelled.
        await asyncio.shield(done)

    def note(self, charge: Charge) -> None:
        """Writes without waiting, for a request whose answer will not end."""
        self._waiting.put((self._line(charge), lambda _error: None))

    def close(self) -> None:
        """Writes the remaining lines and closes the file."""
        self._waiting.put(None)
        self._thread.join()
        os.close(self._file)

    def _line(self, charge: Charge) -> bytes:
        minute = time.strftime("%Y-%m-%dT%H:%MZ", time.gmtime(self._clock()))
        values = {
            "id": secrets.token_hex(8),
            "time": minute,
            "caller": charge.caller,
            "model": charge.model,
            "route": charge.route,
            "outcome": charge.outcome,
            "prompt_tokens": rounded(charge.prompt_tokens, self._bucket),
            "cached_tokens": rounded(charge.cached_tokens, self._bucket),
            "completion_tokens": rounded(charge.completion_tokens, self._bucket),
        }
        return json.dumps({name: values[name] for name in _FIELDS}, separators=(",", ":")).encode() + b"\n"

    def _work(self) -> None:
        while True:
            first = self._waiting.get()
            if first is None:
                return
            batch, ending = [first], False
            while len(batch) < _TOGETHER and not self._waiting.empty():
                item = self._waiting.get()
                if item is None:
                    ending = True
                    break
                batch.append(item)
            error = self._append(b"".join(line for line, _ in batch))
            for _, settle in batch:
                settle(error)
            if ending:
                return

    def _append(self, data: bytes) -> OSError | None:
        length = None
        try:
            if self._renamed():
                moved, self._file = self._file, _open(self._path)
                os.close(moved)
            length = os.fstat(self._file).st_size
            while data:
                data = data[os.write(self._file, data) :]
            os.fdatasync(self._file)
        except OSError as error:
            _log.error("usage records cannot be written: %(reason)s", {"reason": error.strerror})
            # A batch that fails is removed whole: its requests do not end and are not charged.
            if length is not None:
                with contextlib.suppress(OSError):
                    os.ftruncate(self._file, length)
            return error
        return None

    def _renamed(self) -> bool:
        """Whether the path names another file now, or none. That is how logs are rotated."""
        try:
            named = os.stat(self._path)
        except FileNotFoundError:
            return True
        return not os.path.samestat(named, os.fstat(self._file))


def _open(path: Path) -> int:
    """Opens the file for one writer only. Raises `OSError`."""
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _mend(file)
        _sync_folder(path.parent)
    except BaseException:
        os.close(file)
        raise
    return file


def _tell(
    loop: asyncio.AbstractEventLoop, settle: Callable[[BaseException | None], None], error: BaseException | None
) -> None:
    try:
        loop.call_soon_threadsafe(settle, error)
    except RuntimeError:
        return  # The loop has ended, and the waiting request with it.


def _mend(file: int) -> None:
    """Removes a last line without its end, as a power cut can leave it. Its answer had not ended."""
    size = os.fstat(file).st_size
    at = size
    while at > 0:
        start = max(0, at - 65_536)
        found = os.pread(file, at - start, start).rfind(b"\n")
        if found >= 0:
            at = start + found + 1
            break
        at = start
    if at != size:
        os.ftruncate(file, at)
        os.fsync(file)
        _log.warning("usage records ended with a line that was cut; it was removed")


def _sync_folder(folder: Path) -> None:
    """Syncs the folder: only then is a new file's name on the disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
