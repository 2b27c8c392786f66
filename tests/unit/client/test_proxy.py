"""The local proxy for a scripted backend: what passes, what is refused, and how it fails."""

import asyncio
import gzip
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx2
import pytest

from adytum.attestation.policy.policy import Policy
from adytum.attestation.policy.rules import Padding
from adytum.inference.client.proxy import CannotStart, run_proxy
from adytum.inference.client.proxy.app import BODY_LIMIT
from adytum.inference.client.proxy.upstream import UpstreamClient
from adytum.inference.client.session import Upstream
from tests.conftest import free_port
from tests.support import ROOT
from tests.unit.client.support import API_KEY, GATEWAY, WORDS, Fake, chat, running_proxy

CHAT = "/v1/chat/completions"
Proxy = Callable[..., str]


def port_of(url: str) -> int:
    return int(url.rpartition(":")[2])


def request(
    url: str, method: str, path: str, headers: dict[str, str] | None = None, body: bytes | None = None
) -> tuple[int, dict[str, str], bytes]:
    """A request with exactly these headers (and Host, unless given). Raises `http.client.IncompleteRead`."""
    connection = http.client.HTTPConnection("127.0.0.1", port_of(url), timeout=20)
    try:
        connection.putrequest(method, path, skip_host="Host" in (headers or {}), skip_accept_encoding=True)
        for name, value in (headers or {}).items():
            connection.putheader(name, value)
        if body is not None:
            connection.putheader("Content-Length", str(len(body)))
        connection.endheaders(body)
        answer = connection.getresponse()
        return answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read()
    finally:
        connection.close()


def exchange(url: str, data: bytes, wait: float = 5) -> bytes:
    """What comes back for these bytes until the proxy closes or `wait` seconds are over."""
    with socket.create_connection(("127.0.0.1", port_of(url)), timeout=wait) as connection:
        connection.sendall(data)
        received = b""
        try:
            while more := connection.recv(1 << 16):
                received += more
        except TimeoutError:
            pass
        return received


def raw(line: str, body: bytes = b"", *headers: str) -> bytes:
    """A request byte by byte, on a connection that the proxy closes afterwards."""
    fields = ["Host: localhost", "Connection: close", f"Content-Length: {len(body)}", *headers]
    return "\r\n".join((line, *fields, "", "")).encode("latin-1") + body


def error_of(response: httpx2.Response) -> dict[str, Any]:
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error, dict)
    return error


def test_everything_under_v1_is_sealed_and_opened(fake: Fake, proxy: Proxy) -> None:
    url = proxy()
    models = httpx2.get(f"{url}/v1/models?limit=2", headers={"authorization": f"Bearer {API_KEY}"})
    assert models.json()["data"][0]["id"] == "fake/chat"
    assert httpx2.post(f"{url}{CHAT}", json=chat()).json()["choices"][0]["message"]["content"] == " ".join(WORDS)
    assert [(item.method, item.path) for item in fake.inner] == [("GET", "/v1/models?limit=2"), ("POST", CHAT)]
    assert dict(fake.inner[0].fields)[b"authorization"] == f"Bearer {API_KEY}".encode()
    assert fake.seen == ["GET /.well-known/attestation", f"POST {GATEWAY}", f"POST {GATEWAY}"]


def test_its_own_key_replaces_the_callers(fake: Fake, proxy: Proxy) -> None:
    httpx2.post(f"{proxy(api_key=API_KEY)}{CHAT}", json=chat(), headers={"authorization": "Bearer sk-other"})
    assert dict(fake.inner[0].fields)[b"authorization"] == f"Bearer {API_KEY}".encode()


def test_a_stream_passes_as_it_arrives(fake: Fake, proxy: Proxy) -> None:
    fake.gap = 0.1
    url = proxy()
    httpx2.get(f"{url}/v1/models")
    with httpx2.stream("POST", f"{url}{CHAT}", json=chat(stream=True), timeout=20) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        arrived = [time.monotonic() for data in response.iter_raw() if b"data: " in data]
    assert len(arrived) == len(WORDS) + 2
    assert arrived[-1] - arrived[0] > 0.7 * 0.1 * (len(arrived) - 1)


