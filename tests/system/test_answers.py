"""Real engines through the channel: the right answers, the same text as without it, and what an engine's end does."""

import http.client
import json
import re
import socket
import time
from pathlib import Path
from typing import Any

import pytest

from adytum.deploy.demo.faq import load
from adytum.inference.channel import ohttp
from adytum.inference.gateway.edge.app import GATEWAY_PATH
from tests.conftest import RunningBackend
from tests.support import ROOT, open_answer, seal, sealed_chat

FAQ = load(ROOT / "docs" / "faq.md")
PARAPHRASES = json.loads((ROOT / "tests" / "data" / "faq_paraphrases.json").read_text())


class EngineConnection(http.client.HTTPConnection):
    """Straight to an engine's Unix socket, past the gateway."""

    def __init__(self, path: Path) -> None:
        super().__init__("engine", timeout=60)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(60)
        self.sock.connect(str(self._path))


def ask_engine(path: Path, method: str, route: str, body: Any = None) -> bytes:
    connection = EngineConnection(path)
    connection.request(method, route, json.dumps(body) if body else None, {"Content-Type": "application/json"})
    answer = connection.getresponse()
    data = answer.read()
    connection.close()
    assert answer.status == 200, (answer.status, data[:200])
    return data


def bearer(backend: RunningBackend) -> tuple[tuple[bytes, bytes], ...]:
    return ((b"authorization", b"Bearer " + backend.api_key.encode()),)


