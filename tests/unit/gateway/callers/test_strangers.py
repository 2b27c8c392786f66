"""A caller without a key costs little: one chunk is opened, the rest is thrown away, and no receipt is signed."""

import asyncio
import hashlib
import json
import os
from collections.abc import Iterator

import httpx2
import pytest

from adytum.attestation.policy.policy import Policy
from adytum.inference.channel import bhttp, ehbp, hpke, keyconfig, ohttp
from adytum.inference.channel.bhttp import RequestHead, Trailers
from adytum.inference.channel.limits import DEFAULT_LIMITS
from adytum.inference.channel.openings import OhttpOpening
from adytum.inference.channel.padding import Padding
from adytum.inference.client.transport import AdytumTransport
from adytum.inference.core.config import parse
from adytum.inference.gateway import failures
from adytum.inference.gateway.edge.app import GATEWAY_PATH
from adytum.inference.gateway.exchange.reading import Arrivals
from adytum.inference.gateway.failures import Refused
from tests.support import config_text, open_answer, sealed_chat
from tests.unit.gateway.support import RunningGateway, running_gateway

CHAT = "/v1/chat/completions"
BODY = json.dumps({"model": "latest", "messages": [{"role": "user", "content": "x" * 40_000}]}).encode()
HEADERS = {"Content-Type": ohttp.CHUNKED.request}


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningGateway]:
    folder = tmp_path_factory.mktemp("strangers")
    digest = hashlib.sha256(b"right").hexdigest()
    text = config_text(port=0, runtime=folder, changes={"authentication": f'"keys"\nkey_sha256 = ["{digest}"]'})
    with running_gateway(parse(text.encode()), folder) as running:
        yield running


def request(gateway: RunningGateway, key: str, *, first: int = 16_384) -> tuple[ohttp.RequestSealer, list[bytes]]:
    """A request in chunks, of which the first has `first` bytes."""
    fields = ((b"content-type", b"application/json"), (b"authorization", b"Bearer " + key.encode()))
    message = bhttp.encode(RequestHead("POST", "https", "backend", CHAT, fields), BODY)
    sealer = ohttp.RequestSealer(ohttp.CHUNKED, gateway.configuration())
    rest = [message[at : at + 16_384] for at in range(first, len(message), 16_384)]
    return sealer, [sealer.start() + sealer.chunk(message[:first]), *map(sealer.chunk, rest), sealer.final(b"")]


def test_the_right_key_is_let_in_and_its_whole_request_is_opened(gateway: RunningGateway) -> None:
    sealer, pieces = request(gateway, "right")
    _, _, wire = gateway.request("POST", GATEWAY_PATH, b"".join(pieces), HEADERS)
    assert open_answer(sealer, wire).status == 200
    _, pieces = request(gateway, "right")
    pieces[1] = pieces[1][:-1] + bytes([pieces[1][-1] ^ 1])
    assert gateway.request("POST", GATEWAY_PATH, b"".join(pieces), HEADERS)[0] == 422


def test_behind_a_wrong_key_nothing_is_opened(gateway: RunningGateway) -> None:
    """Noise behind the first chunk would be an error if anybody looked."""
    sealer, pieces = request(gateway, "wrong")
    status, _, wire = gateway.request("POST", GATEWAY_PATH, pieces[0] + pieces[1][:4] + os.urandom(1_000_000), HEADERS)
    assert status == 200
    answer = open_answer(sealer, wire)
    assert (answer.status, answer.json()["error"]["code"]) == (401, "invalid_api_key")


@pytest.mark.parametrize("at", range(500, 20_000, 500))
def test_however_the_network_divides_a_strangers_request_no_more_of_it_is_opened(
    gateway: RunningGateway, at: int
) -> None:
    _, pieces = request(gateway, "wrong")
    wire = pieces[0] + pieces[1][:4] + os.urandom(100_000)
    messages = [
        {"type": "http.request", "body": wire[:at], "more_body": True},
        {"type": "http.request", "body": wire[at:], "more_body": False},
    ]

    async def receive() -> dict[str, object]:
        return messages.pop(0)

    def know(fields: bhttp.Fields) -> None:
        raise Refused(failures.BAD_KEY)

    arrivals = Arrivals(1 << 20, know)
    opening = OhttpOpening(ohttp.CHUNKED, gateway.keys.find, Padding.PAD)
    assert asyncio.run(arrivals.take(receive, opening)) is failures.BAD_KEY
    assert arrivals.held == 0