def test_a_caller_of_http_1_0_gets_a_stream_whole_or_not_at_all(fake: Fake, proxy: Proxy) -> None:
    """HTTP/1.0 has no chunks: a stream that was cut would end like a whole one."""
    url = proxy()
    asked = raw(f"POST {CHAT} HTTP/1.0", json.dumps(chat(stream=True)).encode())
    head, _, body = exchange(url, asked).partition(b"\r\n\r\n")
    assert b" 200 OK\r\n" in head
    assert f"content-length: {len(body)}".encode() in head.lower()
    assert body.count(b"data: ") == len(WORDS) + 2
    for stop_at in range(1, fake.writes):
        fake.stop_at = stop_at
        assert b" 502 Bad Gateway\r\n" in exchange(url, asked).partition(b"\r\n\r\n")[0]


def test_path_body_and_fields_pass_as_they_came(fake: Fake, proxy: Proxy) -> None:
    url = proxy()
    body = gzip.compress(json.dumps(chat()).encode())
    target = "/v1/%6dodels/../a%2Fb?q=%20&r"
    exchange(url, raw(f"GET {target} HTTP/1.1", b"", "X-A: 1", "x-a: 2"))
    exchange(url, raw("GET http://localhost:9/v1/models?q HTTP/1.1"))
    assert exchange(url, raw(f"POST {CHAT} HTTP/1.1", body, "Content-Encoding: gzip")).startswith(b"HTTP/1.1 502")
    assert [item.path for item in fake.inner] == [target, "/v1/models?q", CHAT]
    assert [value for name, value in fake.inner[0].fields if name == b"x-a"] == [b"1", b"2"]
    assert fake.inner[2].body == body


def test_a_caller_that_leaves_reaches_the_backend_at_once(fake: Fake, proxy: Proxy) -> None:
    fake.gap = 0.2
    url = proxy()
    with httpx2.stream("POST", f"{url}{CHAT}", json=chat(stream=True)) as response:
        next(response.iter_raw())
        fake.gap = 60
        assert not fake.left.is_set()
    # Long before the answer's end.
    assert fake.left.wait(20)


def test_a_caller_that_leaves_before_the_first_byte_reaches_the_backend(fake: Fake, proxy: Proxy) -> None:
    url = proxy()
    httpx2.get(f"{url}/v1/models")
    fake.gap = 60
    fake.change = lambda _, data: b""  # Not even the head comes.
    with pytest.raises(httpx2.ReadTimeout):
        httpx2.post(f"{url}{CHAT}", json=chat(stream=True), timeout=0.3)
    assert fake.left.wait(20)


@pytest.mark.parametrize("clean", [True, False])
def test_a_stream_cut_at_any_write_does_not_end_well(fake: Fake, proxy: Proxy, clean: bool) -> None:
    url = proxy()
    whole = httpx2.post(f"{url}{CHAT}", json=chat(stream=True))
    assert whole.content.count(b"data: ") == len(WORDS) + 2
    writes, fake.clean_stop = fake.writes, clean
    for stop_at in range(writes):
        fake.stop_at = stop_at
        if stop_at == 0:
            response = httpx2.post(f"{url}{CHAT}", json=chat(stream=True))
            assert response.status_code == 502
            assert error_of(response)["code"] in ("response_cut", "upstream_unreachable")
        else:
            with pytest.raises((httpx2.RemoteProtocolError, httpx2.ReadError)):
                httpx2.post(f"{url}{CHAT}", json=chat(stream=True))
    fake.stop_at = None
    assert httpx2.post(f"{url}{CHAT}", json=chat(stream=True)).content.count(b"data: ") == len(WORDS) + 2


def test_a_changed_stream_does_not_end_well_and_passes_no_word_of_the_change(fake: Fake, proxy: Proxy) -> None:
    url = proxy()
    httpx2.post(f"{url}{CHAT}", json=chat(stream=True))
    for n in range(1, fake.writes - 1):
        fake.change = lambda i, data, n=n: data[:-1] + bytes((data[-1] ^ 1,)) if i == n else data
        heard: list[bytes] = []
        status, error = heard_of(url, heard)
        # 502 if the change arrived in one read with the head, so that nothing had been passed on yet.
        assert error is not None or status == 502
        assert all(word.encode() not in b"".join(heard) for word in WORDS[n - 1 :])


