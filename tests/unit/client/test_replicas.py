"""Several upstreams: which one is chosen, when another one is, and that nothing is sent to an unverified one."""

import json
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx2
import pytest

from adytum.attestation.document.evidence import ModelClaim
from adytum.attestation.policy.policy import Policy
from adytum.attestation.policy.rules import Replica
from adytum.inference.client.errors import ResponseForged
from adytum.inference.client.proxy import CannotStart, run_proxy
from adytum.inference.client.proxy.replicas import BACK_OFF_S, LIST_LIMIT, Replicas, merged
from adytum.inference.client.proxy.upstream import UpstreamClient
from adytum.inference.client.session import Upstream
from tests.conftest import free_port
from tests.support import ROOT
from tests.unit.client.support import API_KEY, OHTTP_KEY, Fake, chat, running_fake, running_proxy, with_claims

CHAT = "/v1/chat/completions"
PROBLEM = {"content-type": "application/problem+json"}
OTHER = ModelClaim("fake/other", "generate", ("other",), bytes(32))


class Proxied:
    """A proxy for several scripted backends, with a clock that a test moves."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack
        self.now = 1000.0
        self.fakes: list[Fake] = []

    def fake(self, **script: Any) -> Fake:
        self.fakes.append(self._stack.enter_context(running_fake(**script)))
        return self.fakes[-1]

    def start(self, *, urls: list[str] | None = None, policy: Policy | None = None) -> str:
        urls = urls or [fake.url for fake in self.fakes]
        policy = policy or Policy.accept_simulated()
        clients = [UpstreamClient(Upstream(url, policy=policy)) for url in urls]
        self.url = self._stack.enter_context(running_proxy(Replicas(clients, lambda: self.now)))  # type: ignore[arg-type]
        return self.url

    def ask(self, **more: Any) -> httpx2.Response:
        return httpx2.post(f"{self.url}{CHAT}", json=chat(**more), timeout=20)

    def health(self) -> list[dict[str, Any]]:
        found = httpx2.get(f"{self.url}/healthz").json()["upstreams"]
        assert isinstance(found, list)
        return found

    def verified(self) -> None:
        """Waits until all are verified, as after the start of a proxy."""
        deadline = time.monotonic() + 10
        while not all(item["verified"] for item in self.health()):
            assert time.monotonic() < deadline
            time.sleep(0.01)

    @property
    def asked(self) -> list[int]:
        """Requests that each backend opened."""
        return [len(fake.inner) for fake in self.fakes]

    @property
    def sealed(self) -> list[int]:
        """Sealed requests that each backend received, opened or not."""
        return [fake.requests for fake in self.fakes]


@pytest.fixture
def proxied() -> Iterator[Proxied]:
    with ExitStack() as stack:
        yield Proxied(stack)


def code_of(response: httpx2.Response) -> str:
    return str(response.json()["error"]["code"])


@pytest.mark.parametrize("name", ["fake/other", "other"])
def test_a_request_goes_to_one_whose_evidence_names_the_model(proxied: Proxied, name: str) -> None:
    proxied.fake()
    proxied.fake(claims=with_claims(models=(OTHER,)))
    proxied.fake()
    proxied.start()
    for _ in range(3):
        assert proxied.ask(model=name).status_code == 200
    assert proxied.asked == [0, 3, 0]


def test_a_model_that_no_backend_has_is_refused_by_a_backend(proxied: Proxied) -> None:
    proxied.fake()
    proxied.fake()
    proxied.start()
    proxied.verified()
    assert proxied.ask(model="nobody/has-it", status=404).status_code == 404
    assert sum(proxied.asked) == 1


def test_a_model_that_only_an_unverified_one_could_have_is_an_error_with_its_reason(proxied: Proxied) -> None:
    proxied.fake()
    gone = f"http://127.0.0.1:{free_port()}"
    proxied.start(urls=[proxied.fakes[0].url, gone])
    response = proxied.ask(model="fake/other")
    assert (response.status_code, code_of(response)) == (502, "no_upstream")
    assert f"{gone} cannot be reached" in response.json()["error"]["message"]
    assert "fake/other" not in response.text
    assert proxied.sealed == [0]


def test_the_least_loaded_one_is_asked(proxied: Proxied) -> None:
    for _ in range(3):
        proxied.fake(gap=5)
    proxied.start()
    proxied.verified()
    with ExitStack() as stack:
        for n in range(6):
            stack.enter_context(httpx2.stream("POST", f"{proxied.url}{CHAT}", json=chat(stream=True)))
            assert sum(proxied.asked) == n + 1
        assert proxied.asked == [2, 2, 2]
        assert [item["in_flight"] for item in proxied.health()] == [2, 2, 2]
    deadline = time.monotonic() + 5
    while any(item["in_flight"] for item in proxied.health()):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_one_with_long_answers_gets_no_more_while_others_are_free(proxied: Proxied) -> None:
    proxied.fake(gap=5)
    proxied.fake()
    proxied.start()
    proxied.verified()
    with httpx2.stream("POST", f"{proxied.url}{CHAT}", json=chat(stream=True)):
        for _ in range(6):
            proxied.ask()
    assert proxied.asked == [1, 6]


def test_one_that_refuses_connections_is_passed_over_and_left_alone_for_longer_each_time(proxied: Proxied) -> None:
    proxied.fake()
    proxied.start(urls=[proxied.fakes[0].url, f"http://127.0.0.1:{free_port()}"])
    for wait in BACK_OFF_S[:4]:
        assert [proxied.ask().status_code for _ in range(4)] == [200] * 4
        assert [item["well"] for item in proxied.health()] == [True, False]
        proxied.now += wait - 0.01
        assert not proxied.health()[1]["well"]
        proxied.now += 0.02
        assert proxied.health()[1]["well"]


def test_one_that_went_away_is_not_trusted_again_unseen(proxied: Proxied) -> None:
    """It is verified before it gets another request, and no request waits or fails because of that."""
    left, right = proxied.fake(), proxied.fake()
    proxied.start()
    proxied.verified()
    left.stop_at = right.stop_at = 0
    left.clean_stop = right.clean_stop = False
    assert proxied.ask().status_code == 502
    assert sum(proxied.asked) == 1
    left.stop_at = right.stop_at = None
    lost = 0 if left.inner else 1
    before = proxied.fakes[lost].evidence_asked
    assert [proxied.ask().status_code for _ in range(3)] == [200] * 3
    assert proxied.fakes[lost].requests == 1
    proxied.now += BACK_OFF_S[0]
    while proxied.fakes[lost].requests == 1:
        assert proxied.ask().status_code == 200
    assert proxied.fakes[lost].evidence_asked == before + 1


@pytest.mark.parametrize(
    "answer",
    [
        (503, {**PROBLEM, "retry-after": "5"}, b"{}"),
        (422, PROBLEM, json.dumps({"type": OHTTP_KEY}).encode()),
    ],
)
def test_one_that_says_it_opened_nothing_is_passed_over(proxied: Proxied, answer: Any) -> None:
    proxied.fake(plain=answer)
    proxied.fake()
    proxied.start()
    proxied.verified()
    assert [proxied.ask().status_code for _ in range(4)] == [200] * 4
    assert proxied.asked == [0, 4]
    # After a key problem the same backend is tried once more, with keys from new evidence.
    assert proxied.sealed[0] == (1 if answer[0] == 503 else 2)


@pytest.mark.parametrize(
    "answer",
    [
        # A balancer's own answer: it may have lost the backend after the request was opened.
        (503, {"content-type": "text/html"}, b"<h1>503</h1>"),
        (502, {"content-type": "text/html"}, b""),
        (504, PROBLEM, b"{}"),
        (400, PROBLEM, b"{}"),
        (409, PROBLEM, b"{}"),
        (200, {"content-type": "application/json"}, b"{}"),
    ],
)
def test_any_other_error_is_passed_on_and_no_other_backend_is_asked(proxied: Proxied, answer: Any) -> None:
    proxied.fake(plain=answer)
    proxied.fake(plain=answer)
    proxied.start()
    proxied.verified()
    assert proxied.ask().status_code == (503 if answer[0] == 503 else 502)
    assert sum(proxied.sealed) == 1


@pytest.mark.parametrize("stop_at", [0, 1, 3])
@pytest.mark.parametrize("stream", [False, True])
def test_after_a_cut_answer_no_other_backend_is_asked(proxied: Proxied, stop_at: int, stream: bool) -> None:
    for _ in range(2):
        proxied.fake(stop_at=stop_at, clean_stop=False)
    proxied.start()
    proxied.verified()
    try:
        assert proxied.ask(stream=stream).status_code == (502 if stop_at < 3 or stream else 200)
    except httpx2.TransportError:
        assert stream
    assert sum(proxied.sealed) == 1


def test_if_all_are_full_the_caller_is_told_when_to_come_back(proxied: Proxied) -> None:
    proxied.fake(plain=(503, {**PROBLEM, "retry-after": "5"}, b"{}"))
    proxied.start(urls=[f"http://127.0.0.1:{free_port()}", proxied.fakes[0].url])
    response = proxied.ask()
    assert (response.status_code, response.headers["retry-after"]) == (503, "5")
    assert proxied.ask().status_code == 503
    proxied.fakes[0].plain = None
    assert proxied.ask().status_code == 200


def test_one_that_has_no_room_says_more_than_one_with_other_keys(proxied: Proxied) -> None:
    proxied.fake(plain=(503, {**PROBLEM, "retry-after": "7"}, b"{}"))
    proxied.fake(plain=(422, PROBLEM, json.dumps({"type": OHTTP_KEY}).encode()))
    proxied.start()
    proxied.verified()
    for _ in range(2):
        response = proxied.ask()
        assert (response.status_code, response.headers["retry-after"]) == (503, "7")


def test_a_sealed_503_is_passed_on_and_the_next_request_goes_elsewhere(proxied: Proxied) -> None:
    proxied.fake()
    proxied.fake()
    proxied.start()
    proxied.verified()
    assert proxied.ask(status=503).status_code == 503
    first = list(proxied.asked)
    assert sum(first) == 1
    assert [proxied.ask().status_code for _ in range(3)] == [200] * 3
    assert [b - a for a, b in zip(first, proxied.asked, strict=True)] == [0 if n else 3 for n in first]


def test_nothing_is_sealed_for_one_that_the_policy_refuses(proxied: Proxied) -> None:
    proxied.fake()
    rogue = proxied.fake(claims=with_claims(replica="rogue"))
    policy = replace(Policy.accept_simulated(), replica=Replica(frozenset({"fake"})))
    proxied.start(policy=policy)
    assert [proxied.ask().status_code for _ in range(5)] == [200] * 5
    proxied.now += BACK_OFF_S[-1]
    assert proxied.ask().status_code == 200
    assert proxied.sealed == [6, 0]
    assert rogue.evidence_asked >= 1
    proxied.fakes[0].plain = (503, PROBLEM, b"{}")
    response = proxied.ask()
    assert response.status_code == 503
    assert rogue.requests == 0


def test_nothing_is_sealed_for_a_backend_with_the_evidence_of_another(proxied: Proxied) -> None:
    """A rogue backend that presents a good backend's document with its own keys in it."""
    good, rogue = proxied.fake(), proxied.fake()

    def stolen(scope: Any) -> bytes:
        document = json.loads(Fake._document(good, scope))
        own = json.loads(Fake._document(rogue, scope))
        return json.dumps({**document, "claims": own["claims"]}).encode()

    rogue._document = stolen  # type: ignore[method-assign]
    proxied.start()
    assert [proxied.ask().status_code for _ in range(4)] == [200] * 4
    assert proxied.sealed == [4, 0]
    assert rogue.evidence_asked >= 1


