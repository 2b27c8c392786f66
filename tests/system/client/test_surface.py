"""A test for each row of the table in docs/reference/api.md, through the `openai` package, against real engines."""

import base64
import math
import struct
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from adytum.attestation.policy.policy import Policy
from adytum.inference.client.transport import AdytumTransport
from tests.conftest import RunningBackend
from tests.pictures import REDS, data_url, png
from tests.system.client.test_sdks import FAQ, QUESTION
from tests.system.test_answers import ask_engine


@pytest.fixture(scope="module")
def client(backend: RunningBackend) -> Iterator[openai.OpenAI]:
    transport = AdytumTransport(upstream=backend.url, policy=Policy.from_toml(backend.policy_path))
    http = openai.DefaultHttpxClient(transport=transport)
    with openai.OpenAI(api_key=backend.api_key, base_url=f"{backend.url}/v1", http_client=http, max_retries=0) as made:
        yield made


@pytest.fixture(params=["llama", "gemma"])
def model(request: pytest.FixtureRequest, backend: RunningBackend) -> str:
    return str(getattr(backend, request.param))


def ask(client: openai.OpenAI, model: str, **more: Any) -> Any:
    values = {"messages": QUESTION, "max_tokens": 24, "temperature": 0, **more}
    return client.chat.completions.create(model=model, **values)


def test_log_probabilities(client: openai.OpenAI, model: str) -> None:
    choice = ask(client, model, logprobs=True, top_logprobs=3).choices[0]
    tokens = choice.logprobs.content
    assert len(tokens) == 24
    assert "".join(token.token for token in tokens) == choice.message.content
    assert all(len(token.top_logprobs) == 3 and token.logprob <= 0 for token in tokens)


def test_several_answers(client: openai.OpenAI, model: str) -> None:
    answer = ask(client, model, n=3, temperature=1.5, seed=7)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert answer.usage.completion_tokens > answer.usage.prompt_tokens / 10


def test_a_stop_sequence(client: openai.OpenAI, model: str) -> None:
    text = ask(client, model).choices[0].message.content
    stop = text[12:20]
    choice = ask(client, model, stop=[stop]).choices[0]
    assert choice.finish_reason == "stop"
    assert choice.message.content == text[: text.index(stop)]


def test_a_seed(client: openai.OpenAI, model: str) -> None:
    said = [ask(client, model, temperature=2, seed=seed).choices[0].message.content for seed in (11, 11, 12)]
    assert said[0] == said[1] != said[2]


def test_usage_in_a_stream(client: openai.OpenAI, model: str) -> None:
    stream = ask(client, model, stream=True, stream_options={"include_usage": True})
    events = list(stream)
    assert events[-1].usage.completion_tokens == 24
    assert events[-1].usage.total_tokens == 24 + events[-1].usage.prompt_tokens
    assert not events[-1].choices


def test_reasoning_is_no_part_of_these_models_answers(client: openai.OpenAI, model: str) -> None:
    message = ask(client, model, reasoning_effort="low").choices[0].message
    assert message.content
    assert not getattr(message, "reasoning_content", None)


def test_a_choice_and_a_pattern(client: openai.OpenAI, model: str) -> None:
    chosen = ask(client, model, extra_body={"structured_outputs": {"choice": ["north", "south"]}})
    assert chosen.choices[0].message.content in ("north", "south")
    matched = ask(client, model, extra_body={"structured_outputs": {"regex": "[0-9]{4}"}})
    assert len(matched.choices[0].message.content) == 4
    assert matched.choices[0].message.content.isdigit()


def test_a_prompt_beyond_the_context(client: openai.OpenAI, model: str) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        ask(client, model, messages=[{"role": "user", "content": "word " * 5000}])
    assert refused.value.code == "context_length_exceeded"


COLOURS = {
    "red": (216, 30, 40),
    "green": (30, 160, 50),
    "blue": (30, 60, 220),
    "yellow": (240, 220, 40),
    "white": (250, 250, 250),
    "black": (8, 8, 8),
}


def _with_images(*urls: str) -> list[Any]:
    images = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return [{"role": "user", "content": [*images, {"type": "text", "text": "What colour is this image?"}]}]


def test_an_image_by_address_is_refused(client: openai.OpenAI, model: str) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        ask(client, model, messages=_with_images("https://example.org/a.png"))
    assert refused.value.code == "remote_media"
    assert "data:" in refused.value.message


def test_an_image_for_a_model_without_eyes(client: openai.OpenAI, backend: RunningBackend) -> None:
    """The engine itself refuses it."""
    with pytest.raises(openai.BadRequestError) as refused:
        ask(client, backend.llama, messages=_with_images(data_url(png())))
    assert refused.value.code != "remote_media"
    assert "multimodal" in refused.value.message.lower()


@pytest.mark.parametrize("colour", COLOURS)
def test_the_colour_of_an_image(client: openai.OpenAI, backend: RunningBackend, colour: str) -> None:
    image = data_url(png(COLOURS[colour], 120, 80))
    answer = ask(client, backend.gemma, messages=_with_images(image))
    assert answer.choices[0].message.content == f"The image is {colour}."
    assert answer.usage.prompt_tokens > 8


