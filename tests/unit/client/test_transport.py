"""The transports against a scripted backend, in clients of httpx2 and of httpx.

Nothing is sent before verification, no truncated answer passes, and there is no fallback.
"""

import asyncio
import json
import stat
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import httpx2
import pytest

from adytum.attestation.policy.policy import Policy
from adytum.deploy.demo.relay import Relay
from adytum.inference.channel import keyconfig
from adytum.inference.client.errors import (
    ClientError,
    NotVerified,
    RequestRefused,
    ResponseCut,
    ResponseForged,
    UpstreamRefused,
    UpstreamUnreachable,
)
from adytum.inference.client.transport import AdytumTransport, AsyncAdytumTransport
from tests.conftest import free_port
from tests.unit.client.support import API_KEY, GATEWAY, WORDS, Fake, chat, running_fake, with_claims

CHAT = "/v1/chat/completions"
SIMULATED = Policy.accept_simulated()


class Sync:
    """A client of the synchronous transport. `http` is httpx2 or httpx."""

    def __init__(
        self, http: Any, url: str, base_url: str | None = None, policy: Policy = SIMULATED, **options: Any
    ) -> None:
        transport = AdytumTransport(upstream=url, policy=policy, **options)
        self._client = http.Client(transport=transport, base_url=base_url or url, timeout=20, follow_redirects=True)

    def post(self, path: str = CHAT, **options: Any) -> Any:
        return self._client.post(path, **options)

    def stream(self, **options: Any) -> list[tuple[float, bytes]]:
        with self._client.stream("POST", CHAT, json=chat(stream=True), **options) as response:
            return [(time.monotonic(), data) for data in response.iter_raw()]

    def leave(self) -> None:
        """Reads the start of a stream and closes it."""
        with self._client.stream("POST", CHAT, json=chat(stream=True)) as response:
            next(response.iter_raw())

    def close(self) -> None:
        self._client.close()


class Async:
    """The same for the asynchronous one."""

    def __init__(
        self, http: Any, url: str, base_url: str | None = None, policy: Policy = SIMULATED, **options: Any
    ) -> None:
        self._loop = asyncio.new_event_loop()
        transport = AsyncAdytumTransport(upstream=url, policy=policy, **options)
        self._client = http.AsyncClient(
            transport=transport, base_url=base_url or url, timeout=20, follow_redirects=True
        )

    def post(self, path: str = CHAT, **options: Any) -> Any:
        return self._loop.run_until_complete(self._client.post(path, **options))

    def stream(self, **options: Any) -> list[tuple[float, bytes]]:
        async def run() -> list[tuple[float, bytes]]:
            async with self._client.stream("POST", CHAT, json=chat(stream=True), **options) as response:
                return [(time.monotonic(), data) async for data in response.aiter_raw()]

        return self._loop.run_until_complete(run())

    def leave(self) -> None:
        """Reads the start of a stream and closes it."""

        async def run() -> None:
            async with self._client.stream("POST", CHAT, json=chat(stream=True)) as response:
                await anext(response.aiter_raw())

        self._loop.run_until_complete(run())

    def close(self) -> None:
        self._loop.run_until_complete(self._client.aclose())
        self._loop.close()


Client = Sync | Async


@pytest.fixture(params=[httpx2, httpx], ids=["httpx2", "httpx"])
def http(request: pytest.FixtureRequest) -> Any:
    """The library of the client that holds the transport."""
    return request.param


@pytest.fixture(params=[Sync, Async])
def connect(request: pytest.FixtureRequest, http: Any) -> Iterator[Callable[..., Client]]:
    """Makes clients of one transport, then of the other."""
    made: list[Client] = []

    def connect(*args: Any, **options: Any) -> Client:
        made.append(request.param(http, *args, **options))
        return made[-1]

    yield connect
    for client in made:
        client.close()


def cause_of(caught: pytest.ExceptionInfo[Exception]) -> ClientError:
    assert isinstance(caught.value.__cause__, ClientError)
    return caught.value.__cause__