def test_no_request_waits_for_one_that_does_not_answer(proxied: Proxied) -> None:
    left, right = proxied.fake(), proxied.fake()
    with held(right) as asked:
        proxied.start()
        assert proxied.ask().status_code == 200
        assert asked.wait(10)
        assert [item["verified"] for item in proxied.health()] == [True, False]
    assert [len(left.inner), len(right.inner)] == [1, 0]


@contextmanager
def held(fake: Fake) -> Iterator[threading.Event]:
    """Holds its evidence back until the end of the block; yields an event that is set when it was asked for."""
    document = fake._document
    asked, let_go = threading.Event(), threading.Event()

    def late(scope: Any) -> bytes:
        asked.set()
        let_go.wait(60)
        return document(scope)

    fake._document = late  # type: ignore[method-assign]
    try:
        yield asked
    finally:
        let_go.set()


def test_lists_of_models_are_merged_from_those_that_can_be_asked(proxied: Proxied) -> None:
    proxied.fake()
    proxied.fake()
    proxied.start(urls=[*(fake.url for fake in proxied.fakes), f"http://127.0.0.1:{free_port()}"])
    answer = httpx2.get(f"{proxied.url}/v1/models", headers={"authorization": f"Bearer {API_KEY}"})
    assert [item["id"] for item in answer.json()["data"]] == ["fake/chat"]
    assert proxied.asked == [1, 1]
    for fake in proxied.fakes:
        assert dict(fake.inner[0].fields)[b"authorization"] == f"Bearer {API_KEY}".encode()


