"""Keys under load: rotation every second is never seen by a client; a full replay memory asks for a date."""

import json
import threading
import time
from pathlib import Path
from typing import Any

import httpx2
import pytest

from adytum.attestation.policy.policy import Policy
from adytum.inference.channel import ohttp
from adytum.inference.channel.bhttp import field
from adytum.inference.client.session import EXPIRY_MARGIN_S
from adytum.inference.client.transport import AdytumTransport
from adytum.inference.core.config import parse
from tests.support import config_text, seal, sealed_chat
from tests.unit.gateway.support import RunningGateway, event, running_gateway

CHAT = "/v1/chat/completions"
REQUESTS = 200
OHTTP_DATE = "https://iana.org/assignments/http-problem-types#date"


def chat(**more: Any) -> dict[str, Any]:
    return {"model": "demo/llama-awq", "messages": [{"role": "user", "content": "hello"}], **more}


def test_a_rotation_every_second_is_seen_by_no_client(tmp_path: Path) -> None:
    """Verified clients, some with streams that outlive keys, and raw ones that fetch the keys each time.

    The gateway's and the clients' clock counts requests: 20 are a second. So a slow machine sees as many rotations in
    as many requests as a fast one.
    """
    start = time.time()
    done: list[str] = []

    def clock() -> float:
        return start + len(done) / 20

    overlap = EXPIRY_MARGIN_S + 2
    changes = {"key_lifetime_s": "1", "key_overlap_s": str(overlap), "interval_s": "0.05"}
    config = parse(config_text(port=0, runtime=tmp_path, changes=changes).encode())
    with running_gateway(config, tmp_path, clock=clock) as gateway:
        errors: list[str] = []
        outlived: list[float] = []

        def verified(stream: bool) -> None:
            transport = AdytumTransport(gateway.url, Policy.accept_simulated(), clock=clock)
            with httpx2.Client(transport=transport, base_url=gateway.url, timeout=30) as client:
                while len(done) < REQUESTS:
                    began = clock()
                    asked = chat(stream=True, events=4, gap=0.1) if stream else chat()
                    response = client.post(CHAT, json=asked)
                    done.append("stream" if stream else "whole")
                    if stream and clock() - began > 1:
                        outlived.append(clock() - began)
                    if response.status_code != 200 or (stream and event(3).strip() not in response.content):
                        errors.append(f"{response.status_code}")

        def raw() -> None:
            while len(done) < REQUESTS:
                answer = sealed_chat(gateway, chat())
                done.append("raw")
                if answer.status != 200:
                    errors.append(f"raw {answer.status}")

        def guarded(run: Any, *arguments: Any) -> None:
            try:
                run(*arguments)
            except Exception as error:
                errors.append(repr(error))

        threads = [threading.Thread(target=guarded, args=(verified, i % 2 == 0)) for i in range(6)]
        threads += [threading.Thread(target=guarded, args=(raw,)) for _ in range(2)]
        before = {item.key_id for item in gateway.keys.configurations}
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert errors == []
        assert {"stream", "whole", "raw"} == set(done)
        assert outlived, "a stream was longer than its key was current"
        assert before.isdisjoint(item.key_id for item in gateway.keys.configurations)
        assert len(gateway.keys.ehbp_keys()) >= 7, "the keys before are still answered"


@pytest.fixture
def full(tmp_path: Path) -> Any:
    """A gateway that remembers two encapsulated keys of a generation, and has."""
    config = parse(config_text(port=0, runtime=tmp_path).encode())
    with running_gateway(config, tmp_path, replay_limit=6) as gateway:
        for _ in range(2):
            assert sealed_chat(gateway, chat()).status == 200
        yield gateway


def test_a_full_memory_asks_for_a_date_inside_the_seal(full: RunningGateway) -> None:
    answer = sealed_chat(full, chat())
    assert answer.status == 400
    assert field(answer.fields, b"content-type") == b"application/problem+json"
    document = json.loads(answer.content)
    assert (document["type"], document["error"]["code"]) == (OHTTP_DATE, "date_needed")
    said = field(answer.fields, b"date")
    assert said is not None
    assert sealed_chat(full, chat(), fields=((b"date", said),)).status == 200
    for wrong in (b"Fri, 15 Jan 2027 08:00:00 GMT", b"yesterday", b"\xff", b""):
        assert sealed_chat(full, chat(), fields=((b"date", wrong),)).status == 400


@pytest.mark.parametrize("wrong_by", [0.0, 3600.0])
def test_the_clients_library_sends_one_and_corrects_it_once(full: RunningGateway, wrong_by: float) -> None:
    wrong = [0.0]
    transport = AdytumTransport(
        full.url, Policy.accept_simulated(), clock=lambda: time.time() + wrong[0], recheck_s=1e9
    )
    before = transport.verify()
    wrong[0] = wrong_by / 2  # Its keys still count as good; its date does not.
    with httpx2.Client(transport=transport, base_url=full.url, timeout=20) as client:
        assert client.post(CHAT, json=chat()).status_code == 200
    assert transport.session is before


def test_a_replay_is_refused_while_dates_are_asked_for(full: RunningGateway) -> None:
    said = field(sealed_chat(full, chat()).fields, b"date")
    assert said is not None
    sealer = ohttp.RequestSealer(ohttp.CHUNKED, full.configuration())
    body = seal(sealer, chat(), fields=((b"date", said),))
    headers = {"Content-Type": ohttp.CHUNKED.request}
    path = "/.well-known/ohttp-gateway"
    assert full.request("POST", path, body, headers)[0] == 200
    assert full.request("POST", path, body, headers)[0] == 409


def test_more_than_can_be_remembered_is_told_to_wait(full: RunningGateway) -> None:
    said = field(sealed_chat(full, chat()).fields, b"date")
    assert said is not None
    for _ in range(2):
        assert sealed_chat(full, chat(), fields=((b"date", said),)).status == 200
    answer = sealed_chat(full, chat(), fields=((b"date", said),))
    assert (answer.status, field(answer.fields, b"retry-after")) == (503, b"5")
    assert json.loads(answer.content)["error"]["code"] == "overloaded"
