"""The callers: API keys by their hash, limits per key, and a signed list that can change without a restart.

A list is TOML:

    serial = 7                            # of two lists, the one with the higher serial counts
    [[caller]]
    name = "hospital-a"                   # its name in records and metrics
    key_sha256 = "<64 hex digits>"        # of its API key: `adytum callers key` makes one
    models = ["meta-llama/..."]           # all if omitted
    requests_per_minute = 60              # no limit if omitted, like the next two
    tokens_per_minute = 100_000           # prompts and answers
    concurrent = 8                        # requests at a time
    expires = 2027-01-01T00:00:00Z        # a time with a zone

Beside it is `<file>.sig`, the Ed25519 signature in hexadecimal over `SIGNED` and the file's bytes. The public key is in
the measured configuration, so the host, which controls the disk, cannot add a caller. Both can be on a raw disk
(`disk`).
"""

import datetime
import hashlib
import hmac
import logging
import math
import os
import stat
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from adytum.inference.channel.bhttp import Fields
from adytum.inference.channel.bhttp import field as field_of
from adytum.inference.gateway.callers import disk
from adytum.inference.gateway.failures import BAD_KEY, Refusal, Refused

SIGNED = b"adytum callers v1\0"
_log = logging.getLogger("adytum.callers")


class CallersError(Exception):
    """A list that cannot be used. The message names the line, and contains nothing of a key."""


class Caller(BaseModel):
    """One caller. Only the SHA-256 of its key is kept."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Annotated[str, StringConstraints(pattern="^[a-z0-9][a-z0-9-]{0,63}$")]
    key_sha256: Annotated[str, StringConstraints(pattern="^[0-9a-f]{64}$")]
    models: frozenset[str] | None = Field(default=None, min_length=1)
    requests_per_minute: int | None = Field(default=None, ge=1)
    tokens_per_minute: int | None = Field(default=None, ge=1)
    concurrent: int | None = Field(default=None, ge=1)
    expires: AwareDatetime | None = None


class CallerList(BaseModel):
    """A whole list."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    serial: int = Field(ge=0)
    caller: tuple[Caller, ...]
    """`caller = []` must be written out and admits no caller."""

    @classmethod
    def parse(cls, data: bytes) -> "CallerList":
        """Raises `CallersError`."""
        try:
            found = cls(**tomllib.loads(data.decode()))
        except (UnicodeDecodeError, tomllib.TOMLDecodeError, TypeError) as error:
            raise CallersError(f"it is not TOML: {error}") from error
        except ValidationError as error:
            # The place and the error, but not the value: it could be a key in place of its hash.
            raise CallersError(
                "; ".join(f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors())
            ) from None
        for what in ("name", "key_sha256"):
            values = [getattr(caller, what) for caller in found.caller]
            if ANYONE.name in values:
                raise CallersError(f'the name "{ANYONE.name}" means that no key was asked for')
            if len(set(values)) != len(values):
                raise CallersError(f"two callers have the same {what}")
        return found

    @classmethod
    def load(cls, path: Path, signed_by: bytes) -> "CallerList":
        """Loads a signed list. Raises `CallersError`."""
        try:
            data, signature = _contents(path)
        except (OSError, UnicodeDecodeError) as error:
            # The text only of our own errors, which have no number: it contains nothing of the file.
            ours = isinstance(error, OSError) and error.errno is None
            raise CallersError(f"it or its .sig cannot be read ({error if ours else type(error).__name__})") from error
        try:
            Ed25519PublicKey.from_public_bytes(signed_by).verify(bytes.fromhex(signature), SIGNED + data)
        except (InvalidSignature, ValueError) as error:
            raise CallersError("it is not signed by callers.signed_by: `adytum callers sign` it again") from error
        return cls.parse(data)


ANYONE = Caller(name="anyone", key_sha256="0" * 64)
"""The caller of every request if no key is required."""


@dataclass
class _Bucket:
    """Fills by `per_minute` a minute, and holds at most as many."""

    per_minute: int
    level: float
    at: float

    def wait(self, amount: float, now: float) -> float:
        """Seconds until `amount` can be taken; 0 if it can be taken now. An amount beyond the capacity waits for a full
        bucket."""
        self.level = min(self.per_minute, self.level + (now - self.at) * self.per_minute / 60)
        self.at = now
        missing = min(amount, self.per_minute) - self.level
        return max(0.0, missing * 60 / self.per_minute)


