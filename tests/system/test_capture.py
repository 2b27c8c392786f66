"""A recording of a whole conversation holds none of its words; what the network changes never reaches the caller."""

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2
import openai
import pytest

from adytum.attestation.core.trust import TrustRoots
from adytum.attestation.policy.policy import Policy
from adytum.deploy.demo.faq import load
from adytum.deploy.demo.relay import Relay
from adytum.inference.client.transport import AdytumTransport
from tests.conftest import RunningBackend
from tests.support import ROOT

FAQ = load(ROOT / "docs" / "faq.md")


@contextmanager
def relayed(backend: RunningBackend) -> Iterator[tuple[Relay, str]]:
    """A recording relay in front of the backend, and its URL."""
    relay = Relay(backend.wire.port)
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    port = asyncio.run_coroutine_threadsafe(relay.start(), loop).result(10)
    try:
        yield relay, f"http://127.0.0.1:{port}"
    finally:
        asyncio.run_coroutine_threadsafe(relay.stop(), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)


def client(backend: RunningBackend, url: str, workspace: Path | None = None) -> openai.OpenAI:
    transport = AdytumTransport(
        upstream=url, policy=Policy.from_toml(backend.policy_path), trust=TrustRoots(), workspace=workspace
    )
    return openai.OpenAI(
        base_url=f"{url}/v1",
        api_key=backend.api_key,
        max_retries=0,
        http_client=httpx2.Client(transport=transport),  # type: ignore[arg-type]
    )


def test_the_network_sees_no_word_and_no_key(backend: RunningBackend) -> None:
    words: set[str] = {backend.api_key, "chat/completions", "embeddings", "temperature", "assistant"}
    with relayed(backend) as (relay, url):
        asking = client(backend, url)
        for entry in FAQ[:4]:
            stream = asking.chat.completions.create(
                model=backend.llama,
                messages=[{"role": "user", "content": entry.question}],
                temperature=0,
                max_tokens=100,
                stream=True,
            )
            said = "".join(event.choices[0].delta.content or "" for event in stream if event.choices)
            assert said.strip()
            words |= {*entry.question.split(), *said.split()}
        whole = asking.chat.completions.create(
            model=backend.gemma, messages=[{"role": "user", "content": "marzipan submarine"}], max_tokens=40
        )
        words |= {"marzipan", "submarine", *(whole.choices[0].message.content or "").split()}
        asking.embeddings.create(model=backend.e5, input="periwinkle harmonium")
        words |= {"periwinkle", "harmonium"}
        recorded = bytes(relay.sent + relay.answered).lower()
    long = {word.strip(".,:;?!()\"'").lower() for word in words if len(word) >= 7}
    # What anybody may fetch holds some of the words too; those prove nothing either way.
    public = backend.wire.request("GET", f"/.well-known/attestation?nonce={'0' * 64}")[2].lower()
    public += (
        b"/.well-known/ohttp-gateway/demo /.well-known/attestation content-type content-length "
        b"message/ohttp-chunked-req message/ohttp-chunked-res accept-encoding connection"
    )
    telling = [word for word in long if word.encode() not in public]
    assert len(telling) > 20
    assert len(recorded) > 10_000
    assert sorted(word for word in telling if word.encode() in recorded) == []


def test_the_capture_would_notice_a_plain_word(backend: RunningBackend) -> None:
    with relayed(backend) as (relay, url):
        httpx2.post(f"{url}/v1/chat/completions", json={"model": "x", "messages": "marzipan"})
        assert b"marzipan" in relay.sent


@pytest.mark.parametrize("stream", [False, True])
def test_a_flipped_bit_is_an_error_before_a_word_is_used(backend: RunningBackend, stream: bool) -> None:
    with relayed(backend) as (relay, url):
        asking = client(backend, url)
        asking.models.list()  # Verified, so that the next answer is the chat's.
        for at in (5, 45, 100, 300):
            relay.flip_at = at
            heard: list[str] = []
            with pytest.raises(openai.APIConnectionError):
                _chat(asking, backend.llama, stream, heard)
            assert relay.flip_at is None
            if not stream:
                assert heard == []
        assert _chat(asking, backend.llama, stream, []), "and the next one is fine"


@pytest.mark.parametrize("at", [0, 10, 33, 70, 200, 700, 1500, 3000])
def test_a_stream_cut_anywhere_is_an_error(backend: RunningBackend, at: int) -> None:
    with relayed(backend) as (relay, url):
        asking = client(backend, url)
        asking.models.list()
        relay.cut_at = at
        with pytest.raises(openai.APIConnectionError):
            _chat(asking, backend.llama, True, [])
        assert relay.cut_at is None


def _chat(asking: openai.OpenAI, model: str, stream: bool, heard: list[str]) -> str:
    messages: list[openai.types.chat.ChatCompletionMessageParam] = [{"role": "user", "content": FAQ[0].question}]
    if not stream:
        answer = asking.chat.completions.create(model=model, messages=messages, max_tokens=60, temperature=0)
        heard.append(answer.choices[0].message.content or "")
        return heard[-1]
    for event in asking.chat.completions.create(
        model=model, messages=messages, max_tokens=60, temperature=0, stream=True
    ):
        heard += [choice.delta.content or "" for choice in event.choices]
    return "".join(heard)