def test_verification_comes_before_the_first_sealed_byte(fake: Fake, connect: Callable[..., Client]) -> None:
    client = connect(fake.url)
    assert json.loads(client.post(json=chat()).content)["choices"][0]["message"]["content"] == " ".join(WORDS)
    assert client.post("/v1/embeddings?q=1", json={"input": "x"}).status_code == 200
    assert fake.seen == ["GET /.well-known/attestation", f"POST {GATEWAY}", f"POST {GATEWAY}"]
    assert [request.path for request in fake.inner] == [CHAT, "/v1/embeddings?q=1"]


def test_simulated_evidence_is_refused_by_the_default_policy_and_nothing_leaves(
    fake: Fake, http: Any, connect: Callable[..., Client]
) -> None:
    client = connect(fake.url, policy=Policy.default(frozenset({bytes(48)})))
    with pytest.raises(http.ConnectError, match="claim cpu") as caught:
        client.post(json=chat())
    assert isinstance(cause_of(caught), NotVerified)
    assert fake.requests == 0


@pytest.mark.parametrize(
    ("answer", "cause"),
    [
        ((200, {}, b"not json"), NotVerified),
        ((200, {}, b"x" * (3 << 20)), NotVerified),
        ((404, {}, b""), NotVerified),
        ((302, {"location": "/elsewhere"}, b""), UpstreamRefused),
        ((500, {}, b""), UpstreamRefused),
    ],
)
def test_without_evidence_nothing_leaves(
    fake: Fake, http: Any, connect: Callable[..., Client], answer: Any, cause: type[ClientError]
) -> None:
    fake.evidence = answer
    with pytest.raises(http.TransportError) as caught:
        connect(fake.url).post(json=chat())
    assert type(cause_of(caught)) is cause
    assert fake.seen == ["GET /.well-known/attestation"]


def test_evidence_made_for_another_nonce_is_refused(fake: Fake, http: Any, connect: Callable[..., Client]) -> None:
    recorded = httpx2.get(f"{fake.url}/.well-known/attestation?nonce={'ab' * 32}").content
    fake.evidence = (200, {"content-type": "application/json"}, recorded)
    with pytest.raises(http.ConnectError, match="nonce"):
        connect(fake.url).post(json=chat())
    assert fake.requests == 0


def test_an_unknown_key_is_verified_anew_and_tried_once_more(fake: Fake, connect: Callable[..., Client]) -> None:
    client = connect(fake.url)
    client.post(json=chat())
    fake.forget = 1
    fake.keys.rotate()
    assert client.post(json=chat()).status_code == 200
    assert fake.evidence_asked == 2
    assert fake.requests == 3
    assert len(fake.inner) == 2


def test_a_key_unknown_twice_is_an_error(fake: Fake, http: Any, connect: Callable[..., Client]) -> None:
    fake.forget = 2
    with pytest.raises(http.RemoteProtocolError) as caught:
        connect(fake.url).post(json=chat())
    error = cause_of(caught)
    assert isinstance(error, UpstreamRefused)
    assert error.status == 422
    assert (fake.evidence_asked, fake.requests, fake.inner) == (2, 2, [])


def test_a_rotated_key_is_used_only_with_evidence_for_it(fake: Fake, http: Any, connect: Callable[..., Client]) -> None:
    client = connect(fake.url)
    client.post(json=chat())
    fake.forget = 1
    with running_fake() as other:
        document = httpx2.get(f"{other.url}/.well-known/attestation?nonce={'00' * 32}").content
    fake.evidence = (200, {"content-type": "application/json"}, document)
    with pytest.raises(http.ConnectError, match="not verified"):
        client.post(json=chat())
    assert fake.requests == 2  # The first one, and the one that was answered that its key is unknown.


def test_evidence_is_asked_for_again_when_keys_are_about_to_expire(fake: Fake, connect: Callable[..., Client]) -> None:
    fake.claims = with_claims(keys_expire_at=int(time.time()) + 30)
    client = connect(fake.url)
    client.post(json=chat())
    client.post(json=chat())
    assert fake.evidence_asked == 2


def test_evidence_is_asked_for_again_after_the_interval(fake: Fake, connect: Callable[..., Client]) -> None:
    client = connect(fake.url, recheck_s=0.2)
    client.post(json=chat())
    client.post(json=chat())
    time.sleep(0.25)
    client.post(json=chat())
    assert 2 <= fake.evidence_asked <= 3


