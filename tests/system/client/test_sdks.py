"""The OpenAI and Anthropic packages, unchanged, through the transport and the proxy, against real engines."""

import json
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import anthropic
import openai
import pytest

from adytum.attestation.policy.policy import Policy
from adytum.deploy.demo.faq import load
from adytum.inference.client.proxy.upstream import UpstreamClient
from adytum.inference.client.session import Upstream
from adytum.inference.client.transport import AdytumTransport
from tests.conftest import RunningBackend
from tests.support import ROOT
from tests.unit.client.support import running_proxy

FAQ = load(ROOT / "docs" / "faq.md")
QUESTION: list[Any] = [{"role": "user", "content": FAQ[0].question}]
TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "opening_hours",
        "strict": True,  # Otherwise vLLM accepts any JSON value as the arguments.
        "description": "Opening hours of a place on a day",
        "parameters": {
            "type": "object",
            "properties": {"day": {"type": "string", "enum": ["monday", "sunday"]}},
            "required": ["day"],
            "additionalProperties": False,
        },
    },
}
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"colour": {"type": "string", "enum": ["red", "green"]}, "sure": {"type": "boolean"}},
    "required": ["colour", "sure"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module", params=["transport", "proxy"])
def way(request: pytest.FixtureRequest, backend: RunningBackend) -> Iterator[dict[str, Any]]:
    """What a client's constructor needs for each way: the origin and, for the transport, the transport itself."""
    policy = Policy.from_toml(backend.policy_path)
    with ExitStack() as stack:
        if request.param == "proxy":
            yield {"origin": stack.enter_context(running_proxy(UpstreamClient(Upstream(backend.url, policy=policy))))}
        else:
            yield {"origin": backend.url, "transport": AdytumTransport(upstream=backend.url, policy=policy)}


def options(way: dict[str, Any], path: str, package: Any) -> dict[str, Any]:
    found: dict[str, Any] = {"base_url": way["origin"] + path, "max_retries": 0}
    if "transport" in way:
        found["http_client"] = package.DefaultHttpxClient(transport=way["transport"])
    return found


@pytest.fixture
def asking(way: dict[str, Any], backend: RunningBackend) -> openai.OpenAI:
    return openai.OpenAI(api_key=backend.api_key, **options(way, "/v1", openai))


@pytest.fixture
def claude(way: dict[str, Any], backend: RunningBackend) -> anthropic.Anthropic:
    return anthropic.Anthropic(api_key=backend.api_key, **options(way, "", anthropic))


def whole(asking: openai.OpenAI, model: str) -> str:
    answer = asking.chat.completions.create(model=model, messages=QUESTION, max_tokens=100, temperature=0)
    return answer.choices[0].message.content or ""


@pytest.mark.parametrize("family", ["llama", "gemma"])
def test_a_chat_and_its_stream_say_the_same(asking: openai.OpenAI, backend: RunningBackend, family: str) -> None:
    model = getattr(backend, family)
    said = whole(asking, model)
    assert said.strip() == FAQ[0].answer
    pieces: list[str] = []
    usage = None
    for event in asking.chat.completions.create(
        model=model,
        messages=QUESTION,
        max_tokens=100,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    ):
        pieces += [choice.delta.content or "" for choice in event.choices]
        usage = event.usage or usage
    assert "".join(pieces) == said
    assert len([piece for piece in pieces if piece]) > 3
    assert usage is not None
    assert usage.completion_tokens > 3


@pytest.mark.parametrize("family", ["llama", "gemma"])
def test_a_named_tool_is_called(asking: openai.OpenAI, backend: RunningBackend, family: str) -> None:
    tools: list[Any] = [TOOL]
    answer = asking.chat.completions.create(
        model=getattr(backend, family),
        messages=QUESTION,
        tools=tools,
        tool_choice={"type": "function", "function": {"name": "opening_hours"}},
        max_tokens=150,
        temperature=0,
        frequency_penalty=2,  # A model this small gets lost in the white space that JSON allows.
    )
    calls = answer.choices[0].message.tool_calls
    assert calls is not None
    assert calls[0].type == "function"
    assert calls[0].function.name == "opening_hours"
    assert json.loads(calls[0].function.arguments)["day"] in ("monday", "sunday")


@pytest.mark.parametrize("family", ["llama", "gemma"])
def test_an_answer_follows_a_schema(asking: openai.OpenAI, backend: RunningBackend, family: str) -> None:
    answer = asking.chat.completions.create(
        model=getattr(backend, family),
        messages=QUESTION,
        response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA, "strict": True}},
        max_tokens=80,
        temperature=0,
    )
    found = json.loads(answer.choices[0].message.content or "")
    assert set(found) == {"colour", "sure"}
    assert found["colour"] in ("red", "green")
    assert isinstance(found["sure"], bool)


def test_embeddings_are_of_length_one_and_tell_texts_apart(asking: openai.OpenAI, backend: RunningBackend) -> None:
    texts = [FAQ[0].question, FAQ[1].question]
    vectors = [item.embedding for item in asking.embeddings.create(model=backend.e5, input=texts).data]
    assert len(vectors) == 2
    assert all(abs(sum(x * x for x in vector) - 1) < 1e-3 for vector in vectors)
    assert sum(a * b for a, b in zip(*vectors, strict=True)) < 0.999


def test_the_models_are_listed(asking: openai.OpenAI, backend: RunningBackend) -> None:
    assert {backend.llama, backend.gemma, backend.e5} <= {model.id for model in asking.models.list()}


def test_a_wrong_model_is_a_404_that_names_the_right_ones(asking: openai.OpenAI, backend: RunningBackend) -> None:
    with pytest.raises(openai.NotFoundError, match=backend.llama) as caught:
        whole(asking, "no/such-model")
    assert caught.value.code == "model_not_found"


def test_a_bad_key_is_a_401(way: dict[str, Any], backend: RunningBackend) -> None:
    bad = openai.OpenAI(api_key="sk-wrong", **options(way, "/v1", openai))
    with pytest.raises(openai.AuthenticationError):
        whole(bad, backend.llama)


def test_anthropic_whole_and_streamed_say_the_same(claude: anthropic.Anthropic, backend: RunningBackend) -> None:
    asked: dict[str, Any] = {"model": backend.llama, "max_tokens": 100, "messages": QUESTION}
    asked["extra_body"] = {"temperature": 0}  # The package no longer has a parameter for it.
    answer = claude.messages.create(**asked)
    said = "".join(block.text for block in answer.content if block.type == "text")
    assert said.strip() == FAQ[0].answer
    with claude.messages.stream(**asked) as stream:
        assert "".join(stream.text_stream) == said