@pytest.mark.parametrize("kind", REDS)
def test_every_kind_of_image_file(client: openai.OpenAI, backend: RunningBackend, kind: str) -> None:
    """As users of the SDK send it: whole and streamed, with the media type of its kind."""
    messages = _with_images(data_url(REDS[kind], f"image/{kind.split()[0]}"))
    assert ask(client, backend.gemma, messages=messages).choices[0].message.content == "The image is red."
    stream = ask(client, backend.gemma, messages=messages, stream=True)
    assert "".join(event.choices[0].delta.content or "" for event in stream) == "The image is red."


def test_without_its_image_the_same_question_has_another_answer(client: openai.OpenAI, backend: RunningBackend) -> None:
    said = ask(client, backend.gemma, messages=_with_images()).choices[0].message.content
    assert said == "I see no image in your question."


def test_two_images_and_an_earlier_one(client: openai.OpenAI, backend: RunningBackend) -> None:
    blue, black = (data_url(png(COLOURS[colour])) for colour in ("blue", "black"))
    two = ask(client, backend.gemma, messages=_with_images(blue, black))
    one = ask(client, backend.gemma, messages=_with_images(blue))
    assert two.usage.prompt_tokens > one.usage.prompt_tokens
    earlier = [*_with_images(blue), {"role": "assistant", "content": "The image is blue."}, *_with_images(black)]
    assert ask(client, backend.gemma, messages=earlier).choices[0].message.content == "The image is black."


def test_an_image_in_the_shapes_of_the_other_routes(client: openai.OpenAI, backend: RunningBackend) -> None:
    text = "What colour is this image?"
    data = png(COLOURS["green"])
    parts: Any = [{"type": "input_image", "image_url": data_url(data)}, {"type": "input_text", "text": text}]
    answer = client.responses.create(
        model=backend.gemma, input=[{"role": "user", "content": parts}], max_output_tokens=20, temperature=0
    )
    assert answer.output_text == "The image is green."
    source = {"type": "base64", "media_type": "image/png", "data": base64.b64encode(data).decode()}
    content = [{"type": "image", "source": source}, {"type": "text", "text": text}]
    body = {"model": backend.gemma, "max_tokens": 20, "temperature": 0}
    raw: Any = client.post(
        "/messages", body={**body, "messages": [{"role": "user", "content": content}]}, cast_to=object
    )
    assert raw["content"][0]["text"] == "The image is green."


def test_a_batch_of_embeddings(client: openai.OpenAI, backend: RunningBackend) -> None:
    texts = [f"query: {entry.question}" for entry in FAQ[:5]]
    batch = client.embeddings.create(model=backend.e5, input=texts, encoding_format="float").data
    assert [item.index for item in batch] == list(range(5))
    alone = client.embeddings.create(model=backend.e5, input=texts[3], encoding_format="float").data[0].embedding
    assert sum(a * b for a, b in zip(batch[3].embedding, alone, strict=True)) == pytest.approx(1, abs=1e-3)


def test_embeddings_in_base64(client: openai.OpenAI, backend: RunningBackend) -> None:
    body = {"model": backend.e5, "input": "query: a", "encoding_format": "base64"}
    raw: Any = client.post("/embeddings", body=body, cast_to=object)
    data = base64.b64decode(raw["data"][0]["embedding"])
    values = struct.unpack(f"<{len(data) // 4}f", data)
    assert math.hypot(*values) == pytest.approx(1, abs=1e-3)


def test_dimensions_are_refused_by_a_model_that_was_not_trained_for_them(
    client: openai.OpenAI, backend: RunningBackend
) -> None:
    with pytest.raises(openai.BadRequestError, match=r"(?i)matryoshka|dimensions"):
        client.embeddings.create(model=backend.e5, input="query: a", dimensions=32)


def test_a_whole_conversation_in_the_responses_shape(client: openai.OpenAI, model: str) -> None:
    answer = client.responses.create(model=model, input=QUESTION, max_output_tokens=40, temperature=0)
    assert answer.output_text
    for kept in ({"previous_response_id": "resp_1"}, {"background": True}):
        with pytest.raises(openai.BadRequestError) as refused:
            client.responses.create(model=model, input=QUESTION, **kept)  # type: ignore[call-overload]
        assert refused.value.code == "unsupported_field"


def test_the_cache_is_found_again_by_its_key(client: openai.OpenAI, backend: RunningBackend) -> None:
    """Through the channel; tests/system/test_prefix_cache.py separates the callers."""

    def hits() -> float:
        lines = ask_engine(backend.sockets[backend.llama], "GET", "/metrics").decode().splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith("vllm:prefix_cache_hits_total{"))

    long = [{"role": "system", "content": " ".join(entry.answer for entry in FAQ[:12])}, *QUESTION]
    before = hits()
    ask(client, backend.llama, messages=long, max_tokens=1)
    ask(client, backend.llama, messages=long, max_tokens=1)
    assert hits() == before
    for _ in range(2):
        ask(client, backend.llama, messages=long, max_tokens=1, prompt_cache_key="a secret of mine")
    assert hits() > before
