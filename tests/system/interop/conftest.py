"""Runs the JavaScript clients once for all tests."""

from typing import Any

import pytest

from tests.conftest import RunningBackend
from tests.system.interop.support import chat, install, node, stream

X25519, X_WING = 0x0020, 0x647A
FORMS = [(kem, chunked) for kem in (X_WING, X25519) for chunked in (True, False)]
E5_INPUT = ["query: opening an account", "passage: Bring your identity card and a recent utility bill."]


def name(what: str, kem: int, chunked: bool) -> str:
    return f"{what}-{kem:04x}-{'chunked' if chunked else 'whole'}"


@pytest.fixture(scope="session")
def packages() -> None:
    install()


@pytest.fixture(scope="session")
def ohttp_answers(backend: RunningBackend, packages: None) -> dict[str, Any]:
    """Every request that the OHTTP client makes, in one run of Node."""
    bearer = {"authorization": f"Bearer {backend.api_key}"}
    json_body = {"content-type": "application/json", **bearer}
    requests: list[dict[str, Any]] = []
    for kem, chunked in FORMS:
        form = {"kem": kem, "chunked": chunked, "method": "POST", "headers": json_body}
        requests += [
            {
                **form,
                "name": name("models", kem, chunked),
                "method": "GET",
                "path": "/v1/models",
                "headers": bearer,
            },
            {
                **form,
                "name": name("chat", kem, chunked),
                "path": "/v1/chat/completions",
                "body": chat(backend.llama),
            },
            {
                **form,
                "name": name("embedding", kem, chunked),
                "path": "/v1/embeddings",
                "body": {"model": backend.e5, "input": E5_INPUT},
            },
            {
                **form,
                "name": name("no-key", kem, chunked),
                "path": "/v1/chat/completions",
                "headers": {"content-type": "application/json"},
                "body": chat(backend.llama),
            },
            {
                **form,
                "name": name("stale", kem, chunked),
                "path": "/v1/chat/completions",
                "body": chat(backend.llama),
                "staleKey": True,
            },
        ]
        if chunked:
            requests += [
                {
                    **form,
                    "name": name(f"stream-{which}", kem, chunked),
                    "path": "/v1/chat/completions",
                    "body": stream(model),
                }
                for which, model in (("llama", backend.llama), ("gemma", backend.gemma))
            ]
    return node("ohttp_client.mjs", {"url": backend.url, "requests": requests})


@pytest.fixture(scope="session")
def ehbp_answers(backend: RunningBackend, packages: None) -> dict[str, Any]:
    """Every request that npm's `ehbp` makes, in one run of Node."""
    headers = {"content-type": "application/json", "authorization": f"Bearer {backend.api_key}"}
    path = "/v1/chat/completions"
    requests = [
        {"name": "chat", "path": path, "headers": headers, "body": chat(backend.llama)},
        {"name": "stream-llama", "path": path, "headers": headers, "body": stream(backend.llama)},
        {"name": "stream-gemma", "path": path, "headers": headers, "body": stream(backend.gemma)},
        {
            "name": "embedding",
            "path": "/v1/embeddings",
            "headers": headers,
            "body": {"model": backend.e5, "input": E5_INPUT},
        },
        {
            "name": "no-key",
            "path": path,
            "headers": {"content-type": "application/json"},
            "body": chat(backend.llama),
        },
    ]
    return dict(node("ehbp_client.mjs", {"url": backend.url, "requests": requests})["answers"])
