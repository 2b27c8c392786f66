"""Prefixes and images are found again by the caller who named a domain, and by no other. Real vLLM's own counters."""

import itertools
import json
import re

from adytum.inference.channel.exchange import InnerRequest
from adytum.inference.core.config import parse
from adytum.inference.gateway.accounting import usage
from adytum.inference.gateway.admission.admission import EngineCall
from tests.conftest import RunningBackend
from tests.pictures import data_url, png
from tests.support import ROOT, config_text
from tests.system.test_answers import FAQ, ask_engine
from tests.unit.gateway.support import admission_of

KEYS = ("sk-one", "sk-two")
# Several of the cache's blocks long.
PREFIX = " ".join(entry.answer for entry in itertools.islice(FAQ, 12))


def test_callers_never_hit_each_others_prefix(backend: RunningBackend) -> None:
    admission = admission_of(parse(config_text(port=0, runtime=ROOT / "var" / "run", api_keys=list(KEYS)).encode()))
    socket = backend.sockets[backend.llama]

    def hits() -> int:
        text = ask_engine(socket, "GET", "/metrics").decode()
        return sum(int(float(value)) for value in re.findall(r"(?m)^vllm:prefix_cache_hits_total\{.*\} (\S+)$", text))

    def ask(key: str, domain: str | None) -> int:
        """Tokens that were found in the cache, by vLLM's counter and by what it says for the bill."""
        body = {
            "model": backend.llama,
            "messages": [{"role": "system", "content": PREFIX}, {"role": "user", "content": "And?"}],
            "max_tokens": 1,
        }
        if domain is not None:
            body["prompt_cache_key"] = domain
        fields = ((b"authorization", b"Bearer " + key.encode()),)
        request = InnerRequest("POST", "/v1/chat/completions", fields, json.dumps(body).encode())
        call = admission.admit(request)
        assert isinstance(call, EngineCall)
        before = hits()
        answer = ask_engine(socket, "POST", call.path, json.loads(call.body))
        found = hits() - before
        billed = usage.of_whole(answer)
        assert billed is not None
        assert billed.cached == found
        assert billed.prompt > 100, "the whole prompt, found or not"
        return found

    assert ask("sk-one", "mine") == 0
    assert ask("sk-one", "mine") > 0, "the same caller's second turn"
    assert ask("sk-two", "mine") == 0, "another caller, the same name"
    assert ask("sk-one", "other") == 0, "the same caller, another domain"
    assert ask("sk-one", None) == 0
    assert ask("sk-one", None) == 0, "without a domain each request is alone"
    assert ask("sk-two", "mine") > 0


def test_callers_never_hit_each_others_images(backend: RunningBackend) -> None:
    """What vLLM made of an image it keeps without a salt: the gateway makes each caller's another file."""
    admission = admission_of(parse(config_text(port=0, runtime=ROOT / "var" / "run", api_keys=list(KEYS)).encode()))
    socket = backend.sockets[backend.gemma]
    image = {"type": "image_url", "image_url": {"url": data_url(png((30, 60, 220), 90, 70))}}

    def kept() -> tuple[int, int]:
        """How often vLLM looked for an image, and how often it had it."""
        text = ask_engine(socket, "GET", "/metrics").decode()
        queries, hits = (
            sum(int(float(value)) for value in re.findall(rf"(?m)^vllm:mm_cache_{name}_total\{{.*\}} (\S+)$", text))
            for name in ("queries", "hits")
        )
        return queries, hits

    def ask(key: str, domain: str | None) -> bool:
        content = [image, {"type": "text", "text": "What colour is this image?"}]
        body = {"model": backend.gemma, "messages": [{"role": "user", "content": content}], "temperature": 0}
        if domain is not None:
            body["prompt_cache_key"] = domain
        fields = ((b"authorization", b"Bearer " + key.encode()),)
        call = admission.admit(InnerRequest("POST", "/v1/chat/completions", fields, json.dumps(body).encode()))
        assert isinstance(call, EngineCall)
        before = kept()
        answer = json.loads(ask_engine(socket, "POST", call.path, json.loads(call.body)))
        assert answer["choices"][0]["message"]["content"] == "The image is blue."
        queries, hits = (after - then for after, then in zip(kept(), before, strict=True))
        assert queries == 1
        return hits == 1

    assert not ask("sk-one", "pictures")
    assert ask("sk-one", "pictures"), "the same caller's second turn"
    assert not ask("sk-two", "pictures"), "another caller, the same name"
    assert not ask("sk-one", "others"), "the same caller, another domain"
    assert not ask("sk-one", None)
    assert not ask("sk-one", None), "without a domain each request is alone"
    assert ask("sk-two", "pictures")


def test_messages_count_what_was_found_as_part_of_the_prompt(backend: RunningBackend) -> None:
    """Anthropic's API takes it out of `input_tokens`; a bill has the whole prompt in each API."""
    socket = backend.sockets[backend.llama]
    body = {
        "model": backend.llama,
        "messages": [{"role": "user", "content": PREFIX}],
        "max_tokens": 1,
        "cache_salt": "a salt of this test alone",
    }
    first, second = (usage.of_whole(ask_engine(socket, "POST", "/v1/messages", body)) for _ in range(2))
    assert first is not None
    assert second is not None
    assert first.prompt == second.prompt > 100
