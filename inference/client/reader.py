"""The reader of one sealed answer: it opens the bytes as they come and checks the receipt at their end."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from http import HTTPStatus

from adytum.inference.channel import bhttp, ohttp
from adytum.inference.channel.bhttp import Content, ResponseHead, Trailers
from adytum.inference.channel.errors import ChannelError, TruncatedMessage
from adytum.inference.channel.limits import DEFAULT_LIMITS
from adytum.inference.channel.receipts import TRAILER, Receipt
from adytum.inference.client.errors import ResponseCut, ResponseForged

# An answer is opened as it arrives and not kept, so a long stream may exceed the bounds of one message. The bucket of
# the largest whole answers is 2 MiB wide, so their padding can be as long.
ANSWER_LIMITS = replace(DEFAULT_LIMITS, message=1 << 30, chunks=1 << 22, padding=1 << 21)


@dataclass(frozen=True, repr=False)
class Expected:
    """What the receipt of an answer has to contain, and the attested key that must have signed it."""

    enc: bytes
    request: bytes
    keys: bytes
    signed_by: bytes
    weights: Mapping[str, bytes]

    def check(self, token: bytes | None, response: bytes, status: int) -> Receipt | None:
        """The checked receipt, or `None` for a refused API key (401), the only answer without one.

        `response` is the SHA-256 of the content. Raises `ResponseForged`.
        """
        if token is None:
            if status == HTTPStatus.UNAUTHORIZED:
                return None
            raise _unreceipted("there is none")
        try:
            receipt = Receipt.verify(token, self.signed_by)
        except ChannelError as error:
            raise _unreceipted(str(error)) from error
        spent = receipt.spent
        for name, found, wanted in (
            ("the encapsulated key", receipt.enc, self.enc),
            ("the request", receipt.request, self.request),
            ("the key configuration", receipt.keys, self.keys),
            ("the answer's content", receipt.response, response),
            ("the status", receipt.status, status),
            ("the model's weights", spent and self.weights.get(spent.model, b""), spent and spent.weights),
        ):
            if found != wanted:
                raise _unreceipted(f"{name} differs")
        return receipt


class ResponseReader:
    """Opens one answer: `feed()` its bytes as they arrive, then `finish()`. Only `finish()` proves that it is whole."""

    def __init__(self, opener: ohttp.ResponseOpener, expected: Expected) -> None:
        self._opener = opener
        self._expected = expected
        self._hash = hashlib.sha256()
        self.receipt_token: bytes | None = None
        """The receipt as it was signed, for callers that keep it."""
        self.receipt: Receipt | None = None
        """The checked receipt. Set once `ended`, unless the API key was refused (401)."""
        self._decoder = bhttp.Decoder("response", ANSWER_LIMITS)
        self.head: ResponseHead | None = None
        """Status and header fields, as soon as they are readable."""
        self.ended = False
        """Whether the whole answer was opened and its receipt checked."""

    def feed(self, data: bytes) -> bytes:
        """Content that became readable. Raises `ResponseForged`."""
        try:
            plain = self._opener.feed(data)
            return self._content(self._decoder.feed(plain)) if plain else b""
        except ChannelError as error:
            raise _forged(error) from error

    def finish(self) -> bytes:
        """The last content, after the outer answer has ended. Raises `ResponseCut`, `ResponseForged`."""
        try:
            plain = self._opener.finish()
            events = self._decoder.feed(plain) if plain else []
            content = self._content(events + self._decoder.finish())
        except TruncatedMessage as error:
            raise cut() from error
        except ChannelError as error:
            raise _forged(error) from error
        if self.head is None:
            raise cut()
        self.receipt = self._expected.check(self.receipt_token, self._hash.digest(), self.head.status)
        self.ended = True
        return content

    def _content(self, events: list[bhttp.Event]) -> bytes:
        if len(events) == 1 and isinstance(events[0], Content):
            data = events[0].data
        else:
            for event in events:
                if isinstance(event, ResponseHead):
                    self.head = event
                elif isinstance(event, Trailers):
                    self.receipt_token = bhttp.field(event.fields, TRAILER)
            data = b"".join(event.data for event in events if isinstance(event, Content))
        self._hash.update(data)
        return data

    def __repr__(self) -> str:
        return "ResponseReader(...)"


def cut() -> ResponseCut:
    """The error for an answer that lacks its end."""
    return ResponseCut("The answer ended before its authenticated end, so it is not whole. Send the request again.")


def _forged(error: ChannelError) -> ResponseForged:
    return ResponseForged(
        f"The answer is not what the verified backend sealed for this request ({error}). Its content was not used. "
        "Something between this client and the backend changes traffic."
    )


def _unreceipted(why: str) -> ResponseForged:
    return ResponseForged(
        f"The answer's receipt is not the one that the verified backend has to sign: {why}. Do not rely on the answer, "
        "and ask the backend's operator."
    )