def heard_of(url: str, heard: list[bytes]) -> tuple[int, Exception | None]:
    """Status and error of a streamed chat; what came before the error goes to `heard`."""
    status = 0
    try:
        with httpx2.stream("POST", f"{url}{CHAT}", json=chat(stream=True)) as response:
            status = response.status_code
            heard.extend(response.iter_raw())
    except (httpx2.RemoteProtocolError, httpx2.ReadError) as error:
        return status, error
    return status, None


@pytest.mark.parametrize("change", ["cut", "flip"])
def test_a_whole_answer_that_is_cut_or_changed_is_a_502(fake: Fake, proxy: Proxy, change: str) -> None:
    url = proxy()
    for n in range(3):
        if change == "cut":
            fake.stop_at = n
        else:
            fake.change = lambda i, data, n=n: data[:-1] + bytes((data[-1] ^ 1,)) if i == n else data
        response = httpx2.post(f"{url}{CHAT}", json=chat(size=50_000))
        assert response.status_code == 502
        assert error_of(response)["code"] in ("response_cut", "response_forged")


def test_a_large_whole_answer_passes(fake: Fake, proxy: Proxy) -> None:
    content = httpx2.post(f"{proxy()}{CHAT}", json=chat(size=19_000_000), timeout=30).json()["choices"][0]["message"][
        "content"
    ]
    assert content == "x" * 19_000_000


def test_a_backend_that_is_not_verified_is_a_502_that_names_step_and_claim(fake: Fake, proxy: Proxy) -> None:
    policy = replace(Policy.accept_simulated(), padding=Padding(frozenset({"off"})))
    response = httpx2.post(f"{proxy(upstream={'policy': policy})}{CHAT}", json=chat())
    assert response.status_code == 502
    assert error_of(response)["code"] == "upstream_not_verified"
    assert "step 6 (policy), claim padding" in error_of(response)["message"]
    assert response.headers["x-should-retry"] == "false"
    assert fake.requests == 0


def test_a_backend_that_is_not_there_is_a_502_that_says_so(proxy: Proxy) -> None:
    gone = f"http://127.0.0.1:{free_port()}"
    response = httpx2.post(f"{proxy(upstream={'url': gone})}{CHAT}", json=chat())
    assert response.status_code == 502
    assert error_of(response)["code"] == "upstream_unreachable"
    assert gone in error_of(response)["message"]


@pytest.mark.parametrize(
    ("answer", "status", "code"),
    [
        ((503, {"content-type": "application/problem+json", "retry-after": "5"}, b"{}"), 503, "upstream_refused"),
        ((429, {"retry-after": "5"}, b""), 429, "upstream_refused"),
        ((400, {"content-type": "application/problem+json"}, b"{}"), 502, "upstream_refused"),
        ((307, {"location": "http://127.0.0.1:1/"}, b""), 502, "upstream_refused"),
        ((200, {"content-type": "application/json"}, b'{"choices": []}'), 502, "response_forged"),
        ((200, {"content-type": "text/event-stream"}, b"data: [DONE]\n\n"), 502, "response_forged"),
    ],
)
def test_answers_in_the_clear_are_errors(fake: Fake, proxy: Proxy, answer: Any, status: int, code: str) -> None:
    fake.plain = answer
    response = httpx2.post(f"{proxy()}{CHAT}", json=chat())
    assert response.status_code == status
    assert error_of(response)["code"] == code
    assert response.headers.get("retry-after") == ("5" if status in (429, 503) else None)


def test_an_unknown_key_is_tried_once_more(fake: Fake, proxy: Proxy) -> None:
    url = proxy()
    fake.forget = 1
    assert httpx2.get(f"{url}/v1/models").status_code == 200
    assert (fake.evidence_asked, fake.requests) == (2, 2)
    fake.forget = 2
    response = httpx2.get(f"{url}/v1/models")
    assert response.status_code == 502
    assert error_of(response)["code"] == "upstream_refused"
    assert fake.requests == 4


