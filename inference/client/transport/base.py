"""What both transports share: everything but the calls that wait, and the two kinds of lock and shield."""

import os
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, Generic, TypeVar

import anyio
import httpx2

from adytum.attestation.core.trust import TrustRoots
from adytum.attestation.policy.policy import Policy
from adytum.inference.client.answers import is_sealed, refusal
from adytum.inference.client.errors import ClientError, RequestRefused, ResponseCut, UpstreamUnreachable
from adytum.inference.client.reader import ResponseReader, cut
from adytum.inference.client.session import RECHECK_S, SEALED_HEADERS, Challenge, Session, Upstream
from adytum.inference.client.transport.libraries import Request, library_of
from adytum.inference.client.workspace import Workspace

EVIDENCE_SECONDS = 30.0
"""For each network operation while evidence is fetched: devices can take seconds to produce it."""

# Shorter than the five seconds after which uvicorn, the backend's server, closes an idle connection: a request that is
# sent at that moment would fail.
POOL_LIMITS = httpx2.Limits(max_connections=None, max_keepalive_connections=64, keepalive_expiry=4.0)

AsyncLock, Lock = anyio.Lock, threading.Lock


def AsyncShield() -> anyio.CancelScope:
    """Lets a cancelled task close its connection."""
    return anyio.CancelScope(shield=True)


Shield = nullcontext
Inner = TypeVar("Inner", httpx2.BaseTransport, httpx2.AsyncBaseTransport)


class Transport(ABC, Generic[Inner]):
    """What both transports share."""

    def __init__(
        self,
        upstream: str,
        policy: Policy,
        trust: TrustRoots | None = None,
        api_key: str | None = None,
        workspace: str | os.PathLike[str] | None = None,
        kem: str | None = None,
        inner: Inner | None = None,
        recheck_s: float = RECHECK_S,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`api_key` replaces the credentials that the caller sends; `kem` allows only this one (`session.KEMS`);
        `inner` is the httpx2 transport that carries the sealed bytes, for example one with TLS settings of your own.

        Raises `ValueError` for an invalid `upstream` or `kem`, `OSError` if the `workspace` cannot be created.
        """
        record = Workspace(workspace).record if workspace is not None else None
        self._upstream = Upstream(
            upstream, policy=policy, trust=trust, kem=kem, recheck_s=recheck_s, clock=clock, record=record
        )
        self._api_key = api_key
        self._inner: Inner = inner if inner is not None else self._new_inner()
        self._lock = self._new_lock()

    @abstractmethod
    def _new_inner(self) -> Inner: ...

    _new_lock: Callable[[], Any]

    @property
    def session(self) -> Session | None:
        """The session in use, if any; its `evidence` is what was verified."""
        return self._upstream.session()

    def _check(self, request: Request) -> None:
        """Raises `TypeError` for a request of an unknown library, `RequestRefused` for another origin's."""
        library_of(request)
        url = request.url
        if not self._upstream.origin.matches(url.scheme, url.host, url.port):
            raise RequestRefused(
                f"This transport talks to {self._upstream.origin} only, and the request is for {url.scheme}://"
                f"{url.netloc.decode()}. Nothing was sent. Set the client's base_url to the upstream's origin."
            )

    def _seal(self, session: Session, request: Request, body: bytes) -> tuple[bytes, ResponseReader]:
        path = request.url.raw_path.decode("ascii")
        return session.seal(request.method, path, tuple(request.headers.raw), body, api_key=self._api_key)

    def _evidence_request(self, challenge: Challenge) -> httpx2.Request:
        timeout = httpx2.Timeout(EVIDENCE_SECONDS).as_dict()
        url = f"{self._upstream.origin}{challenge.target}"
        return httpx2.Request("GET", url, headers={"accept": "application/json"}, extensions={"timeout": timeout})

    def _sealed_request(self, session: Session, request: Request, data: bytes) -> httpx2.Request:
        url = f"{self._upstream.origin}{session.gateway_path}"
        timeout = {key: value for key, value in request.extensions.items() if key == "timeout"}
        return httpx2.Request("POST", url, headers=SEALED_HEADERS, content=data, extensions=timeout)

    def _refusal(self, response: httpx2.Response, body: bytes) -> ClientError:
        headers = response.headers
        return refusal(
            self._upstream.origin, response.status_code, headers.get("content-type"), headers.get("retry-after"), body
        )

    def _unreachable(self, error: httpx2.TransportError) -> UpstreamUnreachable:
        unreachable = UpstreamUnreachable(
            f"{self._upstream.origin} cannot be reached ({type(error).__name__}: {error}). Check the address and the "
            "network."
        )
        unreachable.__cause__ = error
        return unreachable


def cut_by(error: httpx2.TransportError) -> ResponseCut:
    """The error for an answer that a network error cut."""
    found = cut()
    found.__cause__ = error
    return found


def opens(response: httpx2.Response) -> bool:
    """Whether it is a sealed answer."""
    return is_sealed(response.status_code, response.headers.get("content-type"))