def _full(per_minute: int | None, now: float) -> _Bucket | None:
    return None if per_minute is None else _Bucket(per_minute, float(per_minute), now)


@dataclass
class _Account:
    requests: _Bucket | None
    tokens: _Bucket | None
    in_progress: int = 0

    def resized(self, full: "_Account") -> "_Account":
        """This account with the limits of `full`. Requests in progress refer to it, so it stays the same object."""
        for name in ("requests", "tokens"):
            old, new = getattr(self, name), getattr(full, name)
            if old is not None and new is not None:
                new.level, new.at = min(old.level, float(new.per_minute)), old.at
            setattr(self, name, new)
        return self


@dataclass
class Hold:
    """One request's share of its caller's limits. `used`: its tokens, once known. `end` must always be called."""

    account: _Account
    reserved: int = 0
    used: int | None = None
    _ended: bool = field(default=False, repr=False)

    def reserve(self, tokens: int, now: float) -> None:
        """Takes the tokens that the request may cost. Raises `Refused`."""
        bucket = self.account.tokens
        if bucket is None:
            return
        if wait := bucket.wait(tokens, now):
            raise _limited("tokens per minute", wait)
        bucket.level -= tokens
        self.reserved = tokens

    def end(self) -> None:
        """Returns the tokens that were not used. May be called twice."""
        if self._ended:
            return
        self._ended = True
        self.account.in_progress -= 1
        if self.account.tokens is not None:
            self.account.tokens.level += self.reserved - (self.used or 0)


class Callers:
    """The list in use. `clock`: Unix seconds, for expiry; `monotonic`: seconds, for rates."""

    def __init__(
        self,
        callers: tuple[Caller, ...] | None,
        *,
        clock: Callable[[], float],
        monotonic: Callable[[], float],
        serial: int = 0,
    ) -> None:
        """`callers` is `None` if no key is required."""
        self._clock = clock
        self._monotonic = monotonic
        self._accounts: dict[str, tuple[Caller, _Account]] = {}
        self._latest = 0.0
        self._open = callers is None
        self.serial = serial
        self._use(callers or ())

    def _use(self, callers: tuple[Caller, ...]) -> None:
        self._by_digest = {caller.key_sha256: caller for caller in callers}
        before, self._accounts = self._accounts, {}
        for caller in (*callers, ANYONE):
            # A caller that stays keeps its use and its requests in progress: a new list does not start a new minute.
            account = self._account(caller)
            if caller.name in before:
                account = before[caller.name][1].resized(account)
            self._accounts[caller.name] = (caller, account)

    def _account(self, caller: Caller) -> _Account:
        now = self._monotonic()
        return _Account(_full(caller.requests_per_minute, now), _full(caller.tokens_per_minute, now))

    def replace(self, found: CallerList) -> None:
        """Uses another list from now on; requests in progress go on. Raises `CallersError` for an older list."""
        if found.serial < self.serial:
            raise CallersError(f"its serial {found.serial} is older than {self.serial}, which is in use")
        if found.serial == self.serial:
            # Otherwise the host could switch between two lists with one serial.
            if {item.name: item for item in found.caller} != self._known():
                raise CallersError(f"its serial {found.serial} is that of another list, which is in use: count it up")
            return
        self.serial = found.serial
        self._use(found.caller)

    def _known(self) -> dict[str, Caller]:
        return {caller.name: caller for caller in self._by_digest.values()}

    def authenticate(self, fields: Fields) -> tuple[Caller, bytes]:
        """The caller and its API key. Raises `Refused`."""
        if self._open:
            return ANYONE, b""
        key = field_of(fields, b"x-api-key")
        if key is None:
            scheme, _, key = (field_of(fields, b"authorization") or b"").partition(b" ")
            key = key.strip() if scheme.lower() == b"bearer" else b""
        digest = hashlib.sha256(key).hexdigest()
        # Looked up by digest: its timing reveals something about digests, which no sender can choose, not about keys.
        caller = self._by_digest.get(digest)
        if not key or caller is None or not hmac.compare_digest(caller.key_sha256, digest):
            raise Refused(BAD_KEY)
        # The host sets the clock: if it turned it back, an expired key would be valid again.
        self._latest = max(self._latest, self._clock())
        if caller.expires is not None and self._latest >= caller.expires.timestamp():
            raise Refused(BAD_KEY)
        return caller, key

    def begin(self, caller: Caller) -> Hold:
        """Counts a request. Raises `Refused`."""
        _, account = self._accounts.get(caller.name, (caller, None))
        if account is None:
            # Revoked after it was authenticated.
            raise Refused(BAD_KEY)
        if caller.concurrent is not None and account.in_progress >= caller.concurrent:
            raise _limited("requests at a time", 1)
        if account.requests is not None:
            if wait := account.requests.wait(1, self._monotonic()):
                raise _limited("requests per minute", wait)
            account.requests.level -= 1
        account.in_progress += 1
        return Hold(account)

    def reserve(self, hold: Hold, tokens: int) -> None:
        """Counts the tokens that the request may cost. Raises `Refused`."""
        hold.reserve(tokens, self._monotonic())

    def __repr__(self) -> str:
        return f"Callers({len(self._by_digest)}, serial {self.serial})"


