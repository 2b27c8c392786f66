"""One table of errors and their answers.

Before a request is open, the answer is a problem document (RFC 9457) with a fixed text and no cause. Afterwards it is
an error in OpenAI's shape, sealed like any answer.
"""

import json
from dataclasses import dataclass
from email.utils import formatdate
from http import HTTPStatus

from fastapi.responses import Response
from starlette.types import Receive, Scope, Send

from adytum.inference.channel import ehbp
from adytum.inference.channel.bhttp import Fields
from adytum.inference.channel.errors import ChannelError, MessageTooLarge, OpenFailed, UnknownKey
from adytum.inference.gateway.keys import Replayed

PROBLEM_JSON = "application/problem+json"
OHTTP_KEY_PROBLEM = "https://iana.org/assignments/http-problem-types#ohttp-key"
DATE_PROBLEM = "https://iana.org/assignments/http-problem-types#date"
RETRY_AFTER_S = 5


@dataclass(frozen=True)
class Problem:
    """An answer in the clear, as an ASGI application. It says nothing but its `title`."""

    status: int
    title: str
    type: str = "about:blank"
    retry_after_s: int | None = None

    def response(self) -> Response:
        """As an HTTP response. `error` repeats the title, because OpenAI's clients look for a message there."""
        document = {
            "type": self.type,
            "title": self.title,
            "status": self.status,
            "error": {"message": self.title, "type": "invalid_request_error", "param": None, "code": None},
        }
        headers = {"Cache-Control": "no-store"}
        if self.retry_after_s is not None:
            headers["Retry-After"] = str(self.retry_after_s)
        return Response(json.dumps(document), self.status, headers, PROBLEM_JSON)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self.response()(scope, receive, send)


UNKNOWN_KEY = Problem(
    422, "The request was sealed to a key that this backend does not hold. Fetch the keys again.", OHTTP_KEY_PROBLEM
)
EHBP_UNKNOWN_KEY = Problem(422, UNKNOWN_KEY.title, ehbp.KEY_CONFIG_PROBLEM)
UNOPENED = Problem(400, "The sealed request could not be opened.")
TOO_LARGE = Problem(413, "The sealed request is larger than this backend takes.")
REPLAYED = Problem(409, "This sealed request was answered before. Seal it again.")
SLOW = Problem(408, "The sealed request did not arrive in time.")
BUSY = Problem(503, "All request slots are taken. Try again shortly.", retry_after_s=RETRY_AFTER_S)
NOT_READY = Problem(503, "The backend is not serving yet; /readyz shows its step.", retry_after_s=RETRY_AFTER_S)
BAD_NONCE = Problem(400, "A nonce of 64 lower-case hexadecimal digits is required: ?nonce=<64 hex digits>.")
NO_EVIDENCE = Problem(503, "Evidence is not available; /readyz shows the step.", retry_after_s=RETRY_AFTER_S)
EVIDENCE_BUSY = Problem(503, "Too many clients ask for evidence. Try again shortly.", retry_after_s=RETRY_AFTER_S)
WRONG_MEDIA_TYPE = Problem(
    415, "Send message/ohttp-chunked-req or message/ohttp-req here; GET this path for the keys to seal it with."
)
PLAINTEXT_REFUSED = Problem(
    400,
    "This backend opens sealed requests only, and nothing was forwarded. Use the adytum proxy or client, Oblivious "
    "HTTP at /.well-known/ohttp-gateway, or EHBP with the key from /.well-known/hpke-keys.",
    "urn:adytum:problem:plaintext-refused",
)
FAULT = Problem(500, "The backend failed before the request was open. Nothing about the cause is disclosed.")
NOT_FOUND = Problem(404, "There is nothing at this path.")
METHOD_NOT_ALLOWED = Problem(405, "This path does not take this method.")