def test_requests_that_start_together_verify_once(fake: Fake, proxy: Proxy) -> None:
    url = proxy()

    async def ask() -> list[int]:
        async with httpx2.AsyncClient() as client:
            answers = await asyncio.gather(*(client.post(f"{url}{CHAT}", json=chat()) for _ in range(20)))
            return [answer.status_code for answer in answers]

    assert asyncio.run(ask()) == [200] * 20
    assert fake.evidence_asked == 1


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:1", "127.0.0.1:80", "[::1]", "[::1]:9876", "box.lan:9876"])
def test_hosts_that_name_this_machine_pass(proxy: Proxy, host: str) -> None:
    url = proxy(app={"allow_hosts": ["box.lan"]})
    assert request(url, "GET", "/v1/models", {"Host": host})[0] == 200


@pytest.mark.parametrize("path", ["/v1/models", "/healthz"])
@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:9876", "localhost.evil.example", "192.168.0.7", "", "[::2]", "127.0.0.1.a"]
)
def test_other_hosts_are_refused(fake: Fake, proxy: Proxy, host: str, path: str) -> None:
    url = proxy()
    before = fake.requests
    status, _, body = request(url, "GET", path, {"Host": host})
    assert status == 403
    assert json.loads(body)["error"]["code"] == "forbidden"
    assert fake.requests == before == 0


def test_a_proxy_that_listens_everywhere_is_reached_by_address_and_not_by_foreign_names(proxy: Proxy) -> None:
    url = proxy(app={"bound": "0.0.0.0"})
    assert request(url, "GET", "/v1/models", {"Host": "192.168.0.7:9876"})[0] == 200
    assert request(url, "GET", "/v1/models", {"Host": "evil.example"})[0] == 403


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://localhost:9876"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
    ],
)
def test_web_pages_are_refused(fake: Fake, proxy: Proxy, headers: dict[str, str]) -> None:
    url = proxy()
    assert request(url, "GET", "/v1/models", headers)[0] == 403
    assert request(url, "POST", CHAT, {**headers, "Content-Type": "text/plain"}, b"{}")[0] == 403
    assert request(url, "OPTIONS", CHAT, {**headers, "Access-Control-Request-Method": "POST"})[0] == 403
    assert fake.requests == 0


def test_an_allowed_origin_passes_with_its_preflight(proxy: Proxy) -> None:
    url = proxy(app={"allow_origins": ["https://app.example"]})
    asked = {"Origin": "https://app.example", "Access-Control-Request-Method": "POST"}
    asked["Access-Control-Request-Headers"] = "authorization, content-type"
    status, headers, _ = request(url, "OPTIONS", CHAT, asked)
    assert status == 200
    assert headers["access-control-allow-origin"] == "https://app.example"
    status, headers, _ = request(url, "GET", "/v1/models", {"Origin": "https://app.example"})
    assert (status, headers["access-control-allow-origin"]) == (200, "https://app.example")
    assert headers["vary"] == "Origin"
    assert request(url, "GET", "/v1/models", {"Origin": "https://evil.example"})[0] == 403
    two = ("Origin: https://app.example", "Origin: https://evil.example")
    assert exchange(url, raw("GET /v1/models HTTP/1.1", b"", *two)).startswith(b"HTTP/1.1 403 ")


def test_an_allowed_page_may_read_streams_and_errors_and_ask_no_more(proxy: Proxy) -> None:
    url = proxy(app={"allow_origins": ["https://app.example"]})
    origin = {"Origin": "https://app.example"}
    for path, body, status in ((CHAT, chat(stream=True), 200), ("/v1/nothing", {}, 404), ("/metrics", {}, 404)):
        found, headers, _ = request(url, "POST", path, origin, json.dumps(body).encode())
        assert (found, headers["access-control-allow-origin"]) == (status, "https://app.example")
    status, headers, _ = request(url, "OPTIONS", CHAT, {**origin, "Access-Control-Request-Method": "DELETE"})
    assert status == 400
    assert headers["access-control-allow-methods"] == "GET, POST"
    assert request(url, "OPTIONS", CHAT, origin)[0] == 405