class SignedFile:
    """A signed list in a file, which is checked for changes."""

    def __init__(self, path: Path, signed_by: bytes) -> None:
        self._path = path
        self._signed_by = signed_by
        self._seen = self._state()

    def load(self) -> CallerList:
        """Raises `CallersError`."""
        return CallerList.load(self._path, self._signed_by)

    def refresh(self, callers: Callers, *, force: bool = False) -> None:
        """Uses the file if it changed. A list that cannot be used changes nothing, and the log states the reason."""
        state = self._state()
        if state == self._seen and not force:
            return
        self._seen = state
        try:
            callers.replace(self.load())
        except CallersError as error:
            _log.error(
                "%(file)s is not used, and the callers stay as they are: %(reason)s",
                {"file": self._path, "reason": error},
            )
        except Exception as error:
            # A fault of ours must not end the checks: a revocation would be missed.
            _log.error("%(file)s is not used: %(kind)s", {"file": self._path, "kind": type(error).__name__})
        else:
            _log.info("%(callers)s are in use", {"callers": repr(callers)})

    def _state(self) -> tuple[object, ...]:
        found: list[object] = []
        for path in (self._path, self._path.with_name(self._path.name + ".sig")):
            try:
                about = path.stat()
                found.append((about.st_ino, about.st_size, about.st_mtime_ns))
                if stat.S_ISBLK(about.st_mode):
                    with _opened(path) as descriptor:
                        found.append(disk.head(descriptor))
            except OSError:
                found.append(None)
        return tuple(found)


def _contents(path: Path) -> tuple[bytes, str]:
    """A list and its signature: from a file and its `.sig`, or from a disk. Raises `OSError`, `UnicodeDecodeError`."""
    with _opened(path) as descriptor:
        found = disk.unpack(descriptor)
        if found is not None:
            return found
        data = _read(descriptor)
    with _opened(path.with_name(path.name + ".sig")) as descriptor:
        return data, _read(descriptor).decode().strip()


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    """Opens a regular file or a block device, nothing else: a pipe would never end."""
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC
    kind = path.stat().st_mode
    descriptor = os.open(path, flags | (os.O_DIRECT if stat.S_ISBLK(kind) else 0))
    try:
        if stat.S_IFMT(os.fstat(descriptor).st_mode) not in (stat.S_IFREG, stat.S_IFBLK):
            raise OSError("neither a file nor a disk")
        yield descriptor
    finally:
        os.close(descriptor)


def _read(descriptor: int) -> bytes:
    with open(descriptor, "rb", closefd=False) as file:
        data = file.read(disk.LARGEST + 1)
    if len(data) > disk.LARGEST:
        raise OSError("too large")
    return data


def _limited(what: str, wait: float) -> Refused:
    seconds = max(1, math.ceil(wait))
    message = f"Your API key's {what} are used up. Try again in {seconds} s."
    return Refused(Refusal(429, message, "rate_limit_exceeded", retry_after_s=seconds))


def expires_text(caller: Caller) -> str:
    """When the caller's key expires, for people."""
    if caller.expires is None:
        return "never"
    return caller.expires.astimezone(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
