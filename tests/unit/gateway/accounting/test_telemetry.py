"""Metrics: right for each outcome, and nothing in them that a request brought."""

import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from adytum.inference.channel import ohttp
from adytum.inference.core.config import parse
from adytum.inference.engine.supervise.supervisor import numbers_of
from adytum.inference.gateway.accounting.telemetry import LABELS, Telemetry
from tests.support import config_text, seal, sealed_chat
from tests.unit.gateway.edge.test_connections import HEAD, connect
from tests.unit.gateway.support import RunningGateway, running_gateway

MODEL = "demo/llama-awq"
KEY = "sk-metrics-canary-771"


@pytest.fixture
def gateway(tmp_path: Path) -> Iterator[RunningGateway]:
    with running_gateway(parse(config_text(port=0, runtime=tmp_path, api_keys=[KEY]).encode()), tmp_path) as running:
        yield running


def ask(gateway: RunningGateway, script: str = "hello", **more: Any) -> int:
    body = {"model": MODEL, "messages": [{"role": "user", "content": script}], **more}
    return sealed_chat(gateway, body, fields=((b"authorization", b"Bearer " + KEY.encode()),)).status


def metrics(gateway: RunningGateway) -> dict[str, float]:
    lines = gateway.telemetry.page().decode().splitlines()
    return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if not line.startswith("#")}


def requests(outcome: str) -> str:
    return f'adytum_requests_total{{model="{MODEL}",outcome="{outcome}",route="/v1/chat/completions"}}'


def test_each_outcome_counts_once(gateway: RunningGateway) -> None:
    assert [ask(gateway), ask(gateway, stream=True, events=4, gap=0.05), ask(gateway, "error")] == [200, 200, 400]
    assert ask(gateway, "die mid-stream", stream=True) == 200
    assert ask(gateway, "die") == 503
    assert sealed_chat(gateway, b"{}").status == 401
    gateway.request("POST", "/.well-known/ohttp-gateway", b"x" * 99, {"Content-Type": "message/ohttp-chunked-req"})
    found = metrics(gateway)
    assert (found[requests("ok")], found[requests("refused")], found[requests("cut")]) == (2, 1, 1)
    assert found['adytum_refusals_total{code="engine_unavailable"}'] == 1
    assert found['adytum_refusals_total{code="invalid_api_key"}'] == 1
    assert found['adytum_unopened_total{status="422"}'] == 1
    assert found[f'adytum_time_to_first_token_seconds_count{{model="{MODEL}"}}'] == 2
    assert 0.02 < found[f'adytum_inter_chunk_seconds_sum{{model="{MODEL}"}}'] < 20


def test_tokens_advance_in_buckets(gateway: RunningGateway) -> None:
    ask(gateway)
    kinds = {
        kind: number
        for name, number in metrics(gateway).items()
        if (kind := re.sub(r'.*kind="(\w+)".*', r"\1", name)) != name and name.startswith("adytum_tokens_total")
    }
    assert kinds == {"prompt": 32, "cached": 16, "completion": 16}


def test_a_client_that_leaves_counts_once(gateway: RunningGateway) -> None:
    sealer = ohttp.RequestSealer(ohttp.CHUNKED, gateway.configuration())
    body = {"model": MODEL, "messages": [{"role": "user", "content": "x"}], "stream": True, "events": 100, "gap": 0.2}
    data = seal(sealer, body, fields=((b"x-api-key", KEY.encode()),))
    with connect(gateway) as connection:
        connection.sendall(HEAD + f"Content-Length: {len(data)}\r\n\r\n".encode() + data)
        connection.recv(100)
    deadline = time.monotonic() + 5
    while requests("client_gone") not in metrics(gateway) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert metrics(gateway)[requests("client_gone")] == 1


def test_nothing_that_a_request_brought_is_in_them(gateway: RunningGateway) -> None:
    ask(gateway, "canary-prompt-1", user="canary-user-2")
    sealed_chat(gateway, {"model": "canary-model-3"}, fields=((b"x-api-key", KEY.encode()),))
    sealed_chat(gateway, b"{}", path="/v1/canary-path-4", fields=((b"x-api-key", KEY.encode()),))
    sealed_chat(gateway, b"{}", fields=((b"x-api-key", b"canary-key-5"),))
    page = gateway.telemetry.page()
    assert b"canary" not in page
    assert b"adytum_requests_total" in page
    names = set(re.findall(r'[{,](\w+)="', page.decode())) - {"le"}
    assert names
    assert names <= LABELS


def test_a_label_that_is_not_on_the_list_cannot_be_made() -> None:
    with pytest.raises(ValueError, match="LABELS"):
        Telemetry(1, dict)._counter("x", "y", "prompt")
    with pytest.raises(ValueError, match="LABELS"):
        Telemetry(1, lambda: {"adytum_step": [({"prompt": "x"}, 1.0)]}).page()


# What an engine says of itself.


def test_three_numbers_of_an_engine_are_passed_on() -> None:
    page = b"""# HELP vllm:num_requests_running Number of requests in model execution batches.
vllm:num_requests_running{engine="0",model_name="m"} 3.0
vllm:num_requests_waiting{engine="0",model_name="m"} 12.0
vllm:kv_cache_usage_perc{engine="0",model_name="m"} 0.1203
vllm:prompt_tokens_total{engine="0",model_name="m"} 991.0
"""
    assert numbers_of(page) == {
        "adytum_engine_running": 3,
        "adytum_engine_waiting": 12,
        "adytum_engine_kv_cache_used": pytest.approx(0.15),
    }
    assert numbers_of(b"vllm:kv_cache_usage_perc 4.7e-05\n")["adytum_engine_kv_cache_used"] == pytest.approx(0.05)
    assert numbers_of(b"vllm:kv_cache_usage_perc 0.0\n") == {"adytum_engine_kv_cache_used": 0}


@pytest.mark.parametrize("said", [b"NaN", b"+Inf", b"-1", b"1e999", b"secret", b"1 canary", b"9999999999", b""])
def test_what_is_no_number_is_left_out(said: bytes) -> None:
    assert numbers_of(b"vllm:num_requests_waiting " + said + b"\n") == {}
