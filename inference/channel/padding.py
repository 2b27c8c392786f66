"""Padding to buckets, so that a length on the wire reveals less about the content.

A stream's events and whole answers are padded inside the seal. Stream padding is an SSE comment, which every SSE client
ignores (WHATWG HTML, 9.2.6). A JSON answer is followed by spaces, which every JSON parser ignores. Binary HTTP has its
own padding of zero bytes (RFC 9292, 3.8), but only at a message's end.
"""

from enum import StrEnum

EVENT_BUCKET = 512
"""Bytes. The event of one token fits into one bucket for every model."""
MESSAGE_BUCKET = 1024
"""Bytes. The smallest step for whole messages."""
_EVENT_END = b"\n\n"
# The smallest padding block: a colon and the blank line that ends it.
_COMMENT_LENGTH = 3


class Padding(StrEnum):
    """The modes, by their names in the configuration and in the evidence."""

    OFF = "off"
    PAD = "pad"
    CONSTANT = "constant"
    """Cells (`shaping.py`). Their size, number and cadence are configured beside this name."""


def bucket(length: int) -> int:
    """The padded length of a whole message: steps of 1 KiB, then of an eighth of the next lower power of two.

    At most an eighth is added beyond 8 KiB, and the number of distinct lengths grows with the logarithm.
    """
    step = max(MESSAGE_BUCKET, 1 << max(0, length.bit_length() - 4))
    return -(-length // step) * step


def pad_json(body: bytes) -> bytes:
    """A JSON text, followed by spaces up to its bucket."""
    return body + b" " * (bucket(len(body)) - len(body))


class EventPadder:
    """Pads a stream of server-sent events. Each call of `feed` takes what is ready together.

    Only whole events are returned. The start of an unfinished event is held back, so that the comment never falls
    inside an event.
    """

    def __init__(self, mode: Padding) -> None:
        if mode is Padding.CONSTANT:
            raise ValueError("a padder does not make cells: use CellStream")
        self._pad = mode is Padding.PAD
        self._held = b""

    def feed(self, data: bytes) -> bytes:
        """The events that are complete by now, padded. Empty if none is."""
        if not self._pad:
            return data
        if self._held:
            data = self._held + data
            self._held = b""
        if not data.endswith(_EVENT_END):
            end = data.rfind(_EVENT_END) + 2
            if end < 2:
                self._held = data
                return b""
            self._held = data[end:]
            data = data[:end]
        room = -(len(data) + _COMMENT_LENGTH) % EVENT_BUCKET
        return b"%b:%*b\n\n" % (data, room, b"")

    def finish(self) -> bytes:
        """The rest of a stream that did not end with a whole event, unpadded."""
        held, self._held = self._held, b""
        return held
