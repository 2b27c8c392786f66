"""Reads binary structures: every length is checked against the bytes that are there. Pure."""

import struct
from typing import Any, Literal

from adytum.attestation.core.errors import AttestationError, EvidenceError


class Reader:
    """Takes a structure apart from its beginning. A structure that is too short or too long raises `error`, with `what`
    in the message. `order` is the byte order of the integers that `integer` and `sized` read."""

    def __init__(
        self,
        data: bytes,
        what: str,
        *,
        order: Literal["little", "big"] = "little",
        error: type[AttestationError] = EvidenceError,
    ) -> None:
        self._data = data
        self._what = what
        self._order = order
        self._error = error
        self.at = 0
        """Bytes taken so far."""

    @property
    def left(self) -> int:
        """Bytes not taken yet."""
        return len(self._data) - self.at

    def take(self, size: int) -> bytes:
        """The next `size` bytes."""
        if size > self.left:
            raise self._error(f"{self._what} ends before it is complete")
        self.at += size
        return self._data[self.at - size : self.at]

    def unpack(self, form: str) -> tuple[Any, ...]:
        """The next fields, in a form of the module `struct`."""
        return struct.unpack(form, self.take(struct.calcsize(form)))

    def integer(self, size: int) -> int:
        """The next unsigned integer, of `size` bytes."""
        return int.from_bytes(self.take(size), self._order)

    def sized(self, size: int) -> bytes:
        """The next field, after its length in `size` bytes."""
        return self.take(self.integer(size))

    def end(self, last: str | None = None) -> None:
        """Raises if bytes are left. `last` names what they follow, if it is not the whole structure."""
        if self.left:
            raise self._error(f"something follows {last or self._what}")