def test_a_list_of_models_from_no_backend_is_an_error(proxied: Proxied) -> None:
    proxied.start(urls=[f"http://127.0.0.1:{free_port()}", f"http://127.0.0.1:{free_port()}"])
    response = httpx2.get(f"{proxied.url}/v1/models")
    assert (response.status_code, code_of(response)) == (502, "no_upstream")


def test_merging() -> None:
    one = json.dumps({"data": [{"id": "a", "tasks": ["generate"]}, {"id": "b"}]}).encode()
    two = json.dumps({"data": [{"id": "b", "x": 1}, {"id": "c"}]}).encode()
    assert json.loads(merged([one, two])) == {
        "object": "list",
        "data": [{"id": "a", "tasks": ["generate"]}, {"id": "b"}, {"id": "c"}],
    }
    for bad in (b"", b"[]", b'{"data": 1}', b'{"data": [{}]}', b'{"data": [{"id": []}]}', b"[" * 100_000):
        with pytest.raises(ResponseForged):
            merged([one, bad])
    assert len(one) < LIST_LIMIT


def test_invalid_upstreams_are_reported_at_the_start(tmp_path: Path) -> None:
    policy = ROOT / "deploy" / "config" / "demo-policy.toml"
    with pytest.raises(CannotStart, match="must be listed once"):
        run_proxy(upstreams=["https://a.example", "https://A.example:443/"], policy_path=policy)
    with pytest.raises(CannotStart, match="origin"):
        run_proxy(upstreams=["https://a.example", "https://b.example/v1"], policy_path=policy)
