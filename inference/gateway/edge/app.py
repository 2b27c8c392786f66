"""The outer routes. Each may answer in the clear only with a fixed text (`failures`), public keys or evidence."""

from collections.abc import Callable
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from adytum.inference.channel import ehbp, keyconfig, ohttp
from adytum.inference.channel.exchange import Shape
from adytum.inference.channel.openings import EhbpOpening, OhttpOpening
from adytum.inference.core.lifecycle import Lifecycle
from adytum.inference.gateway import failures
from adytum.inference.gateway.admission.admission import MODELS_PATH, ROUTES, Admission
from adytum.inference.gateway.edge.evidence import EvidenceService
from adytum.inference.gateway.exchange.sealed import SealedService
from adytum.inference.gateway.keys import KeyRing

GATEWAY_PATH = "/.well-known/ohttp-gateway"
_MEDIA = {media.request: media for media in (ohttp.CHUNKED, ohttp.WHOLE)}
# Taken from EHBP's clear headers: the caller's key. The body's type is fixed.
_EHBP_FIELDS = (b"authorization", b"x-api-key")
# A key may rotate at any moment, and these documents are small.
_NO_STORE = {"Cache-Control": "no-store"}


def create_gateway(
    *,
    replica: str,
    padding: Shape,
    lifecycle: Lifecycle,
    model_states: Callable[[], dict[str, str]],
    keys: KeyRing,
    evidence: EvidenceService,
    admission: Admission,
    sealed: SealedService,
) -> ASGIApp:
    """The gateway as an ASGI application for HTTP."""
    app = FastAPI(title="adytum", docs_url=None, redoc_url=None, openapi_url=None)

    @app.exception_handler(HTTPException)
    async def http_exception(request: Request, _error: HTTPException) -> Response:
        path = request.scope["path"]
        # RFC 9110, 15.5.6: a 405 names all methods of the path, including those that FastAPI does not handle.
        routes = [route for route in app.routes if isinstance(route, Route) and route.path == path]
        allowed = {method for route in routes for method in route.methods or ()}
        allowed |= {method for method, hot_path in hot if hot_path == path}
        if not allowed:
            return failures.NOT_FOUND.response()
        response = failures.METHOD_NOT_ALLOWED.response()
        response.headers["Allow"] = ", ".join(sorted(allowed))
        return response

    @app.get("/healthz")
    async def healthz() -> dict[str, str]:
        return {"status": "alive"}

    @app.get("/readyz")
    async def readyz() -> Response:
        body = {"step": lifecycle.step, "waits_for": lifecycle.waits_for, "models": model_states()}
        return JSONResponse(body, 200 if lifecycle.serving else 503, _NO_STORE)

    @app.get(GATEWAY_PATH)
    @app.get(f"{GATEWAY_PATH}/{replica}")
    async def ohttp_keys() -> Response:
        return Response(keyconfig.encode_list(keys.configurations), 200, _NO_STORE, keyconfig.MEDIA_TYPE)

    @app.get("/.well-known/hpke-keys")
    async def hpke_keys() -> Response:
        # A raw header: EHBP's clients compare the type as a string.
        return Response(keys.ehbp_configuration.encode(), 200, {**_NO_STORE, "Content-Type": keyconfig.MEDIA_TYPE})

    @app.get(MODELS_PATH)
    async def models() -> dict[str, Any]:
        return admission.model_list

    async def attestation(scope: Scope, receive: Receive, send: Send) -> None:
        if lifecycle.evidence_ready:
            await evidence.handle(scope, receive, send)
        else:
            await failures.NO_EVIDENCE(scope, receive, send)

    async def ohttp_gateway(scope: Scope, receive: Receive, send: Send) -> None:
        content_type = _header(scope, b"content-type").partition(b";")[0].strip().lower()
        media = _MEDIA.get(content_type.decode("latin-1"))
        if media is None:
            await failures.WRONG_MEDIA_TYPE(scope, receive, send)
        elif not lifecycle.serving:
            await failures.NOT_READY(scope, receive, send)
        else:
            await sealed.handle(scope, receive, send, lambda: OhttpOpening(media, keys.find, padding))

    async def ehbp_or_refuse(scope: Scope, receive: Receive, send: Send) -> None:
        enc = _header(scope, ehbp.REQUEST_HEADER.encode()).decode("latin-1")
        if not enc:
            await failures.PLAINTEXT_REFUSED(scope, receive, send)
        elif not lifecycle.serving:
            await failures.NOT_READY(scope, receive, send)
        else:
            fields = tuple((name, value) for name, value in scope["headers"] if name in _EHBP_FIELDS)
            path = scope["path"]
            await sealed.handle(
                scope, receive, send, lambda: EhbpOpening("POST", path, fields, enc, keys.ehbp_keys(), padding)
            )

    # These bypass FastAPI, whose routing and middleware cost more than opening and sealing (benchmarks/NOTES.md).
    hot = {("POST", path): ehbp_or_refuse for path in ROUTES}
    hot |= {("POST", path): ohttp_gateway for path in (GATEWAY_PATH, f"{GATEWAY_PATH}/{replica}")}
    hot["GET", "/.well-known/attestation"] = attestation

    async def gateway(scope: Scope, receive: Receive, send: Send) -> None:
        await (hot.get((scope["method"], scope["path"])) or app)(scope, receive, send)

    return gateway


def _header(scope: Scope, name: bytes) -> bytes:
    """The first value of a lower-case header name; empty if there is none."""
    return next((value for key, value in scope["headers"] if key == name), b"")