def chat(model: str, question: str, **more: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": question}]
    return {"model": model, "messages": messages, "temperature": 0, "max_tokens": 150, **more}


def text_of(body: bytes) -> str:
    return str(json.loads(body)["choices"][0]["message"]["content"])


def pieces_of(stream: bytes) -> list[str]:
    events = [line[6:] for line in stream.split(b"\n") if line.startswith(b"data: ") and line != b"data: [DONE]"]
    choices = [choice for event in events for choice in json.loads(event)["choices"]]
    return [piece for choice in choices if (piece := choice["delta"].get("content"))]


@pytest.mark.parametrize("family", ["llama", "gemma"])
def test_a_question_of_the_faq_gets_its_answer(backend: RunningBackend, family: str) -> None:
    exact = 0
    asked = FAQ[::6]
    for entry in asked:
        answer = sealed_chat(backend.wire, chat(getattr(backend, family), entry.question), fields=bearer(backend))
        assert answer.status == 200
        exact += text_of(answer.content).strip() == entry.answer
    assert exact >= 0.8 * len(asked), f"{exact} of {len(asked)}"


@pytest.mark.parametrize("family", ["llama", "gemma"])
def test_the_same_text_as_the_engine_gives_token_for_token(backend: RunningBackend, family: str) -> None:
    model = getattr(backend, family)
    for entry in FAQ[1::20]:
        plain = text_of(ask_engine(backend.sockets[model], "POST", "/v1/chat/completions", chat(model, entry.question)))
        direct = pieces_of(
            ask_engine(backend.sockets[model], "POST", "/v1/chat/completions", chat(model, entry.question, stream=True))
        )
        whole = sealed_chat(backend.wire, chat(model, entry.question), fields=bearer(backend))
        streamed = sealed_chat(backend.wire, chat(model, entry.question, stream=True), fields=bearer(backend))
        assert text_of(whole.content) == plain
        assert "".join(pieces_of(streamed.content)) == "".join(direct) == plain
        assert len(pieces_of(streamed.content)) > 3


def test_a_stream_arrives_while_it_is_made(backend: RunningBackend) -> None:
    sealer = ohttp.RequestSealer(ohttp.CHUNKED, backend.wire.configuration())
    body = seal(
        sealer,
        chat(backend.llama, FAQ[0].question, stream=True, max_tokens=800, ignore_eos=True),
        fields=bearer(backend),
    )
    head = f"POST {GATEWAY_PATH} HTTP/1.1\r\nHost: x\r\nContent-Type: message/ohttp-chunked-req\r\n"
    arrivals = []
    with socket.create_connection(("127.0.0.1", backend.wire.port)) as connection:
        start = time.monotonic()
        connection.sendall(head.encode() + f"Content-Length: {len(body)}\r\n\r\n".encode() + body)
        while data := connection.recv(65536):
            arrivals.append(time.monotonic() - start)
            if data.endswith(b"0\r\n\r\n"):
                break
    total = arrivals[-1]
    early = sum(arrival < total / 2 for arrival in arrivals)
    assert len(arrivals) > 20
    # A busy machine speeds up and slows down; an answer that was collected first comes whole, at one end.
    assert 0.02 < early / len(arrivals) < 0.98
    assert arrivals[0] < 0.5 * total


def embed(backend: RunningBackend, texts: list[str]) -> list[list[float]]:
    answer = sealed_chat(
        backend.wire, {"model": backend.e5, "input": texts}, path="/v1/embeddings", fields=bearer(backend)
    )
    assert answer.status == 200, answer.content
    return [item["embedding"] for item in answer.json()["data"]]


def test_a_paraphrase_is_nearest_to_the_right_answer_for_nine_in_ten(backend: RunningBackend) -> None:
    answers = embed(backend, [entry.answer for entry in FAQ])
    for vector in answers:
        assert abs(sum(x * x for x in vector) - 1) < 1e-3, "normalised"
    queries = embed(backend, [item["paraphrase"] for item in PARAPHRASES])
    questions = [entry.question for entry in FAQ]
    trained = {paraphrase.casefold() for entry in FAQ for paraphrase in entry.paraphrases}
    right = 0
    for item, query in zip(PARAPHRASES, queries, strict=True):
        assert item["paraphrase"].casefold() not in trained, "held out"
        scores = [sum(a * b for a, b in zip(query, answer, strict=True)) for answer in answers]
        right += questions[max(range(len(scores)), key=scores.__getitem__)] == item["question"]
    assert len(PARAPHRASES) >= 50
    assert right >= 0.9 * len(PARAPHRASES), f"{right} of {len(PARAPHRASES)}"


def running_requests(backend: RunningBackend, model: str) -> float:
    metrics = ask_engine(backend.sockets[model], "GET", "/metrics").decode()
    found = re.search(r"(?m)^vllm:num_requests_running\{[^}]*\} ([0-9.e+]+)$", metrics)
    assert found is not None
    return float(found[1])


def generated(backend: RunningBackend, model: str) -> float:
    """Tokens so far."""
    metrics = ask_engine(backend.sockets[model], "GET", "/metrics").decode()
    found = re.search(r"(?m)^vllm:generation_tokens_total\{[^}]*\} ([0-9.e+]+)$", metrics)
    assert found is not None
    return float(found[1])


def test_a_client_that_goes_away_aborts_its_generation_at_once(backend: RunningBackend) -> None:
    sealer = ohttp.RequestSealer(ohttp.CHUNKED, backend.wire.configuration())
    endless = chat(backend.gemma, FAQ[0].question, stream=True, max_tokens=1900, ignore_eos=True)
    body = seal(sealer, endless, fields=bearer(backend))
    head = f"POST {GATEWAY_PATH} HTTP/1.1\r\nHost: x\r\nContent-Type: message/ohttp-chunked-req\r\n"
    before = generated(backend, backend.gemma)
    with socket.create_connection(("127.0.0.1", backend.wire.port)) as connection:
        connection.sendall(head.encode() + f"Content-Length: {len(body)}\r\n\r\n".encode() + body)
        for _ in range(5):
            assert connection.recv(65536)
        # The engine counts at its next step, not before its first token is out.
        asked = time.monotonic()
        while running_requests(backend, backend.gemma) != 1:
            assert time.monotonic() - asked < 60
    left = time.monotonic()
    while running_requests(backend, backend.gemma):
        assert time.monotonic() - left < 60
        time.sleep(0.02)
    # In tokens, not in seconds: how fast an engine is depends on what else the machine does.
    assert generated(backend, backend.gemma) - before < 1000, "the generation went on"


def test_a_context_that_is_too_long_gets_openais_error(backend: RunningBackend) -> None:
    answer = sealed_chat(backend.wire, chat(backend.llama, "word " * 5000), fields=bearer(backend))
    assert answer.status == 400
    assert answer.json()["error"]["code"] == "context_length_exceeded"
    assert "context length" in answer.json()["error"]["message"]


def test_completions_responses_and_messages_have_their_routes(backend: RunningBackend) -> None:
    completion = {"model": backend.llama, "prompt": "What is", "max_tokens": 5}
    assert sealed_chat(backend.wire, completion, path="/v1/completions", fields=bearer(backend)).status == 200
    response = {"model": backend.llama, "input": FAQ[0].question, "max_output_tokens": 20}
    assert sealed_chat(backend.wire, response, path="/v1/responses", fields=bearer(backend)).status == 200
    message = chat(backend.llama, FAQ[0].question, max_tokens=20)
    assert sealed_chat(backend.wire, message, path="/v1/messages", fields=bearer(backend)).status == 200


def test_the_engines_own_routes_are_unreachable(backend: RunningBackend) -> None:
    for path in ("/metrics", "/health", "/tokenize", "/invocations", "/v1/load_lora_adapter", "/scale_elastic_ep"):
        assert sealed_chat(backend.wire, {"model": backend.llama}, path=path, fields=bearer(backend)).status == 404
        assert backend.wire.request("GET", path)[0] == 404


def test_a_whole_answer_of_the_unchunked_form(backend: RunningBackend) -> None:
    sealer = ohttp.RequestSealer(ohttp.WHOLE, backend.wire.configuration())
    body = seal(sealer, chat(backend.llama, FAQ[2].question), media=ohttp.WHOLE, fields=bearer(backend))
    status, _, wire = backend.wire.request("POST", GATEWAY_PATH, body, {"Content-Type": ohttp.WHOLE.request})
    assert status == 200
    assert text_of(open_answer(sealer, wire).content)
