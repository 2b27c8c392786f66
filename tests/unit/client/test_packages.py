"""The OpenAI and Anthropic packages, unchanged, through the transports and the proxy, against a scripted backend."""

import asyncio
from collections.abc import Callable, Iterator
from typing import Any

import anthropic
import httpx2
import openai
import pytest

from adytum.attestation.policy.policy import Policy
from adytum.inference.client.errors import ClientError, NotVerified
from adytum.inference.client.transport import AdytumTransport, AsyncAdytumTransport
from tests.unit.client.support import API_KEY, WORDS, Fake

SIMULATED = Policy.accept_simulated()
MESSAGES: list[Any] = [{"role": "user", "content": "quixotic zeppelin"}]
TEXT = " ".join(WORDS)


def through_transport(fake: Fake, policy: Policy = SIMULATED) -> openai.OpenAI:
    http = openai.DefaultHttpxClient(transport=AdytumTransport(upstream=fake.url, policy=policy))
    return openai.OpenAI(base_url=f"{fake.url}/v1", api_key=API_KEY, max_retries=0, http_client=http)


@pytest.fixture(params=["transport", "proxy"])
def asking(request: pytest.FixtureRequest, fake: Fake, proxy: Callable[..., str]) -> Iterator[openai.OpenAI]:
    """An OpenAI client on each of the two ways."""
    if request.param == "transport":
        made = through_transport(fake)
    else:
        made = openai.OpenAI(base_url=f"{proxy()}/v1", api_key=API_KEY, max_retries=0)
    with made:
        yield made


def streamed(client: openai.OpenAI) -> list[str]:
    heard: list[str] = []
    for event in client.chat.completions.create(model="fake/chat", messages=MESSAGES, stream=True):
        heard += [choice.delta.content or "" for choice in event.choices]
    return heard


def test_openai_chats_streams_embeds_and_lists(fake: Fake, asking: openai.OpenAI) -> None:
    answer = asking.chat.completions.create(model="fake/chat", messages=MESSAGES)
    assert answer.choices[0].message.content == TEXT
    assert streamed(asking) == [*WORDS, ""]
    assert asking.embeddings.create(model="e", input="x", encoding_format="float").data[0].embedding == [0.25, 0.5]
    assert [model.id for model in asking.models.list()] == ["fake/chat"]
    for item in fake.inner:
        assert dict(item.fields)[b"authorization"] == f"Bearer {API_KEY}".encode()


def test_openai_sees_the_backends_own_errors(asking: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="unknown path"):
        asking.completions.create(model="fake/chat", prompt="x")


@pytest.mark.parametrize("clean", [True, False])
def test_openai_never_takes_a_cut_stream_for_whole(fake: Fake, asking: openai.OpenAI, clean: bool) -> None:
    assert streamed(asking) == [*WORDS, ""]
    # The last two writes are the end marker and the authenticated end: every word of the answer came before them.
    writes, fake.clean_stop = fake.writes, clean
    for stop_at in range(writes - 2):
        fake.stop_at = stop_at
        with pytest.raises((openai.APIConnectionError, openai.InternalServerError)):
            streamed(asking)
    fake.stop_at = None
    assert streamed(asking) == [*WORDS, ""]


def test_openai_never_takes_a_cut_answer_for_whole(fake: Fake, asking: openai.OpenAI) -> None:
    for stop_at in range(3):
        fake.stop_at = stop_at
        with pytest.raises((openai.APIConnectionError, openai.InternalServerError)):
            asking.chat.completions.create(model="fake/chat", messages=MESSAGES)


def test_openai_says_why_a_backend_is_not_verified(fake: Fake) -> None:
    with through_transport(fake, Policy.default(frozenset({bytes(48)}))) as client:
        with pytest.raises(openai.APIConnectionError) as caught:
            client.models.list()
        error = caught.value.__cause__
        assert isinstance(error, httpx2.ConnectError)
        assert isinstance(error.__cause__, NotVerified)
        assert isinstance(error.__cause__, ClientError)
        assert fake.requests == 0


def test_openai_waits_as_long_as_a_busy_backend_says(fake: Fake) -> None:
    fake.plain = (503, {"content-type": "application/problem+json", "retry-after": "1"}, b"{}")
    with through_transport(fake) as client, pytest.raises(openai.InternalServerError) as caught:
        client.models.list()
    assert caught.value.response.headers["retry-after"] == "1"


def test_async_openai_chats_and_streams(fake: Fake) -> None:
    async def run() -> tuple[str | None, list[str]]:
        transport = AsyncAdytumTransport(upstream=fake.url, policy=SIMULATED)
        http = openai.DefaultAsyncHttpxClient(transport=transport)
        async with openai.AsyncOpenAI(base_url=f"{fake.url}/v1", api_key=API_KEY, http_client=http) as client:
            whole = await client.chat.completions.create(model="fake/chat", messages=MESSAGES)
            stream = await client.chat.completions.create(model="fake/chat", messages=MESSAGES, stream=True)
            heard = [choice.delta.content or "" async for event in stream for choice in event.choices]
            return whole.choices[0].message.content, heard

    assert asyncio.run(run()) == (TEXT, [*WORDS, ""])


def test_async_openai_never_takes_a_cut_stream_for_whole(fake: Fake) -> None:
    async def read(client: openai.AsyncOpenAI) -> None:
        stream = await client.chat.completions.create(model="fake/chat", messages=MESSAGES, stream=True)
        async for _ in stream:
            pass

    async def run() -> None:
        transport = AsyncAdytumTransport(upstream=fake.url, policy=SIMULATED)
        http = openai.DefaultAsyncHttpxClient(transport=transport)
        async with openai.AsyncOpenAI(
            base_url=f"{fake.url}/v1", api_key=API_KEY, max_retries=0, http_client=http
        ) as client:
            for stop_at in range(len(WORDS) + 2):
                fake.stop_at = stop_at
                with pytest.raises(openai.APIConnectionError):
                    await read(client)

    asyncio.run(run())


@pytest.mark.parametrize("way", ["transport", "proxy"])
def test_anthropic_asks_whole_and_streams(fake: Fake, proxy: Callable[..., str], way: str) -> None:
    if way == "transport":
        http = anthropic.DefaultHttpxClient(transport=AdytumTransport(upstream=fake.url, policy=SIMULATED))
        client = anthropic.Anthropic(base_url=fake.url, api_key=API_KEY, max_retries=0, http_client=http)
    else:
        client = anthropic.Anthropic(base_url=proxy(), api_key=API_KEY, max_retries=0)
    with client:
        answer = client.messages.create(model="fake/chat", max_tokens=9, messages=MESSAGES)
        assert answer.content[0].text == TEXT  # type: ignore[union-attr]
        with client.messages.stream(model="fake/chat", max_tokens=9, messages=MESSAGES) as stream:
            assert list(stream.text_stream) == WORDS
        assert any(value.endswith(API_KEY.encode()) for _, value in fake.inner[0].fields)
        fake.stop_at = 5
        with (
            pytest.raises((anthropic.APIConnectionError, httpx2.RemoteProtocolError, httpx2.ReadError)),
            client.messages.stream(model="fake/chat", max_tokens=9, messages=MESSAGES) as stream,
        ):
            list(stream.text_stream)
