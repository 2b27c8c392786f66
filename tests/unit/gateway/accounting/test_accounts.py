"""Receipts and records through a gateway: each answer has a receipt that the client's library checks, each request one
record, whatever becomes of it."""

import hashlib
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import pytest

from adytum.attestation.policy.policy import Policy
from adytum.inference.channel.receipts import Receipt, Spent
from adytum.inference.client.transport import AdytumTransport
from adytum.inference.core.config import parse
from tests.support import config_text
from tests.unit.gateway.support import RunningGateway, running_gateway

KEY = "sk-accounts"
CALLER = hashlib.sha256(KEY.encode()).hexdigest()[:12]
MODEL = "demo/llama-awq"
CHAT = "/v1/chat/completions"
EXACT = Spent(MODEL, bytes(32), 21, 16, 5, exact=True)


@dataclass
class Metered:
    gateway: RunningGateway
    client: httpx2.Client
    records: Path

    def wait(self, count: int) -> list[dict[str, Any]]:
        deadline = time.monotonic() + 5
        while len(lines := self.records.read_bytes().splitlines()) < count and time.monotonic() < deadline:
            time.sleep(0.01)
        return [json.loads(line) for line in lines]


@pytest.fixture
def metered(tmp_path: Path) -> Iterator[Metered]:
    text = config_text(port=0, runtime=tmp_path, api_keys=[KEY])
    text += f'\n[metering]\nrecords = "{tmp_path / "usage.jsonl"}"\ntoken_bucket = 8\n'
    with running_gateway(parse(text.encode()), tmp_path) as gateway:
        transport = AdytumTransport(gateway.url, Policy.accept_simulated(), api_key=KEY)
        with httpx2.Client(transport=transport, base_url=gateway.url, timeout=20) as client:
            yield Metered(gateway, client, tmp_path / "usage.jsonl")


def chat(script: str = "hello", **more: Any) -> dict[str, Any]:
    return {"model": MODEL, "messages": [{"role": "user", "content": script}], **more}


def receipt_of(response: httpx2.Response) -> Receipt:
    receipt = response.extensions["adytum"].receipt
    assert isinstance(receipt, Receipt)
    return receipt


def test_a_whole_answer_is_receipted_and_recorded(metered: Metered) -> None:
    response = metered.client.post(CHAT, json=chat())
    assert response.json()["said"] == "hello"
    receipt = receipt_of(response)
    assert (receipt.status, receipt.spent) == (200, EXACT)
    assert receipt.response == hashlib.sha256(response.content).digest()
    assert abs(receipt.issued_at - time.time()) < 60
    (line,) = metered.wait(1)
    expected = {"caller": CALLER, "model": MODEL, "route": CHAT, "outcome": "ok"}
    expected |= {"prompt_tokens": 24, "cached_tokens": 16, "completion_tokens": 8}
    assert {name: line[name] for name in expected} == expected


@pytest.mark.parametrize("asked", [None, {"include_usage": False}, {"include_usage": True}])
def test_a_stream_is_counted_whether_its_client_asked_or_not(metered: Metered, asked: dict[str, bool] | None) -> None:
    response = metered.client.post(CHAT, json=chat(stream=True, **({} if asked is None else {"stream_options": asked})))
    assert (b'"usage"' in response.content) == bool(asked and asked["include_usage"])
    assert response.content.rstrip().endswith(b"data: [DONE]") or b"data: [DONE]" in response.content
    assert receipt_of(response).spent == EXACT
    (line,) = metered.wait(1)
    assert (line["outcome"], line["prompt_tokens"]) == ("ok", 24)


def test_the_record_is_there_when_the_answer_ends(metered: Metered) -> None:
    for count in range(1, 20):
        metered.client.post(CHAT, json=chat(stream=bool(count % 2)))
        assert len(metered.records.read_bytes().splitlines()) == count


def test_a_stream_that_its_engine_cuts_is_estimated_and_says_so(metered: Metered) -> None:
    response = metered.client.post(CHAT, json=chat("die mid-stream", stream=True))
    assert b"engine_failed" in response.content
    spent = receipt_of(response).spent
    assert spent is not None
    assert (spent.exact, spent.completion_tokens) == (False, 2)
    (line,) = metered.wait(1)
    assert line["outcome"] == "cut"


def test_a_whole_answer_that_its_engine_cuts_is_no_clients_fault(metered: Metered) -> None:
    response = metered.client.post(CHAT, json=chat("die mid-answer"))
    assert (response.status_code, response.json()["error"]["code"]) == (502, "engine_failed")
    (line,) = metered.wait(1)
    assert (line["outcome"], line["completion_tokens"]) == ("cut", 0)


def test_a_client_that_leaves_pays_for_what_it_had(metered: Metered) -> None:
    with metered.client.stream("POST", CHAT, json=chat(stream=True, events=100, gap=0.05)) as response:
        for _ in zip(range(10), response.iter_lines(), strict=False):
            pass
    (line,) = metered.wait(1)
    assert line["outcome"] == "client_gone"
    assert line["completion_tokens"] >= 2


def test_an_engines_refusal_costs_nothing(metered: Metered) -> None:
    response = metered.client.post(CHAT, json=chat("error"))
    assert (response.status_code, receipt_of(response).status) == (400, 400)
    (line,) = metered.wait(1)
    assert (line["outcome"], line["prompt_tokens"], line["completion_tokens"]) == ("refused", 0, 0)


def test_what_no_engine_was_asked_is_receipted_and_not_recorded(metered: Metered) -> None:
    for path, body, status in ((CHAT, {"model": "unknown"}, 404), ("/v1/none", {}, 404)):
        response = metered.client.post(path, json=body)
        assert (response.status_code, receipt_of(response).status, receipt_of(response).spent) == (status, status, None)
    assert receipt_of(metered.client.get("/v1/models")).status == 200
    assert metered.records.read_bytes() == b""


def test_an_answer_whose_record_cannot_be_written_does_not_end_well(metered: Metered) -> None:
    metered.records.unlink()
    metered.records.mkdir()
    response = metered.client.post(CHAT, json=chat())
    assert (response.status_code, response.json()["error"]["code"]) == (500, "internal_error")
    with pytest.raises(httpx2.ReadError):
        metered.client.post(CHAT, json=chat(stream=True))