def test_a_body_that_is_too_large_is_a_413_however_it_comes(fake: Fake, proxy: Proxy) -> None:
    url = proxy()
    response = httpx2.post(f"{url}{CHAT}", content=bytes(BODY_LIMIT - 10), timeout=20)  # Fits, but not with its head.
    assert (response.status_code, error_of(response)["code"]) == (413, "request_refused")
    status, _, body = request(url, "POST", CHAT, {"Content-Length": str(BODY_LIMIT + 1)})
    assert (status, json.loads(body)["error"]["code"]) == (413, "request_too_large")
    pieces = (bytes(1 << 20) for _ in range(BODY_LIMIT // (1 << 20) + 1))
    response = httpx2.post(f"{url}{CHAT}", content=pieces, timeout=20)
    assert (response.status_code, error_of(response)["code"]) == (413, "request_too_large")
    assert fake.requests == 0


@pytest.mark.slow
def test_a_body_is_asked_for_only_if_it_is_taken(fake: Fake, proxy: Proxy) -> None:
    url = proxy()
    go_on = "Expect: 100-continue"
    with socket.create_connection(("127.0.0.1", port_of(url)), timeout=5) as connection:
        body = json.dumps(chat()).encode()
        connection.sendall(raw(f"POST {CHAT} HTTP/1.1", body, go_on)[: -len(body)])
        assert connection.recv(1 << 16) == b"HTTP/1.1 100 Continue\r\n\r\n"
        connection.sendall(body)
        assert connection.recv(1 << 16).startswith(b"HTTP/1.1 200 ")
    for asked, status in (
        (f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {BODY_LIMIT + 1}\r\n{go_on}\r\n\r\n", 413),
        (f"POST {CHAT} HTTP/1.1\r\nHost: evil.example\r\nContent-Length: 2\r\n{go_on}\r\n\r\n", 403),
    ):
        assert exchange(url, asked.encode(), wait=0.5).startswith(b"HTTP/1.1 %d " % status)
    assert len(fake.inner) == 1


def test_what_is_not_http_is_refused_and_not_logged(
    fake: Fake, proxy: Proxy, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    url = proxy()
    for data in (b"quixotic zeppelin\r\n\r\n", raw("GET /v1/models HTTP/1.1", b"", "quixotic zeppelin: 1")):
        assert exchange(url, data).partition(b"\r\n")[0].endswith(b" 400 Bad Request")
    chunked = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nquixotic\r\n"
    assert exchange(url, chunked.encode()).partition(b"\r\n")[0].endswith(b" 400 Bad Request")
    fake.stop_at = 3
    with pytest.raises(httpx2.RemoteProtocolError):
        httpx2.post(f"{url}{CHAT}", json=chat(stream=True))
    out, err = capfd.readouterr()
    for word in ("quixotic", "Traceback", "Error handling"):
        assert word not in caplog.text + out + err
    assert fake.requests == 1


@pytest.mark.slow
def test_a_proxy_that_is_stopped_ends_short_streams_and_cuts_long_ones(fake: Fake) -> None:
    client = UpstreamClient(Upstream(fake.url, policy=Policy.accept_simulated()))
    fake.gap = 0.1
    with ExitStack() as running:
        url = running.enter_context(running_proxy(client, grace_s=4))
        with httpx2.stream("POST", f"{url}{CHAT}", json=chat(stream=True)) as response:
            heard = response.iter_raw()
            first = next(heard)
            stopping = threading.Thread(target=running.close)
            stopping.start()
            assert (first + b"".join(heard)).count(b"data: ") == len(WORDS) + 2
        stopping.join(5)
    fake.gap = 20
    with ExitStack() as running:
        url = running.enter_context(running_proxy(client, grace_s=0.4))
        with httpx2.stream("POST", f"{url}{CHAT}", json=chat(stream=True), timeout=10) as response:
            stopping = threading.Thread(target=running.close)
            stopping.start()
            with pytest.raises(httpx2.RemoteProtocolError):
                response.read()
        assert fake.left.wait(1)
        stopping.join(5)
        assert not stopping.is_alive()


def test_other_paths_and_methods_are_refused_here(fake: Fake, proxy: Proxy) -> None:
    url = proxy()
    assert error_of(httpx2.get(f"{url}/metrics"))["code"] == "unknown_path"
    assert httpx2.get(f"{url}/v2/models").status_code == 404
    assert httpx2.delete(f"{url}/v1/models").status_code == 405
    assert fake.requests == 0


def test_health_tells_whether_the_backend_is_verified(fake: Fake, proxy: Proxy) -> None:
    url = proxy()
    httpx2.get(f"{url}/v1/models")
    assert httpx2.get(f"{url}/healthz").json() == {"status": "alive", "upstream": fake.url, "verified": True}
    asked = httpx2.head(f"{url}/healthz")
    assert (asked.status_code, asked.content) == (200, b"")
    assert "server" not in asked.headers


def test_invalid_options_are_reported_at_the_start(tmp_path: Path) -> None:
    policy = ROOT / "deploy" / "config" / "demo-policy.toml"
    with pytest.raises(CannotStart, match="origin"):
        run_proxy(upstreams=["https://a.example/v1"], policy_path=policy)
    with pytest.raises(CannotStart, match="cannot listen"):
        run_proxy(upstreams=["https://a.example"], policy_path=policy, host="192.0.2.1")
    (tmp_path / "policy.toml").write_text("cpu = 5")
    with pytest.raises(CannotStart, match=r"policy\.toml"):
        run_proxy(upstreams=["https://a.example"], policy_path=tmp_path / "policy.toml")
    with pytest.raises(CannotStart, match=r"none\.toml"):
        run_proxy(upstreams=["https://a.example"], policy_path=tmp_path / "none.toml")


def test_a_program_may_serve_it_in_a_thread_and_is_told_the_address(fake: Fake) -> None:
    code = f"""
import os, threading, httpx2
from adytum.inference.client.proxy import run_proxy
told = threading.Event()
def ready(url):
    global address
    address = url
    told.set()
options = dict(upstreams=["{fake.url}"], policy_path="deploy/config/demo-policy.toml", port=0, ready=ready)
threading.Thread(target=run_proxy, kwargs=options, daemon=True).start()
assert told.wait(20)
print(httpx2.get(address + "/models").json()["data"][0]["id"], flush=True)
os._exit(0)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("fake/chat\n", "")


def test_the_command_serves_keeps_evidence_and_logs_no_content(fake: Fake, tmp_path: Path) -> None:
    port = free_port()
    command = ["proxy", "--upstream", fake.url, "--policy", str(ROOT / "deploy" / "config" / "demo-policy.toml")]
    command += ["--port", str(port), "--workspace", str(tmp_path / "ws")]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "adytum.inference", *command],
            cwd=ROOT,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, "ADYTUM_API_KEY": API_KEY},
        )
    try:
        url = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + 30
        while True:
            try:
                health = httpx2.get(f"{url}/healthz")
                if health.json()["verified"]:
                    break
            except httpx2.TransportError:
                pass
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert "server" not in health.headers
        assert len(httpx2.post(f"{url}{CHAT}", json=chat(stream=True)).content) > 500
        fake.stop_at = 3
        with pytest.raises(httpx2.TransportError):
            httpx2.post(f"{url}{CHAT}", json=chat(stream=True))
        fake.stop_at, fake.plain = None, (500, {}, b"quixotic")
        assert httpx2.post(f"{url}{CHAT}", json=chat()).status_code == 502
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(15) in (0, -signal.SIGTERM)
    assert dict(fake.inner[0].fields)[b"authorization"] == f"Bearer {API_KEY}".encode()
    assert len(list((tmp_path / "ws").iterdir())) == 2
    text = (tmp_path / "log").read_text()
    assert f"listening on {url}/v1 for {fake.url}" in text
    assert "verified" in text
    assert "authenticated end" in text
    assert "Traceback" not in text
    kept = text.encode() + b"".join(path.read_bytes() for path in (tmp_path / "ws").iterdir())
    for secret in (API_KEY, "quixotic", "zeppelin", *WORDS):
        assert secret.encode() not in kept
