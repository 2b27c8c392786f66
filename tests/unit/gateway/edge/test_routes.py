"""What the gateway says in the clear, what it says inside the seal, and what never reaches an engine."""

import http.client
import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from adytum.inference.channel import bhttp, ehbp, hpke, keyconfig, ohttp
from adytum.inference.channel.bhttp import field
from adytum.inference.channel.errors import ChannelError
from adytum.inference.channel.hpke import KemId
from adytum.inference.core.config import parse
from adytum.inference.core.lifecycle import Step
from adytum.inference.gateway.edge.app import GATEWAY_PATH
from adytum.inference.gateway.failures import OHTTP_KEY_PROBLEM
from tests.support import config_text, open_answer, seal, sealed_chat
from tests.unit.gateway.support import RunningGateway, event, running_gateway

KEY = "sk-gateway-test"
BEARER = ((b"authorization", b"Bearer " + KEY.encode()),)
MODEL = "demo/llama-awq"


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningGateway]:
    folder = tmp_path_factory.mktemp("gateway")
    config = parse(config_text(port=0, runtime=folder, api_keys=[KEY]).encode())
    with running_gateway(config, folder) as running:
        yield running


def chat(script: str = "hello", **more: Any) -> dict[str, Any]:
    return {"model": MODEL, "messages": [{"role": "user", "content": script}], **more}


@pytest.mark.parametrize("kem", list(KemId))
@pytest.mark.parametrize("media", [ohttp.CHUNKED, ohttp.WHOLE])
def test_a_sealed_request_is_answered_and_reaches_the_engine_with_a_cache_salt(
    gateway: RunningGateway, kem: KemId, media: ohttp.Media
) -> None:
    answer = sealed_chat(gateway, chat("hello"), media=media, kem=kem, fields=BEARER)
    assert (answer.status, answer.json()["said"]) == (200, "hello")
    path, body = gateway.engine.seen[-1]
    assert len(body.pop("cache_salt")) == 64
    assert (path, body) == ("/v1/chat/completions", chat("hello"))
    assert not {"Authorization", "X-Api-Key", "Host-Key"} & set(gateway.engine.headers[-1]), "the key stops here"
    assert field(answer.fields, b"content-type") == b"application/json; charset=utf-8"


def test_a_large_answer_goes_in_chunks_that_every_receiver_takes(gateway: RunningGateway) -> None:
    answer = sealed_chat(gateway, chat("hello", size=100_000), fields=BEARER)
    assert len(answer.json()["pad"]) == 100_000


def test_a_stream_is_sealed_event_by_event_and_ends_authenticated(gateway: RunningGateway) -> None:
    answer = sealed_chat(gateway, chat("hello", stream=True, events=5), fields=BEARER)
    assert answer.status == 200
    assert field(answer.fields, b"x-engine") is None, "the engine's own headers are not passed on"
    real = [block for block in answer.content.split(b"\n\n") if block and not block.startswith(b":")]
    assert real == [*(event(i).strip() for i in range(5)), b"data: [DONE]"]


def test_events_arrive_when_they_are_made(gateway: RunningGateway) -> None:
    sealer = ohttp.RequestSealer(ohttp.CHUNKED, gateway.configuration())
    body = seal(sealer, chat("hello", stream=True, events=4, gap=60), fields=BEARER)
    connection = http.client.HTTPConnection("127.0.0.1", gateway.port, timeout=20)
    connection.request("POST", GATEWAY_PATH, body, {"Content-Type": ohttp.CHUNKED.request})
    response, opener, decoder = connection.getresponse(), sealer.response(), bhttp.Decoder("response")
    content = b""
    for i in range(4):
        while event(i) not in content:
            data = response.read1(65_536)
            assert data
            content += b"".join(e.data for e in decoder.feed(opener.feed(data)) if isinstance(e, bhttp.Content))
        # The engine makes the next one a minute later.
        assert b"data: [DONE]" not in content
        assert event(i + 1) not in content
        gateway.loop.skip(60)
    assert response.read()
    connection.close()


def _http(body: bytes) -> bytes:
    head = f"POST {GATEWAY_PATH} HTTP/1.1\r\nHost: x\r\nContent-Type: message/ohttp-chunked-req\r\n"
    return head.encode() + f"Content-Length: {len(body)}\r\n\r\n".encode() + body


