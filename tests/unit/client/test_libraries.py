"""Whose classes a transport answers with: those of the library that the request is of, and no other is imported."""

import asyncio
import subprocess
import sys
from typing import Any

import httpx
import httpx2
import pytest

from adytum.attestation.policy.policy import Policy
from adytum.inference.client import AdytumTransport, AsyncAdytumTransport
from adytum.inference.client.errors import UpstreamUnreachable
from tests.support import ROOT
from tests.unit.client.support import Fake, chat

SIMULATED = Policy.accept_simulated()
LIBRARIES = pytest.mark.parametrize("http", [httpx2, httpx], ids=["httpx2", "httpx"])


def asked(http: Any, fake: Fake) -> Any:
    return http.Request("POST", f"{fake.url}/v1/chat/completions", json=chat(stream=True))


@LIBRARIES
def test_an_answer_is_of_the_requests_library(fake: Fake, http: Any) -> None:
    with AdytumTransport(fake.url, SIMULATED) as transport:
        response = transport.handle_request(asked(http, fake))
        assert type(response) is http.Response
        assert isinstance(response.stream, http.SyncByteStream)
        assert b"[DONE]" in response.read()
        assert response.extensions["adytum"].receipt is not None
        fake.plain = (503, {"content-type": "application/problem+json"}, b"{}")
        assert type(transport.handle_request(asked(http, fake))) is http.Response


@LIBRARIES
def test_an_asynchronous_answer_is_of_the_requests_library(fake: Fake, http: Any) -> None:
    async def run() -> None:
        async with AsyncAdytumTransport(fake.url, SIMULATED) as transport:
            response = await transport.handle_async_request(asked(http, fake))
            assert type(response) is http.Response
            assert isinstance(response.stream, http.AsyncByteStream)
            assert b"[DONE]" in await response.aread()

    asyncio.run(run())


def test_one_transport_serves_clients_of_both_libraries(fake: Fake) -> None:
    transport = AdytumTransport(fake.url, SIMULATED)
    with httpx.Client(transport=transport) as classic, httpx2.Client(transport=transport) as client:
        for each in (classic, client, classic):
            assert each.post(f"{fake.url}/v1/chat/completions", json=chat()).status_code == 200
    assert fake.evidence_asked == 1


class Foreign:
    """Has everything that the transport reads of a request, and is of neither library."""

    def __init__(self, url: str) -> None:
        self._request = httpx2.Request("POST", url, content=b"{}")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._request, name)


def test_a_request_of_another_library_is_refused_before_anything_is_sent(fake: Fake) -> None:
    request: Any = Foreign(f"{fake.url}/v1/models")
    with pytest.raises(TypeError, match=r"not tests\.unit\.client\.test_libraries\.Foreign\. Nothing was sent\. Give"):
        AdytumTransport(fake.url, SIMULATED).handle_request(request)
    with pytest.raises(TypeError, match="httpx2 or httpx client"):
        asyncio.run(AsyncAdytumTransport(fake.url, SIMULATED).handle_async_request(request))
    assert fake.seen == []


@LIBRARIES
def test_an_inner_transports_own_error_keeps_the_name_of_its_kind(http: Any) -> None:
    class ProxyIsDown(httpx2.ConnectError):
        """As a transport of the caller's own could raise it."""

    class Inner(httpx2.BaseTransport):
        def handle_request(self, request: httpx2.Request) -> httpx2.Response:
            raise ProxyIsDown("down")

    transport = AdytumTransport("http://a.example", SIMULATED, inner=Inner())
    with pytest.raises(http.ConnectError, match="down") as caught:
        transport.handle_request(http.Request("GET", "http://a.example/v1/models"))
    assert type(caught.value) is http.ConnectError
    assert isinstance(caught.value.__cause__, UpstreamUnreachable)
    assert isinstance(caught.value.__cause__.__cause__, ProxyIsDown)


def test_httpx_is_not_imported_and_not_needed() -> None:
    code = """
import sys
sys.modules["httpx"] = None  # As if it were not installed.
import httpx2
from adytum.attestation.policy.policy import Policy
from adytum.inference.client import AdytumTransport
transport = AdytumTransport("http://127.0.0.1:9", Policy.accept_simulated())
try:
    httpx2.Client(transport=transport).get("http://127.0.0.1:9/v1/models")
except httpx2.ConnectError as error:
    print(type(error.__cause__).__name__)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("UpstreamUnreachable\n", "")


def test_the_facade_does_not_bring_the_proxy() -> None:
    code = """
import sys
import adytum.inference.client
print([name for name in ("aiohttp", "asyncio.subprocess", "click", "httpx") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("[]\n", "")
