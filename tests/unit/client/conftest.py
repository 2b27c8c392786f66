"""Fixtures of the client's tests."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import httpx2
import pytest

from adytum.attestation.policy.policy import Policy
from adytum.inference.client.proxy.upstream import UpstreamClient
from adytum.inference.client.session import Upstream
from adytum.inference.client.transport import AdytumTransport
from tests.unit.client.support import Fake, running_fake, running_proxy


@pytest.fixture
def fake() -> Iterator[Fake]:
    with running_fake() as fake:
        yield fake


@pytest.fixture
def client(fake: Fake) -> Iterator[httpx2.Client]:
    """An httpx2 client that verifies `fake`."""
    transport = AdytumTransport(upstream=fake.url, policy=Policy.accept_simulated())
    with httpx2.Client(transport=transport, base_url=fake.url, timeout=20) as client:
        yield client


@pytest.fixture
def proxy(fake: Fake) -> Iterator[Callable[..., str]]:
    """Starts a proxy for `fake` and returns its origin. `upstream`, `api_key` and `app` are options of its parts."""
    with ExitStack() as stack:

        def start(
            *, upstream: dict[str, Any] | None = None, api_key: str | None = None, app: dict[str, Any] | None = None
        ) -> str:
            options: dict[str, Any] = {"url": fake.url, "policy": Policy.accept_simulated(), **(upstream or {})}
            client = UpstreamClient(Upstream(**options), api_key)
            return stack.enter_context(running_proxy(client, **(app or {})))

        yield start
