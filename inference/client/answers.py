"""Answers in the clear and the errors they become. They are not authenticated, so none is ever passed on as content."""

import json
import re
from http import HTTPStatus

from adytum.inference.channel import ohttp
from adytum.inference.client.errors import ClientError, NotVerified, ResponseForged, UpstreamRefused
from adytum.inference.client.origin import Origin, printable

PROBLEM_LIMIT = 64 * 1024
"""At most this many bytes of an answer in the clear are read."""
OHTTP_KEY_PROBLEM = "https://iana.org/assignments/http-problem-types#ohttp-key"
BUSY = frozenset((429, 503))
"""Statuses that ask for the same request again, later."""


def is_sealed(status: int, content_type: str | None) -> bool:
    """Whether an outer answer is a sealed one."""
    return status == 200 and _media_type(content_type) == ohttp.CHUNKED.response


def refusal(origin: Origin, status: int, content_type: str | None, retry_after: str | None, body: bytes) -> ClientError:
    """The error for an answer in the clear. `retry_after` and `body` are not authenticated."""
    if 200 <= status <= 299:
        return ResponseForged(
            f"{origin} answered {status} without sealing, which no adytum backend does; the answer was not used. "
            "Check the address, and any proxy in front of the backend."
        )
    if 300 <= status <= 399:
        return UpstreamRefused(
            f"{origin} answered with a redirect ({status}), and redirects are not followed. Use the final address as "
            "the upstream.",
            status=status,
        )
    kind, title = "about:blank", ""
    is_problem = _media_type(content_type) == "application/problem+json"
    if is_problem:
        kind, title = _problem(body)
    seconds = int(retry_after) if retry_after is not None and re.fullmatch(r"[0-9]{1,5}", retry_after) else None
    said = f', saying "{title}"' if title else ""
    when = f" Try again in {seconds} s." if seconds is not None else ""
    return UpstreamRefused(
        f"{origin} answered {status} before it opened the request{said} (this is not authenticated).{when}",
        status=status,
        problem_type=kind,
        retry_after=seconds,
        unopened=is_problem and (status == HTTPStatus.SERVICE_UNAVAILABLE or kind == OHTTP_KEY_PROBLEM),
    )


def key_is_unknown(error: ClientError) -> bool:
    """Whether the backend no longer holds the key, so that the client has to ask for evidence again."""
    return isinstance(error, UpstreamRefused) and error.problem_type == OHTTP_KEY_PROBLEM


def no_evidence(origin: Origin, error: ClientError) -> ClientError:
    """The error for an answer other than a document to a request for evidence."""
    if isinstance(error, UpstreamRefused) and error.status in (404, 405):
        return NotVerified(f"{origin} offers no evidence, so it is not an adytum backend. Check the address.")
    return error


def _problem(body: bytes) -> tuple[str, str]:
    try:
        document = json.loads(body)
    except (ValueError, RecursionError):
        document = None
    if not isinstance(document, dict):
        return "about:blank", ""
    kind, title = document.get("type"), document.get("title")
    return (
        printable(kind) if isinstance(kind, str) and kind else "about:blank",
        printable(title) if isinstance(title, str) else "",
    )


def _media_type(content_type: str | None) -> str:
    return (content_type or "").partition(";")[0].strip().lower()