@pytest.mark.parametrize(
    ("change", "status", "code"),
    [
        ({"fields": ()}, 401, "invalid_api_key"),
        ({"fields": ((b"authorization", b"Bearer wrong"),)}, 401, "invalid_api_key"),
        ({"fields": ((b"authorization", b"Bearer "),)}, 401, "invalid_api_key"),
        ({"path": "/metrics"}, 404, "unknown_path"),
        ({"path": "/tokenize"}, 404, "unknown_path"),
        ({"path": "/v1/chat/completions/../../metrics"}, 404, "unknown_path"),
        ({"path": "/v1/load_lora_adapter"}, 404, "unknown_path"),
        ({"method": "GET"}, 405, "method_not_allowed"),
        ({"body": b"{"}, 400, "invalid_json"),
        ({"body": b"[]"}, 400, "invalid_json"),
        ({"body": b""}, 400, "invalid_json"),
        ({"body": b"[" * 100_000}, 400, "invalid_json"),
        ({"body": {"messages": []}}, 400, None),
        ({"body": chat() | {"model": "gpt-unknown"}}, 404, "model_not_found"),
        ({"body": chat() | {"model": "demo/e5"}}, 400, None),
        ({"body": chat() | {"stream": "yes"}}, 400, None),
        ({"body": chat() | {"stream": True}, "media": ohttp.WHOLE}, 400, None),
        ({"body": chat("error")}, 400, None),
        ({"body": chat("die")}, 503, "engine_unavailable"),
    ],
)
def test_an_error_after_opening_is_sealed_in_openais_shape(
    gateway: RunningGateway, change: dict[str, Any], status: int, code: str | None
) -> None:
    reached = len(gateway.engine.seen)
    answer = sealed_chat(gateway, **{"body": chat(), "fields": BEARER, **change})
    assert answer.status == status
    error = answer.json()["error"]
    assert error["message"]
    assert error.get("code") == code
    if change.get("body") not in (chat("error"), chat("die")):
        assert len(gateway.engine.seen) == reached, "nothing refused reaches an engine"


def test_the_model_list_inside_and_outside(gateway: RunningGateway) -> None:
    status, _, body = gateway.request("GET", "/v1/models")
    inside = sealed_chat(gateway, b"", path="/v1/models", method="GET", fields=BEARER)
    assert status == inside.status == 200
    listed = json.loads(body)
    assert listed == inside.json()
    assert listed["object"] == "list"
    assert {"id": "latest", "object": "model", "tasks": ["generate"]} in listed["data"]
    assert {"id": "demo/e5", "object": "model", "tasks": ["embed"]} in listed["data"]


def test_an_engine_that_dies_mid_stream_ends_in_a_sealed_error_event(gateway: RunningGateway) -> None:
    answer = sealed_chat(gateway, chat("die mid-stream", stream=True, events=9), fields=BEARER)
    blocks = [block for block in answer.content.split(b"\n\n") if block and not block.startswith(b":")]
    assert blocks[:2] == [event(0).strip(), event(1).strip()]
    assert json.loads(blocks[-1].removeprefix(b"data: "))["error"]["code"] == "engine_failed"
    assert b"[DONE]" not in answer.content


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_aborts_at_the_engine_at_once(gateway: RunningGateway, stream: bool) -> None:
    sealer = ohttp.RequestSealer(ohttp.CHUNKED, gateway.configuration())
    aborted = gateway.engine.aborted
    reached = len(gateway.engine.seen)
    script = chat("hello", stream=True, events=600, gap=0.1) if stream else chat("forever")
    with socket.create_connection(("127.0.0.1", gateway.port)) as connection:
        connection.sendall(_http(seal(sealer, script, fields=BEARER)))
        _until(lambda: len(gateway.engine.seen) > reached)
    # The engine would need a minute.
    _until(lambda: gateway.engine.aborted > aborted)
    _until(lambda: gateway.sealed.in_progress == 0)


