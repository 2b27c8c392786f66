"""The two published EHBP clients, npm `ehbp` and PyPI `tinfoil-ehbp`, talk to the running backend."""

import json
import time
from collections.abc import Iterator
from typing import Any

import ehbp
import httpx
import pytest

from adytum.inference.channel import hpke
from tests.conftest import RunningBackend
from tests.system.interop.conftest import E5_INPUT
from tests.system.interop.support import chat, check_arrivals, events, said, stream

CHAT = "/v1/chat/completions"


# npm `ehbp`.


def test_npm_chat(ehbp_answers: dict[str, Any]) -> None:
    found = ehbp_answers["chat"]
    assert (found["status"], found["type"].split(";")[0]) == (200, "application/json")
    assert json.loads(found["body"])["choices"][0]["message"]["content"]
    # Padded with spaces, which its JSON reader ignored.
    assert len(found["body"].encode()) % 1024 == 0


@pytest.mark.parametrize("which", ["llama", "gemma"])
def test_npm_stream(ehbp_answers: dict[str, Any], which: str) -> None:
    found = ehbp_answers[f"stream-{which}"]
    assert (found["status"], found["type"].split(";")[0]) == (200, "text/event-stream")
    assert said(events(found["body"]))
    check_arrivals(found["arrivals"], found["ended"])


def test_npm_embedding(ehbp_answers: dict[str, Any]) -> None:
    found = ehbp_answers["embedding"]
    assert found["status"] == 200
    vectors = [item["embedding"] for item in json.loads(found["body"])["data"]]
    assert len(vectors) == 2
    assert vectors[0] != vectors[1]


def test_npm_error_is_sealed(ehbp_answers: dict[str, Any]) -> None:
    found = ehbp_answers["no-key"]
    assert found["status"] == 401
    assert json.loads(found["body"])["error"]


# PyPI `tinfoil-ehbp`.


@pytest.fixture(scope="module")
def client(backend: RunningBackend) -> Iterator[ehbp.Client]:
    with ehbp.Client.discover(backend.url, http_client=httpx.Client(timeout=120)) as found:
        yield found


@pytest.fixture(scope="module")
def bearer(backend: RunningBackend) -> dict[str, str]:
    return {"authorization": f"Bearer {backend.api_key}"}


def test_pypi_chat(client: ehbp.Client, backend: RunningBackend, bearer: dict[str, str]) -> None:
    response = client.post(CHAT, json_body=chat(backend.llama), headers=bearer)
    assert response.status_code == 200
    assert response.json()["choices"][0]["message"]["content"]
    assert len(response.content) % 1024 == 0


def test_pypi_body_in_many_frames(client: ehbp.Client, backend: RunningBackend, bearer: dict[str, str]) -> None:
    body = json.dumps(chat(backend.llama)).encode()
    parts = iter([body[at : at + 9] for at in range(0, len(body), 9)])
    response = client.post(CHAT, body=parts, headers={**bearer, "content-type": "application/json"})
    assert response.status_code == 200
    assert response.json() == json.loads(response.content)


def test_pypi_stream(client: ehbp.Client, backend: RunningBackend, bearer: dict[str, str]) -> None:
    began = time.monotonic()
    arrivals: list[dict[str, float]] = []
    body = b""
    with client.stream("POST", CHAT, json_body=stream(backend.llama), headers=bearer) as response:
        assert response.status_code == 200
        for data in response:
            arrivals.append({"at": (time.monotonic() - began) * 1000, "size": len(data)})
            body += data
    ended = (time.monotonic() - began) * 1000
    assert said(events(body.decode()))
    assert all(arrival["size"] % 512 == 0 for arrival in arrivals)
    check_arrivals(arrivals, ended)


def test_pypi_embedding(client: ehbp.Client, backend: RunningBackend, bearer: dict[str, str]) -> None:
    response = client.post("/v1/embeddings", json_body={"model": backend.e5, "input": E5_INPUT}, headers=bearer)
    assert response.status_code == 200
    vectors = [item["embedding"] for item in response.json()["data"]]
    assert len(vectors) == 2
    assert vectors[0] != vectors[1]


def test_pypi_error_is_sealed(client: ehbp.Client, backend: RunningBackend) -> None:
    response = client.post(CHAT, json_body=chat(backend.llama))
    assert response.status_code == 401
    assert "ehbp-response-nonce" in response.headers
    assert response.json()["error"]


def test_pypi_fetches_the_keys_again_when_told(backend: RunningBackend, bearer: dict[str, str]) -> None:
    """A key that the backend does not hold: the client recognises the answer as its protocol's key mismatch."""
    stale = hpke.X25519Key.generate().public_bytes.hex()
    with (
        ehbp.Client.with_public_key_hex(backend.url, stale, http_client=httpx.Client(timeout=60)) as client,
        pytest.raises(ehbp.KeyConfigMismatchError),
    ):
        client.post(CHAT, json_body=chat(backend.llama), headers=bearer)
