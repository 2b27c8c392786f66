"""What lengths tell, and how much of it is taken away.

A stream's events and whole answers are padded to buckets inside the seal. Stream padding is an SSE comment, which
every SSE client ignores (WHATWG HTML, 9.2.6); a JSON answer is followed by spaces, which every JSON parser ignores;
binary HTTP has zero bytes of its own (RFC 9292, 3.8) but only at a message's end.
"""

from enum import StrEnum

EVENT_BUCKET = 512
"""Bytes; the event of one token in any model's stream fits in one bucket."""
MESSAGE_BUCKET = 1024
"""Bytes; smallest step for whole messages."""
_EVENT_END = b"\n\n"
# The smallest padding block: a colon and the blank line that ends it.
_COMMENT_LENGTH = 3


class Padding(StrEnum):
    """Modes, as they stand in the configuration and in the evidence."""

    OFF = "off"
    PAD = "pad"
    CONSTANT = "constant"
    """Cells (`inference/channel/shaping.py`), of which more than the name has to be known."""


def bucket(length: int) -> int:
    """The padded length of a whole message: steps of 1 KiB, then of an eighth of the next lower power of two.

    At most an eighth is added beyond 8 KiB, and the number of distinct lengths grows with the logarithm.
    """
    step = max(MESSAGE_BUCKET, 1 << max(0, length.bit_length() - 4))
    return -(-length // step) * step


def pad_json(body: bytes) -> bytes:
    """A JSON text with spaces behind it up to its bucket."""
    return body + b" " * (bucket(len(body)) - len(body))


class EventPadder:
    """Pads a stream of server-sent events, called with what is ready together.

    Only whole events leave; the start of one whose end has not come yet is held back, so that the comment never
    falls inside an event.
    """

    def __init__(self, mode: Padding) -> None:
        if mode is Padding.CONSTANT:
            raise ValueError("cells are not made by a padder")
        self._pad = mode is Padding.PAD
        self._held = b""

    def feed(self, data: bytes) -> bytes:
        """The whole events in what came so far, padded; empty where there is none."""
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
        """What is left of a stream that did not end with a whole event."""
        held, self._held = self._held, b""
        return held