def test_a_header_that_the_first_chunk_cuts_is_read_with_the_rest(gateway: RunningGateway) -> None:
    for key, status in (("right", 200), ("wrong", 401)):
        sealer, pieces = request(gateway, key, first=20)
        _, _, wire = gateway.request("POST", GATEWAY_PATH, b"".join(pieces), HEADERS)
        assert open_answer(sealer, wire).status == status


def test_a_first_chunk_that_is_no_header_is_told_inside_the_seal(gateway: RunningGateway) -> None:
    sealer = ohttp.RequestSealer(ohttp.CHUNKED, gateway.configuration())
    sealed = sealer.start() + sealer.chunk(b"\x3f" * 100) + sealer.final(b"")
    status, _, wire = gateway.request("POST", GATEWAY_PATH, sealed, HEADERS)
    assert status == 200
    assert open_answer(sealer, wire).status == 400


def test_a_refused_request_is_not_answered_twice(gateway: RunningGateway) -> None:
    _, pieces = request(gateway, "wrong")
    assert gateway.request("POST", GATEWAY_PATH, b"".join(pieces), HEADERS)[0] == 200
    assert gateway.request("POST", GATEWAY_PATH, b"".join(pieces), HEADERS)[0] == 409


def test_what_is_thrown_away_is_bounded_too(gateway: RunningGateway) -> None:
    _, pieces = request(gateway, "wrong")
    sealed = pieces[0] + bytes(DEFAULT_LIMITS.message)
    assert gateway.request("POST", GATEWAY_PATH, sealed, HEADERS)[0] == 413


def test_ehbp_throws_the_rest_away_too(gateway: RunningGateway) -> None:
    key = keyconfig.KeyConfiguration.decode(gateway.request("GET", "/.well-known/hpke-keys")[2]).public_key
    enc, context = hpke.setup_sender(ehbp.SUITE, key, b"ehbp request")
    frame = context.seal(BODY[:16_384])
    headers = {"Ehbp-Encapsulated-Key": enc.hex(), "Content-Type": "application/json", "Authorization": "Bearer wrong"}
    sealed = len(frame).to_bytes(4, "big") + frame + b"\x00\x01\x00\x00" + os.urandom(65_536)
    status, fields, wire = gateway.request("POST", CHAT, sealed, headers)
    assert status == 401
    secret = context.export(b"ehbp response", 32)
    sequence = ehbp.response_sequence(secret, enc, bytes.fromhex(fields["ehbp-response-nonce"]))
    assert json.loads(sequence.open(wire[4:]))["error"]["code"] == "invalid_api_key"
    # Who cannot seal gets no answer from inside the seal.
    headers["Ehbp-Encapsulated-Key"] = os.urandom(32).hex()
    assert gateway.request("POST", CHAT, sealed, headers)[0] == 422


def test_a_wrong_key_alone_gets_no_receipt(gateway: RunningGateway) -> None:
    for key, path, status in (("wrong", CHAT, 401), ("right", "/v1/nothing", 404)):
        sealer = ohttp.RequestSealer(ohttp.CHUNKED, gateway.configuration())
        head = RequestHead("POST", "https", "backend", path, ((b"authorization", b"Bearer " + key.encode()),))
        sealed = sealer.start() + sealer.final(bhttp.encode(head, b"{}"))
        _, _, wire = gateway.request("POST", GATEWAY_PATH, sealed, HEADERS)
        opener, decoder = sealer.response(), bhttp.Decoder("response")
        events = decoder.feed(opener.feed(wire) + opener.finish()) + decoder.finish()
        assert events[0].status == status  # type: ignore[union-attr]
        assert any(isinstance(event, Trailers) for event in events) == (status != 401)


def test_the_clients_library_gives_the_refusal_on(gateway: RunningGateway) -> None:
    transport = AdytumTransport(gateway.url, Policy.accept_simulated())
    with httpx2.Client(transport=transport, base_url=gateway.url, timeout=20) as client:
        for key, status in (("wrong", 401), ("right", 200)):
            answer = client.post(CHAT, content=BODY, headers={"Authorization": f"Bearer {key}"})
            assert answer.status_code == status
            assert (answer.extensions["adytum"].receipt is None) == (status == 401)
    assert sealed_chat(gateway, b"{}", fields=((b"authorization", b"Bearer right"),)).status == 400
