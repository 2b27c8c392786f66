"""Who may use the proxy: programs on this machine, and web pages of the origins that the operator allows.

A request is refused if its Host is a foreign name (DNS rebinding) or if a page of another origin makes it.
"""

import ipaddress
import json
from collections.abc import Awaitable, Callable, Iterable, Mapping

from aiohttp import hdrs, web

_LOOPBACK = frozenset(("localhost", "127.0.0.1", "[::1]"))
_PREFLIGHT_S = 600
"""Seconds for which a browser may remember a preflight's answer."""


def error_response(
    status: int,
    message: str,
    code: str,
    *,
    kind: str = "invalid_request_error",
    headers: Mapping[str, str] | None = None,
) -> web.Response:
    """An error that both OpenAI's and Anthropic's clients understand."""
    error = {"message": message, "type": kind, "param": None, "code": code}
    # "type" at the top is where Anthropic's clients look; OpenAI's ignore it.
    return json_response({"type": "error", "error": error}, status, headers)


def json_response(document: object, status: int = 200, headers: Mapping[str, str] | None = None) -> web.Response:
    """A JSON document, without the charset that `web.json_response` adds: JSON has none (RFC 8259, 11)."""
    fields = {hdrs.CONTENT_TYPE: "application/json", **(headers or {})}
    return web.Response(body=json.dumps(document).encode(), status=status, headers=fields)


class Guard:
    """Refuses requests of foreign web pages, and tells browsers which pages are allowed."""

    def __init__(self, bound: str, hosts: Iterable[str], origins: Iterable[str]) -> None:
        """`bound` is the address that the proxy listens on, `hosts` are further names that callers may use for it,
        `origins` those whose web pages may use it."""
        self._hosts = {*_LOOPBACK, in_url(bound.lower()), *(in_url(name.lower()) for name in hosts)}
        # Rebinding needs a name; a proxy that listens everywhere is reached by addresses that are not known beforehand.
        self._any_address = bound in ("0.0.0.0", "::")  # noqa: S104 - compared, not bound
        self._origins = frozenset(origins)

    @web.middleware
    async def check(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        """Refuses a request, answers a preflight (Fetch standard, 3.3), or passes the request on."""
        if refused := self._refuses(request):
            return error_response(403, refused, "forbidden", kind="permission_error")
        asked = request.headers.get(hdrs.ACCESS_CONTROL_REQUEST_METHOD)
        if request.method != hdrs.METH_OPTIONS or asked is None or hdrs.ORIGIN not in request.headers:
            return await handler(request)
        headers: dict[str, str] = {
            hdrs.ACCESS_CONTROL_ALLOW_METHODS: "GET, POST",
            hdrs.ACCESS_CONTROL_MAX_AGE: str(_PREFLIGHT_S),
        }
        if wanted := request.headers.get(hdrs.ACCESS_CONTROL_REQUEST_HEADERS):
            headers[hdrs.ACCESS_CONTROL_ALLOW_HEADERS] = wanted
        if asked not in (hdrs.METH_GET, hdrs.METH_POST):
            return error_response(400, "The API takes GET and POST.", "method_not_allowed", headers=headers)
        return web.Response(text="OK", headers=headers)

    async def finish(self, request: web.Request, response: web.StreamResponse) -> None:
        """For `on_response_prepare`: lets a page of an allowed origin read the answer, and removes the Server field."""
        response.headers.popall(hdrs.SERVER, None)
        origin = request.headers.get(hdrs.ORIGIN)
        if origin in self._origins:
            response.headers[hdrs.ACCESS_CONTROL_ALLOW_ORIGIN] = origin
        if self._origins:
            response.headers.add(hdrs.VARY, hdrs.ORIGIN)

    def _refuses(self, request: web.Request) -> str | None:
        hosts = request.headers.getall(hdrs.HOST, [""])
        if not all(self._is_ours(_host_name(host)) for host in hosts):
            return "This proxy answers to localhost and the address it listens on only. Use http://localhost:<port>/v1."
        origins = request.headers.getall(hdrs.ORIGIN, [])
        if not self._origins.issuperset(origins):
            return "This proxy does not serve web pages: the request's Origin is not allowed."
        if not origins and request.headers.get("Sec-Fetch-Site") in ("cross-site", "same-site"):
            return "This proxy does not serve web pages: the request comes from another site."
        return None

    def _is_ours(self, name: str) -> bool:
        return name in self._hosts or (self._any_address and is_address(name))


def _host_name(host: str) -> str:
    if host.startswith("["):
        return host.partition("]")[0].lower() + "]"
    return host.partition(":")[0].lower()


def in_url(address: str) -> str:
    """An address or name as in a URL: IPv6 in brackets."""
    return f"[{address}]" if ":" in address and not address.startswith("[") else address


def is_address(name: str) -> bool:
    """Whether it is an IP address, with or without brackets."""
    try:
        ipaddress.ip_address(name.strip("[]"))
    except ValueError:
        return False
    return True
