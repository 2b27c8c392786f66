"""Strict JSON: one value has one encoding, and each field is present once, with its exact type.

Strings are visible ASCII without `"` and `\\`. So the canonical form needs no escapes, sorting is by bytes, and no
text from a document can control a terminal.
"""

import base64
import binascii
import json
import re
from collections.abc import Callable
from typing import NoReturn, TypeVar

from adytum.attestation.core.errors import EvidenceError

T = TypeVar("T")
_TEXT = re.compile(r"[!#-\[\]-~]+")
_HEX = re.compile(r"(?:[0-9a-f]{2})+")
_LARGEST_INTEGER = 2**53 - 1
"""The largest that every JSON reader holds exactly."""


def encode(value: object) -> bytes:
    """The canonical form: sorted keys, no white space, ASCII."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii")


def decode(data: bytes, what: str, limit: int) -> object:
    """The JSON value in `data`, which has to be in canonical form. Raises `EvidenceError`."""
    value = read(data, what, limit)
    if encode(value) != data:
        raise EvidenceError(f"{what} is not in canonical form (sorted keys, no white space, nothing after the end)")
    return value


def read(data: bytes, what: str, limit: int) -> object:
    """The JSON value in `data`, with white space and order free: for files that are hashed or signed as bytes."""
    if len(data) > limit:
        raise EvidenceError(f"{what} has {len(data)} bytes, more than {limit}")
    try:
        value: object = json.loads(
            data.decode("utf-8"), object_pairs_hook=unique, parse_constant=_no_constant, parse_float=_no_float
        )
        # Nesting that is read but too deep to be written again counts as unreadable.
        encode(value)
    except (ValueError, RecursionError) as error:
        raise EvidenceError(f"{what} is not JSON that can be read: {type(error).__name__}") from error
    return value


def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """A hook for `json.loads`: one object, each of whose fields is there once. Raises `EvidenceError`."""
    result = dict(pairs)
    if len(result) != len(pairs):
        raise EvidenceError("a JSON object has the same field twice")
    return result


def _no_constant(name: str) -> NoReturn:
    raise EvidenceError("a JSON number is not finite")


def _no_float(text: str) -> NoReturn:
    raise EvidenceError("a JSON number is not an integer")


def base64_text(data: bytes) -> str:
    """Bytes as base64, with padding."""
    return base64.b64encode(data).decode("ascii")


class Fields:
    """One JSON object, whose fields have to be exactly `names`. Every method raises `EvidenceError`."""

    def __init__(self, value: object, what: str, names: frozenset[str]) -> None:
        if not isinstance(value, dict):
            raise EvidenceError(f"{what} is not a JSON object")
        missing, unknown = names - value.keys(), value.keys() - names
        if missing:
            raise EvidenceError(f"{what} lacks {', '.join(sorted(missing))}")
        if unknown:
            raise EvidenceError(f"{what} has {len(unknown)} fields that version 1 does not know")
        self._values: dict[str, object] = value
        self._what = what

    def _where(self, name: str) -> str:
        return f"{self._what}.{name}"

    def raw(self, name: str) -> object:
        """The JSON value, for the caller to read."""
        return self._values[name]

    def constant(self, name: str, expected: str | int) -> None:
        """Requires one exact value."""
        value = self._values[name]
        if type(value) is not type(expected) or value != expected:
            raise EvidenceError(f"{self._where(name)} is not {expected!r}")

    def text(self, name: str, limit: int) -> str:
        """A string of visible ASCII."""
        return text(self._values[name], self._where(name), limit)

    def choice(self, name: str, choices: frozenset[str]) -> str:
        """One of a closed set of words."""
        value = self._values[name]
        if not isinstance(value, str) or value not in choices:
            raise EvidenceError(f"{self._where(name)} is not one of {', '.join(sorted(choices))}")
        return value

    def integer(self, name: str, limit: int = _LARGEST_INTEGER) -> int:
        """A number from 0 to `limit`."""
        value = self._values[name]
        if type(value) is not int or not 0 <= value <= limit:
            raise EvidenceError(f"{self._where(name)} is not an integer from 0 to {limit}")
        return value

    def octets(self, name: str, limit: int) -> bytes:
        """Bytes in base64."""
        return octets(self._values[name], self._where(name), limit)

    def digest(self, name: str) -> bytes:
        """32 bytes in lower-case hexadecimal."""
        value = self._values[name]
        if not isinstance(value, str) or len(value) != 64 or not _HEX.fullmatch(value):
            raise EvidenceError(f"{self._where(name)} is not 64 lower-case hexadecimal digits")
        return bytes.fromhex(value)

    def items(self, name: str, limit: int, read: Callable[[object, str], T]) -> tuple[T, ...]:
        """A list, each element read by `read(value, where)`."""
        value = self._values[name]
        if not isinstance(value, list) or len(value) > limit:
            raise EvidenceError(f"{self._where(name)} is not a list of at most {limit}")
        return tuple(read(item, f"{self._where(name)}[{place}]") for place, item in enumerate(value))


def text(value: object, where: str, limit: int) -> str:
    """A string of visible ASCII, not empty."""
    if not isinstance(value, str) or len(value) > limit or not _TEXT.fullmatch(value):
        raise EvidenceError(f"{where} is not a string of 1 to {limit} visible ASCII characters")
    return value


def octets(value: object, where: str, limit: int) -> bytes:
    """Bytes in base64 with padding, as one encoder would write them."""
    if not isinstance(value, str) or len(value) > (limit + 2) // 3 * 4:
        raise EvidenceError(f"{where} is not base64 of at most {limit} bytes")
    try:
        decoded = base64.b64decode(value.encode("ascii"), validate=True)
    except (binascii.Error, UnicodeEncodeError) as error:
        raise EvidenceError(f"{where} is not base64") from error
    if base64.b64encode(decoded).decode("ascii") != value or len(decoded) > limit:
        raise EvidenceError(f"{where} is not base64 of at most {limit} bytes in its one form")
    return decoded