def _until(holds: Any, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def _problem(answer: tuple[int, dict[str, str], bytes]) -> dict[str, Any]:
    status, headers, body = answer
    assert headers["content-type"] == "application/problem+json"
    document = json.loads(body)
    assert document["status"] == status
    assert document["error"]["message"] == document["title"]
    return dict(document)


def test_plaintext_inference_is_refused_with_how_to_seal_it(gateway: RunningGateway) -> None:
    reached = len(gateway.engine.seen)
    for path in ("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses", "/v1/messages"):
        answer = gateway.request("POST", path, json.dumps(chat()).encode(), {"Authorization": f"Bearer {KEY}"})
        document = _problem(answer)
        assert document["status"] == 400
        assert "adytum proxy" in document["title"]
    assert len(gateway.engine.seen) == reached


def test_before_opening_one_fixed_text_and_no_cause(gateway: RunningGateway) -> None:
    headers = {"Content-Type": "message/ohttp-chunked-req"}
    good = ohttp.RequestSealer(ohttp.CHUNKED, gateway.configuration())
    valid = seal(good, chat(), fields=BEARER)
    texts = set()
    for body in (
        b"",
        b"garbage",
        valid[:-1],
        valid[:100],
        valid[:-1] + bytes([valid[-1] ^ 1]),
        valid[:8] + bytes([valid[8] ^ 1]) + valid[9:],
        valid + b"\x00",
    ):
        answer = gateway.request("POST", GATEWAY_PATH, body, headers)
        document = _problem(answer)
        if document["type"] != OHTTP_KEY_PROBLEM:
            assert document["status"] == 400
            texts.add(document["title"])
    assert len(texts) == 1


def test_an_unknown_key_has_its_own_problem_type(gateway: RunningGateway) -> None:
    known = gateway.configuration()
    strange = keyconfig.KeyConfiguration(255 - known.key_id, known.kem, known.public_key)
    sealer = ohttp.RequestSealer(ohttp.CHUNKED, strange)
    headers = {"Content-Type": "message/ohttp-chunked-req"}
    document = _problem(gateway.request("POST", GATEWAY_PATH, seal(sealer, chat()), headers))
    assert (document["status"], document["type"]) == (422, OHTTP_KEY_PROBLEM)


def test_a_replayed_request_is_refused(gateway: RunningGateway) -> None:
    sealer = ohttp.RequestSealer(ohttp.CHUNKED, gateway.configuration())
    body = seal(sealer, chat(), fields=BEARER)
    headers = {"Content-Type": "message/ohttp-chunked-req"}
    first = gateway.request("POST", GATEWAY_PATH, body, headers)
    reached = len(gateway.engine.seen)
    assert first[0] == 200
    assert _problem(gateway.request("POST", GATEWAY_PATH, body, headers))["status"] == 409
    assert len(gateway.engine.seen) == reached


def test_an_oversized_request_is_refused_before_it_is_kept(gateway: RunningGateway) -> None:
    headers = {"Content-Type": "message/ohttp-chunked-req"}
    start = ohttp.RequestSealer(ohttp.CHUNKED, gateway.configuration()).start()
    huge = start + (0x80000000 | 64 * 1024 * 1024).to_bytes(4, "big") + b"x" * 1000
    assert _problem(gateway.request("POST", GATEWAY_PATH, huge, headers))["status"] == 413


@pytest.mark.parametrize("media", ["application/json", "text/plain", "", "message/ohttp-keys"])
def test_a_wrong_media_type_is_told_what_to_send(gateway: RunningGateway, media: str) -> None:
    document = _problem(gateway.request("POST", GATEWAY_PATH, b"x", {"Content-Type": media}))
    assert document["status"] == 415
    assert "message/ohttp-chunked-req" in document["title"]


@pytest.mark.parametrize("path", ["/", "/metrics", "/docs", "/openapi.json", "/v1/tokenize", "/v1/models/../metrics"])
def test_nothing_else_is_there(gateway: RunningGateway, path: str) -> None:
    assert _problem(gateway.request("GET", path))["status"] == 404


@pytest.mark.parametrize("nonce", ["", "ab", "G" * 64, "A" * 64, "0" * 63, "0" * 65])
def test_evidence_needs_a_nonce(gateway: RunningGateway, nonce: str) -> None:
    document = _problem(gateway.request("GET", f"/.well-known/attestation?nonce={nonce}"))
    assert document["status"] == 400
    assert "64" in document["title"]


def test_evidence_for_many_at_once_shares_reports(gateway: RunningGateway) -> None:
    from concurrent.futures import ThreadPoolExecutor

    nonces = [f"{i:064x}" for i in range(40)]
    with ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(lambda n: gateway.request("GET", f"/.well-known/attestation?nonce={n}"), nonces))
    assert {status for status, _, _ in answers} == {200}
    reports = {json.loads(body)["cpu"]["report"] for _, _, body in answers}
    assert 1 <= len(reports) < len(nonces)


def test_ehbp_seals_chats_streams_and_errors(gateway: RunningGateway) -> None:
    for body, expected in (
        (chat("hello"), b'"hello"'),
        (chat("hello", stream=True), b"[DONE]"),
        (b"{", b"invalid_json"),
    ):
        status, headers, wire = _ehbp(gateway, body)
        assert status == (400 if body == b"{" else 200)
        assert expected in wire
        assert "content-length" not in headers or body != chat("hello", stream=True)


