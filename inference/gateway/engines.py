"""The engines as the gateway sees them: HTTP over a Unix socket each."""

from pathlib import Path
from types import TracebackType
from typing import Self

import aiohttp

from inference.channel.bhttp import Fields
from inference.gateway.admission import EngineCall

# The allow-list of an answer's header fields: nothing else that an engine says about itself is passed on.
_PASSED = ("content-type", "retry-after")
_CONNECT_SECONDS = 2.0
# Less than what the engines keep an idle connection for (`inference/engine/process.py`), so that a request never meets
# a connection that its engine is just closing.
_KEEP_SECONDS = 60.0
_JSON = {"Content-Type": "application/json"}


class EngineUnavailable(Exception):
    """The engine did not take the request, or went away before its answer began."""


class Engines:
    """A pool of connections per model. `sockets`: path by model id. An async context manager."""

    def __init__(self, sockets: dict[str, Path]) -> None:
        self._sockets = sockets
        self._sessions: dict[str, aiohttp.ClientSession] = {}

    async def __aenter__(self) -> Self:
        # No total time: an answer may take as long as its model needs. A dead engine closes its socket.
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_SECONDS)
        for name, path in self._sockets.items():
            self._sessions[name] = aiohttp.ClientSession(
                connector=aiohttp.UnixConnector(str(path), limit=0, keepalive_timeout=_KEEP_SECONDS),
                timeout=timeout,
                auto_decompress=False,
                cookie_jar=aiohttp.DummyCookieJar(),
                skip_auto_headers=("User-Agent", "Accept-Encoding"),
            )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for session in self._sessions.values():
            await session.close()

    async def send(self, call: EngineCall) -> aiohttp.ClientResponse:
        """The engine's answer once its header is there; the caller closes it. Raises `EngineUnavailable`."""
        try:
            return await self._sessions[call.model.id].post(
                f"http://engine{call.path}", data=call.body, headers=_JSON, allow_redirects=False
            )
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise EngineUnavailable from error


def passed_fields(answer: aiohttp.ClientResponse) -> Fields:
    """The header fields of an engine's answer that the client gets."""
    return tuple((name.encode(), answer.headers[name].encode()) for name in _PASSED if name in answer.headers)
