"""Computed prefixes are found again by the caller who named a domain, and by nobody else. Real vLLM's own counters."""

import itertools
import json
import re

from inference.channel.exchange import InnerRequest
from inference.config import parse
from inference.gateway import usage
from inference.gateway.admission import EngineCall
from tests.conftest import RunningBackend
from tests.gateway.support import admission_of
from tests.support import ROOT, config_text
from tests.system.test_answers import FAQ, ask_engine

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