def _ehbp(gateway: RunningGateway, body: Any, path: str = "/v1/chat/completions") -> tuple[int, dict[str, str], bytes]:
    _, keys_headers, keys = gateway.request("GET", "/.well-known/hpke-keys")
    assert keys_headers["content-type"] == "application/ohttp-keys"
    assert len(keys) == 41
    enc, context = hpke.setup_sender(ehbp.SUITE, keys[3:35], b"ehbp request")
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    sealed = context.seal(content)
    headers = {ehbp.REQUEST_HEADER: enc.hex(), "Authorization": f"Bearer {KEY}"}
    status, answer, wire = gateway.request("POST", path, len(sealed).to_bytes(4, "big") + sealed, headers)
    nonce = bytes.fromhex(answer[ehbp.RESPONSE_HEADER])
    sequence = ehbp.response_sequence(context.export(b"ehbp response", 32), enc, nonce)
    opened = b""
    while wire:
        length = int.from_bytes(wire[:4], "big")
        opened += sequence.open(wire[4 : 4 + length])
        wire = wire[4 + length :]
    return status, answer, opened


def test_ehbp_before_opening(gateway: RunningGateway) -> None:
    for header, status in (("zz", 400), ("00" * 32, 400), ("ab" * 32, 422)):
        body = b"\x00\x00\x00\x20" + bytes(32)
        answer = gateway.request("POST", "/v1/chat/completions", body, {ehbp.REQUEST_HEADER: header})
        document = _problem(answer)
        assert document["status"] == status
        assert (document["type"] == ehbp.KEY_CONFIG_PROBLEM) == (status == 422)


def test_ready_tells_the_step_and_nothing_is_opened_before_serving(tmp_path: Path) -> None:
    config = parse(config_text(port=0, runtime=tmp_path).encode())
    with running_gateway(config, tmp_path, serving=False) as waiting:
        status, _, body = waiting.request("GET", "/readyz")
        assert (status, json.loads(body)["step"]) == (503, "CANARY")
        sealer = ohttp.RequestSealer(ohttp.CHUNKED, waiting.configuration())
        sealed = seal(sealer, chat())
        headers = {"Content-Type": "message/ohttp-chunked-req"}
        answer = waiting.request("POST", GATEWAY_PATH, sealed, headers)
        assert _problem(answer)["status"] == 503
        assert "retry-after" in answer[1]
        waiting.lifecycle.advance(Step.SERVING)
        status, _, wire = waiting.request("POST", GATEWAY_PATH, sealed, headers)
        assert (status, open_answer(sealer, wire).status) == (200, 200), "refused is not spent"
        waiting.lifecycle.advance(Step.DRAINING)
        assert waiting.request("GET", "/readyz")[0] == 503


def test_no_more_than_the_configured_requests_at_once(tmp_path: Path) -> None:
    config = parse(config_text(port=0, runtime=tmp_path, changes={"max_requests": "1"}).encode())
    with running_gateway(config, tmp_path) as small:
        sealer = ohttp.RequestSealer(ohttp.CHUNKED, small.configuration())
        with socket.create_connection(("127.0.0.1", small.port)) as connection:
            connection.sendall(_http(seal(sealer, chat("forever"))))
            _until(lambda: small.engine.seen)
            other = ohttp.RequestSealer(ohttp.CHUNKED, small.configuration())
            headers = {"Content-Type": "message/ohttp-chunked-req"}
            assert _problem(small.request("POST", GATEWAY_PATH, seal(other, chat()), headers))["status"] == 503
        _until(lambda: small.sealed.in_progress == 0)
        assert sealed_chat(small, chat()).status == 200


def test_a_flipped_bit_of_an_answer_never_opens(gateway: RunningGateway) -> None:
    sealer = ohttp.RequestSealer(ohttp.CHUNKED, gateway.configuration())
    headers = {"Content-Type": "message/ohttp-chunked-req"}
    _, _, wire = gateway.request("POST", GATEWAY_PATH, seal(sealer, chat(), fields=BEARER), headers)
    for at in range(0, len(wire), 7):
        with pytest.raises(ChannelError):
            open_answer(sealer, wire[:at] + bytes([wire[at] ^ 4]) + wire[at + 1 :])
    for end in range(0, len(wire), 5):
        with pytest.raises(ChannelError):
            open_answer(sealer, wire[:end])
