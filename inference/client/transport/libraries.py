"""The HTTP library of the caller: httpx2, or the classic httpx that openai 2, llama-index and haystack use.

The client of each library asserts that an answer and its stream are of its own classes, and SDKs only handle their own
library's exceptions. So answers and exceptions are made with the library of the request. httpx is not a dependency: a
program that makes requests with it has imported it. The sealed bytes always travel over httpx2.
"""

import json
import sys
from functools import cache
from types import ModuleType
from typing import TYPE_CHECKING, Any, NoReturn, TypeAlias, TypeVar

import httpx2

from adytum.inference.client.answers import BUSY
from adytum.inference.client.errors import (
    ClientError,
    NotVerified,
    RequestRefused,
    ResponseCut,
    UpstreamRefused,
    UpstreamUnreachable,
)
from adytum.inference.client.reader import ResponseReader

if TYPE_CHECKING:
    import httpx

    AsyncClassicBase = httpx.AsyncBaseTransport
    ClassicBase = httpx.BaseTransport
else:
    # For type checkers only: httpx does not check the class of a transport.
    AsyncClassicBase = ClassicBase = type("ClassicBase", (), {})

ClassicRequest: TypeAlias = "httpx.Request"
ClassicResponse: TypeAlias = "httpx.Response"
Request: TypeAlias = "httpx2.Request | httpx.Request"
Response: TypeAlias = "httpx2.Response | httpx.Response"
Stream = TypeVar("Stream")

_EXCEPTIONS: dict[type[ClientError], str] = {
    RequestRefused: "LocalProtocolError",
    NotVerified: "ConnectError",
    ResponseCut: "ReadError",
}
# A time-out that cuts an answer stays one, so that SDKs report it as such.
_KEPT: dict[type[ClientError], type[httpx2.TransportError]] = {
    UpstreamUnreachable: httpx2.TransportError,
    ResponseCut: httpx2.TimeoutException,
}
"""The kinds of cause that keep their own names, by our error."""


def library_of(request: Request) -> ModuleType:
    """The module of the request's library. Raises `TypeError` if the request is of neither."""
    for name in ("httpx2", "httpx"):
        library = sys.modules.get(name)
        if library is not None and isinstance(request, getattr(library, "Request", ())):
            return library
    kind = type(request)
    raise TypeError(
        f"This transport takes a request of httpx2 or httpx, not {kind.__module__}.{kind.__qualname__}. Nothing was "
        "sent. Give the transport to an httpx2 or httpx client; for any other library run `adytum proxy`."
    )


def answer(request: Request, reader: ResponseReader, stream: Any) -> Response:
    """The opened answer. `extensions["adytum"]` is its `ResponseReader`, whose `receipt` is set after the content."""
    assert reader.head is not None
    extensions = {"http_version": b"HTTP/1.1", "adytum": reader}
    found: Response = library_of(request).Response(
        reader.head.status, headers=list(reader.head.fields), stream=stream, extensions=extensions, request=request
    )
    return found


@cache
def stream_class(kind: type[Stream], base: type) -> type[Stream]:
    """`kind` as a subclass of a library's base class for streams."""
    return type(kind.__name__, (kind, base), {})


def raise_to(request: Request, error: ClientError) -> NoReturn:
    """Raises an exception of the request's library, with `error` as its cause."""
    kind = getattr(library_of(request), _exception(error))
    raise kind(str(error), request=request) from error


def _exception(error: ClientError) -> str:
    kept = _KEPT.get(type(error))
    if kept is not None and isinstance(error.__cause__, kept):
        # An inner transport may raise a subclass of its own, which neither library has.
        names = (kind.__name__ for kind in type(error.__cause__).__mro__)
        return next(name for name in names if hasattr(httpx2, name))
    return _EXCEPTIONS.get(type(error), "RemoteProtocolError")


def busy_or_raise(request: Request, error: ClientError) -> Response:
    """An answer for a backend that has no capacity now; any other error is raised."""
    if not isinstance(error, UpstreamRefused) or error.status not in BUSY:
        raise_to(request, error)
    kind = "rate_limit_error" if error.status == 429 else "server_error"
    body = {"error": {"message": str(error), "type": kind, "param": None, "code": "upstream_busy"}}
    headers = {"content-type": "application/json"}
    if error.retry_after is not None:
        headers["retry-after"] = str(error.retry_after)
    found: Response = library_of(request).Response(
        error.status, headers=headers, content=json.dumps(body).encode(), request=request
    )
    return found