@pytest.mark.parametrize("url", ["http://127.0.0.1:1", "https://127.0.0.1", "http://localhost"])
def test_another_origin_is_refused(fake: Fake, http: Any, connect: Callable[..., Client], url: str) -> None:
    with pytest.raises(http.LocalProtocolError, match="base_url") as caught:
        connect(fake.url, base_url=url).post(json=chat())
    assert isinstance(cause_of(caught), RequestRefused)
    assert fake.seen == []


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_redirects_are_not_followed(fake: Fake, http: Any, connect: Callable[..., Client], status: int) -> None:
    with running_fake() as other:
        fake.plain = (status, {"location": f"{other.url}{GATEWAY}"}, b"")
        with pytest.raises(http.RemoteProtocolError, match="redirect"):
            connect(fake.url).post(json=chat())
        assert other.seen == []


@pytest.mark.parametrize(
    "answer",
    [
        (200, {"content-type": "application/json"}, json.dumps({"choices": [{"message": {"content": "hi"}}]}).encode()),
        (200, {"content-type": "text/event-stream"}, b"data: {}\n\ndata: [DONE]\n\n"),
        (200, {"content-type": "message/ohttp-chunked-res"}, b"data: {}\n\n"),
        (200, {"content-type": "message/ohttp-chunked-res"}, b""),
        (200, {"content-type": "message/ohttp-res"}, bytes(100)),
        (204, {}, b""),
    ],
)
def test_an_answer_that_is_not_sealed_is_refused(
    fake: Fake, http: Any, connect: Callable[..., Client], answer: Any
) -> None:
    fake.plain = answer
    with pytest.raises((http.RemoteProtocolError, http.ReadError)) as caught:
        connect(fake.url).post(json=chat())
    assert isinstance(cause_of(caught), ResponseForged | ResponseCut)


@pytest.mark.parametrize("status", [429, 503])
def test_a_busy_backend_is_an_answer_that_sdks_retry_in_due_time(
    fake: Fake, connect: Callable[..., Client], status: int
) -> None:
    fake.plain = (status, {"content-type": "application/problem+json", "retry-after": "5"}, b'{"title": "Later."}')
    response = connect(fake.url).post(json=chat())
    assert response.status_code == status
    assert response.headers["retry-after"] == "5"
    assert "Later." in json.loads(response.content)["error"]["message"]


def test_a_backend_that_is_not_there_is_a_connect_error(http: Any, connect: Callable[..., Client]) -> None:
    with pytest.raises(http.ConnectError, match="cannot be reached") as caught:
        connect(f"http://127.0.0.1:{free_port()}").post(json=chat())
    assert isinstance(cause_of(caught), UpstreamUnreachable)


def test_a_backend_that_is_silent_is_a_read_timeout(fake: Fake, http: Any, connect: Callable[..., Client]) -> None:
    client = connect(fake.url)
    client.post(json=chat())
    fake.gap = 5
    with pytest.raises(http.ReadTimeout) as caught:
        client.stream(timeout=0.2)
    assert isinstance(cause_of(caught), ResponseCut)
    assert isinstance(cause_of(caught).__cause__, httpx2.ReadTimeout)


def test_a_body_that_comes_in_pieces_is_sealed_whole(fake: Fake, connect: Callable[..., Client]) -> None:
    pieces = (b'{"mess', b'ages": []}')

    async def later() -> AsyncIterator[bytes]:
        for piece in pieces:
            yield piece

    client = connect(fake.url)
    assert client.post(content=later() if isinstance(client, Async) else iter(pieces)).status_code == 200
    assert fake.inner[0].body == b'{"messages": []}'


def test_an_error_inside_the_seal_is_an_answer(fake: Fake, connect: Callable[..., Client]) -> None:
    response = connect(fake.url).post("/v1/nothing", json={})
    assert response.status_code == 404
    assert json.loads(response.content)["error"]["message"] == "unknown path"


def test_a_stream_is_delivered_as_it_arrives(fake: Fake, connect: Callable[..., Client]) -> None:
    fake.gap = 0.1
    client = connect(fake.url)
    client.post(json=chat())
    arrived = [at for at, data in client.stream() if b"data: " in data]
    assert len(arrived) == len(WORDS) + 2
    # A loose bound, for busy machines: spread over the time in which they were made, none held back for another.
    assert arrived[-1] - arrived[0] > 0.7 * 0.1 * (len(arrived) - 1)
    assert sorted(later - earlier for earlier, later in pairwise(arrived))[1] > 0.02


