"""An OHTTP client put together from npm packages talks to the running backend: both KEMs, both forms, streams."""

import json
from typing import Any

import pytest

from tests.conftest import RunningBackend
from tests.system.interop.conftest import FORMS, X25519, X_WING, name
from tests.system.interop.support import check_arrivals, events, said

EACH_FORM = pytest.mark.parametrize(
    ("kem", "chunked"), FORMS, ids=[f"{kem:04x}-{'chunked' if chunked else 'whole'}" for kem, chunked in FORMS]
)


def answer(answers: dict[str, Any], what: str, kem: int, chunked: bool) -> dict[str, Any]:
    """The opened answer, its outer layer checked: one status and one media type for all."""
    found: dict[str, Any] = answers["answers"][name(what, kem, chunked)]
    form = "chunked-" if chunked else ""
    assert found["outer"] == {"status": 200, "type": f"message/ohttp-{form}res"}, found
    return found


def test_the_keys(ohttp_answers: dict[str, Any]) -> None:
    keys = ohttp_answers["keys"]
    assert keys["type"] == "application/ohttp-keys"
    assert [key["kem"] for key in keys["list"]] == [X_WING, X25519]
    assert len({key["id"] for key in keys["list"]}) == 2


@EACH_FORM
def test_models(ohttp_answers: dict[str, Any], backend: RunningBackend, kem: int, chunked: bool) -> None:
    inner = answer(ohttp_answers, "models", kem, chunked)["inner"]
    assert inner["status"] == 200
    listed = {model["id"] for model in json.loads(inner["body"])["data"]}
    assert {backend.llama, backend.gemma, backend.e5} <= listed


@EACH_FORM
def test_chat(ohttp_answers: dict[str, Any], backend: RunningBackend, kem: int, chunked: bool) -> None:
    found = answer(ohttp_answers, "chat", kem, chunked)
    assert found["inner"]["status"] == 200
    body = json.loads(found["inner"]["body"])
    assert body["choices"][0]["message"]["content"]
    assert body["usage"]["completion_tokens"] <= 16
    # Padded inside the seal (RFC 9292, 3.8), which the binary HTTP package took for what it is.
    assert found["plainLength"] % 1024 == 0
    # The same question greedily: every form and KEM gets the same answer.
    first = json.loads(answer(ohttp_answers, "chat", *FORMS[0])["inner"]["body"])
    assert body["choices"][0]["message"]["content"] == first["choices"][0]["message"]["content"]


@EACH_FORM
def test_embedding(ohttp_answers: dict[str, Any], kem: int, chunked: bool) -> None:
    inner = answer(ohttp_answers, "embedding", kem, chunked)["inner"]
    assert inner["status"] == 200
    vectors = [item["embedding"] for item in json.loads(inner["body"])["data"]]
    assert len(vectors) == 2
    assert len(vectors[0]) == len(vectors[1]) > 8
    assert vectors[0] != vectors[1]


@EACH_FORM
def test_an_error_comes_inside_the_seal(ohttp_answers: dict[str, Any], kem: int, chunked: bool) -> None:
    inner = answer(ohttp_answers, "no-key", kem, chunked)["inner"]
    assert inner["status"] == 401
    assert json.loads(inner["body"])["error"]


@EACH_FORM
def test_a_request_for_another_key_is_answered_in_the_clear(
    ohttp_answers: dict[str, Any], kem: int, chunked: bool
) -> None:
    found = ohttp_answers["answers"][name("stale", kem, chunked)]
    assert 400 <= found["outer"]["status"] < 500
    assert found["outer"]["type"] == "application/problem+json"
    assert "inner" not in found


@pytest.mark.parametrize("kem", [X_WING, X25519], ids=["647a", "0020"])
@pytest.mark.parametrize("which", ["llama", "gemma"])
def test_stream(ohttp_answers: dict[str, Any], kem: int, which: str) -> None:
    found = answer(ohttp_answers, f"stream-{which}", kem, True)
    inner = found["inner"]
    assert (inner["status"], inner["type"].split(";")[0]) == (200, "text/event-stream")
    # Read as it came and read whole by the package: the same.
    assert inner["streamed"] == inner["body"]
    assert said(events(inner["body"]))
    assert sum(arrival["size"] for arrival in found["arrivals"]) == len(inner["body"].encode())
    assert all(arrival["size"] % 512 == 0 for arrival in found["arrivals"])
    check_arrivals(found["arrivals"], found["ended"])