def of_channel(error: ChannelError | Replayed | TimeoutError, *, is_ehbp: bool = False) -> Problem:
    """The problem for an exception raised while a request was being opened."""
    # A ciphertext that does not open counts as sealed to an unknown key: a restart may give its identifier to another.
    if isinstance(error, UnknownKey | OpenFailed):
        return EHBP_UNKNOWN_KEY if is_ehbp else UNKNOWN_KEY
    if isinstance(error, MessageTooLarge):
        return TOO_LARGE
    if isinstance(error, Replayed):
        return REPLAYED
    if isinstance(error, TimeoutError):
        return SLOW
    return UNOPENED


@dataclass(frozen=True)
class Refusal:
    """An answer inside the seal."""

    status: int
    message: str
    code: str | None = None
    param: str | None = None
    retry_after_s: int | None = None
    problem: str | None = None
    """The type of a problem document (RFC 9457), if a standard defines one."""
    date: float | None = None
    """Sent as `Date`, Unix seconds."""

    def fields(self) -> Fields:
        """The answer's header."""
        fields = [(b"content-type", (b"application/json", PROBLEM_JSON.encode())[self.problem is not None])]
        if self.retry_after_s is not None:
            fields.append((b"retry-after", b"%d" % self.retry_after_s))
        if self.date is not None:
            fields.append((b"date", formatdate(self.date, usegmt=True).encode()))
        return tuple(fields)

    def body(self) -> bytes:
        """OpenAI's error shape, inside a problem document if `problem` is set."""
        kind = {401: "authentication_error", 404: "not_found_error"}.get(
            self.status, "invalid_request_error" if self.status < HTTPStatus.INTERNAL_SERVER_ERROR else "server_error"
        )
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        # Anthropic's clients look for "type" at the top; OpenAI's ignore it.
        top = {"type": "error"} if self.problem is None else {"type": self.problem, "title": self.message}
        return json.dumps({**top, "error": error}).encode()

    def event(self) -> bytes:
        """The error as the last event of a stream that has already begun."""
        return b"data: " + self.body() + b"\n\n"


def of_engine(body: bytes) -> bytes:
    """An engine's 400, with OpenAI's code if the prompt exceeds the context; any other body unchanged."""
    try:
        document = json.loads(body)
        error = document["error"]
        # vLLM's own code is always the number 400; only the parameter identifies the error.
        if error["param"] not in ("input_tokens", "input_text"):
            return body
    except (ValueError, KeyError, TypeError, RecursionError):
        return body
    error["code"] = "context_length_exceeded"
    return json.dumps(document).encode()


class Refused(Exception):
    """Carries a refusal. Each raise makes a new object: a traceback keeps its frames alive, and with them a request's
    content."""

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(refusal.code)
        self.refusal = refusal


ENGINE_DOWN = Refusal(503, "The model's engine is not answering. Try again shortly.", "engine_unavailable")
ENGINE_CUT = Refusal(502, "The model's engine stopped before the answer was complete.", "engine_failed")
ENGINE_TOO_LARGE = Refusal(502, "The model's answer is larger than this backend passes on.", "answer_too_large")
INTERNAL = Refusal(500, "The backend failed while answering. Nothing about the cause is disclosed.", "internal_error")
MALFORMED_INNER = Refusal(400, "The opened message is not a binary HTTP request.", "malformed_request")
STREAM_NEEDS_CHUNKS = Refusal(
    400, 'A stream cannot be sealed in one piece: send message/ohttp-chunked-req, or "stream": false.', param="stream"
)
TOO_MANY_TO_REMEMBER = Refusal(
    503,
    "More requests came than can be told from replays. Try again shortly.",
    "overloaded",
    retry_after_s=RETRY_AFTER_S,
)
BAD_KEY = Refusal(401, "Incorrect API key provided.", "invalid_api_key")


def date_needed(now: float) -> Refusal:
    """For a request that needs a `Date` near `now`, in Unix seconds, and has none (RFC 9458, 6.5.2)."""
    return Refusal(
        400,
        "Too many requests were sealed to this key to remember each. Send the header Date inside the sealed request, "
        "within a minute of the Date of this answer; or fetch the keys again once they have rotated.",
        "date_needed",
        problem=DATE_PROBLEM,
        date=now,
    )