@pytest.mark.parametrize("clean", [True, False])
@pytest.mark.parametrize("stream", [True, False])
def test_an_answer_cut_at_any_write_is_an_error(
    fake: Fake, http: Any, connect: Callable[..., Client], stream: bool, clean: bool
) -> None:
    client = connect(fake.url)
    ask: Callable[[], Any] = client.stream if stream else lambda: client.post(json=chat())
    ask()
    writes, fake.clean_stop = fake.writes, clean
    assert writes == (len(WORDS) + 4 if stream else 3)
    for stop_at in range(writes):
        fake.stop_at = stop_at
        with pytest.raises((http.ReadError, http.RemoteProtocolError)) as caught:
            ask()
        assert isinstance(cause_of(caught), ResponseCut | UpstreamUnreachable)
    fake.stop_at = None
    ask()


@pytest.mark.parametrize("stream", [True, False])
def test_an_answer_changed_in_any_write_is_an_error_before_its_content_is_used(
    fake: Fake, http: Any, connect: Callable[..., Client], stream: bool
) -> None:
    client = connect(fake.url)
    ask: Callable[[], Any] = client.stream if stream else lambda: client.post(json=chat())
    ask()
    for n in range(fake.writes):
        fake.change = lambda i, data, n=n: _flipped(data) if i == n else data
        with pytest.raises((http.RemoteProtocolError, http.ReadError)) as caught:
            ask()
        assert isinstance(cause_of(caught), ResponseForged | ResponseCut)


def _flipped(data: bytes) -> bytes:
    at = len(data) // 2
    return data[:at] + bytes((data[at] ^ 1,)) + data[at + 1 :]


def test_leaving_a_stream_reaches_the_backend(fake: Fake, connect: Callable[..., Client]) -> None:
    fake.gap = 0.2
    connect(fake.url).leave()
    assert fake.left.wait(1)


def test_the_clients_key_goes_inside_and_replaces_the_callers(fake: Fake, connect: Callable[..., Client]) -> None:
    connect(fake.url, api_key=API_KEY).post(json=chat(), headers={"authorization": "Bearer sk-other", "cookie": "a=b"})
    fields = dict(fake.inner[0].fields)
    assert fields[b"authorization"] == f"Bearer {API_KEY}".encode()
    assert b"cookie" not in fields
    assert b"host" not in fields
    assert set(fake.outer[0]) == {"host", "content-type", "accept", "incremental", "content-length"}


@pytest.mark.parametrize(("kem", "wire"), [(None, 0x647A), ("x25519", 0x0020)])
def test_the_kem_can_be_chosen(fake: Fake, connect: Callable[..., Client], kem: str | None, wire: int) -> None:
    connect(fake.url, kem=kem).post(json=chat())
    assert fake.kems == [wire]


def test_invalid_options_are_refused_at_once() -> None:
    with pytest.raises(ValueError, match="kem is one of"):
        AdytumTransport(upstream="https://a.example", policy=SIMULATED, kem="rsa")
    with pytest.raises(ValueError, match="origin"):
        AdytumTransport(upstream="https://a.example/v1", policy=SIMULATED)


def test_threads_that_start_together_verify_once(fake: Fake) -> None:
    transport = AdytumTransport(upstream=fake.url, policy=SIMULATED)
    gate = threading.Barrier(8)
    with httpx2.Client(transport=transport, base_url=fake.url) as client, ThreadPoolExecutor(8) as pool:

        def ask(_: int) -> int:
            gate.wait(10)
            return client.post(CHAT, json=chat()).status_code

        assert list(pool.map(ask, range(8))) == [200] * 8
    assert fake.evidence_asked == 1


def test_tasks_that_start_together_verify_once_and_share_a_failure(fake: Fake) -> None:
    async def run(policy: Policy) -> list[Any]:
        transport = AsyncAdytumTransport(upstream=fake.url, policy=policy)
        async with httpx2.AsyncClient(transport=transport, base_url=fake.url) as client:
            asked = (client.post(CHAT, json=chat()) for _ in range(8))
            return await asyncio.gather(*asked, return_exceptions=True)

    assert [answer.status_code for answer in asyncio.run(run(SIMULATED))] == [200] * 8
    assert fake.evidence_asked == 1
    failed = asyncio.run(run(Policy.default(frozenset({bytes(48)}))))
    assert all(isinstance(error, httpx2.ConnectError) for error in failed)
    assert fake.evidence_asked == 2
    assert fake.requests == 8


def test_a_failure_is_not_remembered(fake: Fake, http: Any, connect: Callable[..., Client]) -> None:
    client = connect(fake.url)
    fake.evidence = (500, {}, b"")
    with pytest.raises(http.TransportError):
        client.post(json=chat())
    fake.evidence = None
    assert client.post(json=chat()).status_code == 200


def test_proxies_of_the_environment_do_not_get_around_the_transport(
    fake: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{free_port()}")
    transport = AdytumTransport(upstream=fake.url, policy=SIMULATED)
    with httpx2.Client(transport=transport, base_url=fake.url) as other:
        assert other.post(CHAT, json=chat()).status_code == 200


def test_the_workspace_keeps_accepted_evidence_and_nothing_else(
    fake: Fake, connect: Callable[..., Client], tmp_path: Path
) -> None:
    folder = tmp_path / "made" / "here"
    client = connect(fake.url, workspace=folder, api_key=API_KEY)
    client.post(json=chat())
    fake.forget = 1
    client.post(json=chat())
    lines = [json.loads(line) for line in (folder / "evidence.log").read_text().splitlines()]
    assert len(lines) == 2
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o600}
    assert {path.name for path in folder.iterdir()} == {"evidence.log", *(line["document"] for line in lines)}
    for line in lines:
        document = (folder / line["document"]).read_bytes()
        assert line["document"].endswith(f"Z-{line['sha256'][:16]}.json")
        assert line["upstream"] == fake.url
        assert line["provider"] == "simulated"
        assert json.loads(document)["type"] == "adytum-evidence"
    assert lines[0]["nonce"] != lines[1]["nonce"]
    kept = b"".join(path.read_bytes() for path in folder.iterdir())
    for secret in (API_KEY, "quixotic", *WORDS):
        assert secret.encode() not in kept


def test_refused_evidence_is_not_kept(fake: Fake, http: Any, connect: Callable[..., Client], tmp_path: Path) -> None:
    client = connect(fake.url, workspace=tmp_path, policy=Policy.default(frozenset({bytes(48)})))
    with pytest.raises(http.ConnectError):
        client.post(json=chat())
    assert list(tmp_path.iterdir()) == []


def test_a_record_that_cannot_be_written_stops_the_request(
    fake: Fake, http: Any, connect: Callable[..., Client], tmp_path: Path
) -> None:
    (tmp_path / "evidence.log").mkdir()
    with pytest.raises(http.LocalProtocolError, match="workspace") as caught:
        connect(fake.url, workspace=tmp_path).post(json=chat())
    assert isinstance(cause_of(caught), RequestRefused)
    assert fake.requests == 0


@contextmanager
def recorded(fake: Fake) -> Iterator[tuple[Relay, str]]:
    """A recording of everything between a client and `fake`."""
    relay = Relay(fake.port)
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


def test_the_network_sees_no_word_no_path_and_no_key(fake: Fake, connect: Callable[..., Client]) -> None:
    with recorded(fake) as (relay, url):
        client = connect(url, api_key=API_KEY)
        client.post(json=chat())
        client.stream()
        wire = bytes(relay.sent + relay.answered)
    assert fake.requests == 2
    assert GATEWAY.encode() in wire
    for secret in (API_KEY, "quixotic", "zeppelin", "chat/completions", "Bearer", *WORDS):
        assert secret.encode() not in wire


def test_the_attested_key_is_the_one_that_is_used(fake: Fake, http: Any, connect: Callable[..., Client]) -> None:
    """Keys that the gateway serves outside the evidence are not used."""
    with running_fake() as other:
        listed = keyconfig.encode_list(other.keys.configurations)
    fake.claims = with_claims(key_configurations=listed)
    with pytest.raises(http.RemoteProtocolError):
        # Sealed to keys that this backend lacks: it cannot read the request.
        connect(fake.url).post(json=chat())
    assert fake.inner == []
