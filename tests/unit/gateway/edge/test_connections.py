"""What a peer can take of the gateway without being served, over real sockets: each is cut at its bound."""

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from adytum.inference.channel import ehbp, hpke, ohttp
from adytum.inference.core.config import parse
from adytum.inference.gateway.limits import LIMITS
from tests.support import config_text, seal, sealed_chat
from tests.unit.gateway.support import RunningGateway, running_gateway

TIGHT = replace(LIMITS, head=2048, head_lines=20, head_seconds=60.0, write_seconds=90.0)
BODY_SECONDS = 120
MARGIN = 20.0
"""Seconds before a limit, in which nothing may be cut yet: less than this passes while a test runs."""
SWEEP = 1.0
"""Between two looks of the guard at its connections."""
PATH = "/.well-known/ohttp-gateway"
HEAD = f"POST {PATH} HTTP/1.1\r\nHost: x\r\nContent-Type: message/ohttp-chunked-req\r\n".encode()
SMALL = b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"
PROTOCOLS = ("ohttp", "ehbp")


@pytest.fixture
def tight(tmp_path: Path) -> Iterator[RunningGateway]:
    changes = {"max_requests": f"8\nmax_connections = 6\nrequest_seconds = {BODY_SECONDS}\nmax_upload_mib = 64"}
    config = parse(config_text(port=0, runtime=tmp_path, changes=changes).encode())
    with running_gateway(config, tmp_path, limits=TIGHT) as gateway:
        yield gateway


def connect(gateway: RunningGateway) -> socket.socket:
    return socket.create_connection(("127.0.0.1", gateway.port), timeout=10)


def ended_after(connection: socket.socket) -> float:
    """Seconds until the peer ended it. Fails if it does not within ten."""
    started = time.monotonic()
    with contextlib.suppress(ConnectionError):
        while connection.recv(65_536):
            pass
    return time.monotonic() - started


def ended(connection: socket.socket) -> bool:
    """Whether the peer has ended it already."""
    connection.setblocking(False)
    try:
        return connection.recv(1, socket.MSG_PEEK) == b""
    except BlockingIOError:
        return False
    except ConnectionError:
        return True
    finally:
        connection.settimeout(10)


def wait_until(holds: Callable[[], bool]) -> None:
    """Returns as soon as it holds. Fails after 20 seconds, which a busy machine does not need either."""
    deadline = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def still_serves(gateway: RunningGateway) -> bool:
    return sealed_chat(gateway, chat()).status == 200


def chat(**more: Any) -> dict[str, Any]:
    return {"model": "demo/llama-awq", "messages": [{"role": "user", "content": "hello"}], **more}


def test_a_connection_that_says_nothing_is_cut(tight: RunningGateway) -> None:
    with connect(tight) as connection:
        wait_until(lambda: len(tight.guard.open) == 1)
        tight.loop.skip(TIGHT.head_seconds - MARGIN)
        assert not ended(connection)
        tight.loop.skip(MARGIN + SWEEP)
        ended_after(connection)
    assert still_serves(tight)


def test_a_head_that_comes_byte_by_byte_is_cut(tight: RunningGateway) -> None:
    with connect(tight) as connection:
        for byte in HEAD[:40]:
            connection.sendall(bytes((byte,)))
        wait_until(lambda: len(tight.guard.open) == 1)
        tight.loop.skip(TIGHT.head_seconds - MARGIN)
        connection.sendall(b"x")
        assert not ended(connection)
        tight.loop.skip(MARGIN + SWEEP)
        ended_after(connection)
    assert still_serves(tight)


@pytest.mark.parametrize(
    "data",
    [
        b"GET /healthz?" + b"x" * 10_000,
        b"GET /healthz HTTP/1.1\r\nX: " + b"x" * 10_000,
        b"GET /healthz HTTP/1.1\r\n" + b"".join(b"X%d: y\r\n" % i for i in range(50)),
        b"GET /healthz HTTP/1.1\r\nHost: x\r\n" + b"X: " + b"x" * 4000 + b"\r\n\r\n",
    ],
)
def test_a_head_that_is_too_large_is_cut_at_once(tight: RunningGateway, data: bytes) -> None:
    with connect(tight) as connection:
        with contextlib.suppress(ConnectionError):
            connection.sendall(data)
        assert ended_after(connection) < 0.8
    assert still_serves(tight)


def test_a_body_that_comes_too_slowly_is_answered_and_cut(tight: RunningGateway) -> None:
    sealer = ohttp.RequestSealer(ohttp.CHUNKED, tight.configuration())
    body = seal(sealer, chat())
    with connect(tight) as connection:
        connection.sendall(HEAD + f"Content-Length: {len(body)}\r\n\r\n".encode() + body[:-1])
        wait_until(lambda: tight.sealed.in_progress == 1)
        tight.loop.skip(BODY_SECONDS - MARGIN)
        assert not ended(connection)
        tight.loop.skip(MARGIN)
        assert b" 408 " in connection.recv(65_536)
        assert not ended(connection), "the client has three seconds to read why"
        tight.loop.skip(3 + SWEEP)
        ended_after(connection)
    assert still_serves(tight)


def test_a_body_after_its_answer_is_not_read_for_ever(tight: RunningGateway) -> None:
    with connect(tight) as connection:
        connection.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n")
        assert connection.recv(4096).startswith(b"HTTP/1.1 4")
        connection.sendall(b"x" * 100)
        tight.loop.skip(BODY_SECONDS - MARGIN)
        connection.sendall(b"x" * 100)
        assert not ended(connection)
        tight.loop.skip(MARGIN + 3 + SWEEP)
        ended_after(connection)


@pytest.mark.parametrize("waiting", [0, LIMITS.pipelined])
def test_a_reader_that_takes_nothing_is_cut_and_its_engine_let_go(tight: RunningGateway, waiting: int) -> None:
    with connect(tight) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.sendall(sealed(tight, "ohttp", stream=True, events=200_000) + SMALL * waiting)
        wait_until(lambda: any(taken.flow.write_paused for taken in tight.guard.open))
        tight.loop.skip(TIGHT.write_seconds - MARGIN)
        assert tight.engine.aborted == 0
        tight.loop.skip(MARGIN + SWEEP)
        wait_until(lambda: let_go(tight))
    assert still_serves(tight)


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("waiting", ["none", "one", "as many as may", "half of a large one"])
def test_a_client_that_leaves_lets_its_engine_go_whatever_waits(
    tight: RunningGateway, protocol: str, stream: bool, waiting: str
) -> None:
    large = sealed(tight, protocol, pad="x" * 200_000)
    behind = {
        "none": b"",
        "one": SMALL,
        "as many as may": SMALL * (LIMITS.pipelined - 1) + sealed(tight, protocol),
        "half of a large one": large[: len(large) // 2],
    }[waiting]
    with connect(tight) as connection:
        answered(tight, connection, protocol, stream=stream)
        connection.sendall(behind)
        wait_until(lambda: not behind or any(taken.pipeline for taken in tight.guard.open))
    tight.loop.skip(SWEEP)
    wait_until(lambda: let_go(tight) and not tight.guard.open)
    assert len(tight.engine.seen) == 1, "what waited was not begun"
    assert tight.guard.cut == 0, "the client left, and exceeded no limit"
    assert still_serves(tight)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_during_the_drain_lets_its_engine_go(tight: RunningGateway, stream: bool) -> None:
    with connect(tight) as connection:
        answered(tight, connection, "ohttp", stream=stream)
        connection.sendall(SMALL)
        wait_until(lambda: any(taken.pipeline for taken in tight.guard.open))
        for taken in tuple(tight.guard.open):
            tight.loop.call_soon_threadsafe(taken.shutdown)
    tight.loop.skip(SWEEP)
    wait_until(lambda: let_go(tight))


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(
    ("behind", "seconds"),
    [
        (SMALL * (LIMITS.pipelined + 1), 0),
        (SMALL + HEAD + b"Content-Length: 10\r\n\r\nhalf", BODY_SECONDS + 3),
        (SMALL + HEAD + b"X: " + b"x" * 4000 + b"\r\n\r\n", 0),
        (SMALL + b"\0 is not HTTP\r\n\r\n", 0),
    ],
    ids=["too many", "half of a body", "too large a head", "not HTTP"],
)
def test_what_is_cut_for_a_later_request_lets_the_engine_of_the_first_go(
    tight: RunningGateway, stream: bool, behind: bytes, seconds: float
) -> None:
    with connect(tight) as connection:
        answered(tight, connection, "ohttp", stream=stream)
        connection.sendall(behind)
        if seconds:
            wait_until(lambda: any(taken.pipeline for taken in tight.guard.open))
            tight.loop.skip(seconds - MARGIN)
            assert tight.engine.aborted == 0
            tight.loop.skip(MARGIN + SWEEP)
        wait_until(lambda: let_go(tight))
        ended_after(connection)
    assert len(tight.engine.seen) == 1
    assert still_serves(tight)


def test_requests_that_wait_are_answered_in_order(tight: RunningGateway) -> None:
    """Looking for clients that left ends no connection whose client is still there."""
    with connect(tight) as connection:
        connection.sendall(sealed(tight, "ohttp", stream=True, events=3, gap=5))
        wait_until(lambda: len(tight.engine.seen) == 1)
        connection.sendall(SMALL * LIMITS.pipelined)
        wait_until(lambda: any(taken.flow.read_paused for taken in tight.guard.open))
        for _ in range(20):
            tight.loop.skip(SWEEP)
        answers = b""
        while answers.count(b"HTTP/1.1 200") < 1 + LIMITS.pipelined:
            answers += connection.recv(65_536)
        assert answers.index(b"message/ohttp-chunked-res") < answers.index(b"alive")
    assert tight.engine.aborted == 0


def sealed(gateway: RunningGateway, protocol: str, **more: Any) -> bytes:
    """One sealed request as it is on the wire."""
    if protocol == "ohttp":
        head, body = HEAD, seal(ohttp.RequestSealer(ohttp.CHUNKED, gateway.configuration()), chat(**more))
    else:
        _, _, keys = gateway.request("GET", "/.well-known/hpke-keys")
        enc, context = hpke.setup_sender(ehbp.SUITE, keys[3:35], b"ehbp request")
        frame = context.seal(json.dumps(chat(**more)).encode())
        body = len(frame).to_bytes(4, "big") + frame
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\n{ehbp.REQUEST_HEADER}: {enc.hex()}\r\n".encode()
    return head + f"Content-Length: {len(body)}\r\n\r\n".encode() + body


def answered(gateway: RunningGateway, connection: socket.socket, protocol: str, *, stream: bool) -> None:
    """Sends a request whose answer has no end, and returns once the engine works on it."""
    forever = {"messages": [{"role": "user", "content": "forever"}]}
    connection.sendall(
        sealed(gateway, protocol, **({"stream": True, "events": 200_000, "gap": 0.1} if stream else forever))
    )
    wait_until(lambda: len(gateway.engine.seen) == 1)
    if stream:
        assert connection.recv(4096).startswith(b"HTTP/1.1 200")


def let_go(gateway: RunningGateway) -> bool:
    """Whether the one generation was aborted and no request is left."""
    return gateway.engine.aborted == 1 and gateway.sealed.in_progress == 0


def test_more_connections_than_configured_are_closed_and_the_others_served(tight: RunningGateway) -> None:
    held = [connect(tight) for _ in range(6)]
    wait_until(lambda: len(tight.guard.open) == 6)
    with connect(tight) as one_more:
        ended_after(one_more)
    assert len(tight.guard.open) == 6
    held[0].sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    assert b" 200 " in held[0].recv(4096)
    for connection in held:
        connection.close()
    wait_until(lambda: not tight.guard.open)
    assert still_serves(tight)


def test_requests_ahead_of_their_answers_are_bounded(tight: RunningGateway) -> None:
    sealer = ohttp.RequestSealer(ohttp.CHUNKED, tight.configuration())
    body = seal(sealer, chat(stream=True, events=10, gap=0.5))
    first = HEAD + f"Content-Length: {len(body)}\r\n\r\n".encode() + body
    with connect(tight) as connection:
        connection.sendall(first + b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n" * 200)
        assert ended_after(connection) < 2
    assert still_serves(tight)


def test_many_one_byte_chunks_are_no_harm(tight: RunningGateway) -> None:
    sealer = ohttp.RequestSealer(ohttp.CHUNKED, tight.configuration())
    body = seal(sealer, chat())
    with connect(tight) as connection:
        pieces = b"".join(b"1\r\n" + body[i : i + 1] + b"\r\n" for i in range(len(body)))
        connection.sendall(HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + pieces + b"0\r\n\r\n")
        assert connection.recv(4096).startswith(b"HTTP/1.1 200")


def test_what_arrives_is_bounded_over_all_requests(tight: RunningGateway) -> None:
    """Three uploads of 30 MiB that never end take more than 64 MiB together; the third is told to wait."""
    open_ones, answers = [], []
    for _ in range(3):
        sealer = ohttp.RequestSealer(ohttp.CHUNKED, tight.configuration())
        data = sealer.start() + b"".join(sealer.chunk(bytes(1 << 20)) for _ in range(30))
        connection = connect(tight)
        connection.sendall(HEAD + f"Content-Length: {len(data) + 1}\r\n\r\n".encode())
        thread = threading.Thread(target=lambda c=connection, d=data: _send(c, d))
        thread.start()
        open_ones.append((connection, thread))
    for _, thread in open_ones:
        thread.join(10)
    tight.loop.skip(BODY_SECONDS)
    for connection, _ in open_ones:
        with contextlib.suppress(ConnectionError, TimeoutError):
            answers.append(connection.recv(100))
        connection.close()
    assert sum(b" 503 " in answer for answer in answers) == 1
    assert sum(b" 408 " in answer for answer in answers) == 2


def _send(connection: socket.socket, data: bytes) -> None:
    with contextlib.suppress(OSError):
        connection.sendall(data)


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"n": 17}, "too_many_values"),
        ({"stop": ["x"] * 17}, "too_many_values"),
        ({"chat_template_kwargs": {"x": "y" * 5000}}, "too_many_values"),
        ({"metadata": [[]] * 1_000_000}, "too_many_values"),
        ({"metadata": json.loads("[" * 70 + "]" * 70)}, "invalid_json"),
        ({"seed": 10**5000}, "invalid_json"),
    ],
)
def test_what_one_request_asks_for_is_bounded(tmp_path: Path, change: dict[str, Any], code: str) -> None:
    with running_gateway(parse(config_text(port=0, runtime=tmp_path).encode()), tmp_path) as gateway:
        body: Any = chat(**{k: v for k, v in change.items() if k != "seed"})
        if "seed" in change:
            body = json.dumps(chat()).encode()[:-1] + b', "seed": ' + b"1" * 5000 + b"}"
        answer = sealed_chat(gateway, body, media=ohttp.WHOLE)
        assert (answer.status in (400, 413), answer.json()["error"]["code"]) == (True, code)
        assert gateway.engine.seen == []


def finish(gateway: RunningGateway, *threads: threading.Thread) -> None:
    """Moves time on until the scripted engine has made all events, and the requests are answered."""
    while any(thread.is_alive() for thread in threads):
        gateway.loop.skip(5)


def test_a_model_has_so_many_requests_and_tokens_at_a_time(tmp_path: Path) -> None:
    text = config_text(port=0, runtime=tmp_path)
    text = text.replace(
        'tool_parser = "llama3_json"', 'tool_parser = "llama3_json"\nmax_requests = 2\nmax_tokens = 5000'
    )
    with running_gateway(parse(text.encode()), tmp_path) as gateway:
        answers: list[int] = []

        def ask(**more: Any) -> None:
            answers.append(sealed_chat(gateway, chat(stream=True, events=4, gap=5, **more)).status)

        threads = [threading.Thread(target=ask) for _ in range(2)]
        for thread in threads:
            thread.start()
        wait_until(lambda: len(gateway.engine.seen) == 2)
        refused = sealed_chat(gateway, chat())
        assert (refused.status, refused.json()["error"]["code"]) == (503, "overloaded")
        assert (b"retry-after", b"5") in refused.fields
        assert sealed_chat(gateway, {**chat(), "model": "demo/gemma3"}).status == 200, "another model has room"
        finish(gateway, *threads)
        assert answers == [200, 200]
        # Alone a request may be as long as it likes; beside another it has to fit.
        large = threading.Thread(target=ask, kwargs={"max_tokens": 4900})
        before = len(gateway.engine.seen)
        large.start()
        wait_until(lambda: len(gateway.engine.seen) == before + 1)
        assert sealed_chat(gateway, chat(max_tokens=500)).status == 503
        finish(gateway, large)
        assert sealed_chat(gateway, chat(max_tokens=500)).status == 200


def test_a_connection_to_the_engine_carries_one_request_after_another(tmp_path: Path) -> None:
    """A new one costs as much as opening the seal."""
    with running_gateway(parse(config_text(port=0, runtime=tmp_path).encode()), tmp_path) as gateway:
        used = gateway.engine.connections
        for more in ({}, {"stream": True}, {"stream": True, "events": 50}, {}):
            assert sealed_chat(gateway, chat(**more)).status == 200
        assert len(used) == 4
        assert len(set(map(id, used))) == 1
        # One that the engine broke off is not used again.
        sealed_chat(gateway, chat(messages=[{"role": "user", "content": "die mid-answer"}]))
        assert sealed_chat(gateway, chat()).status == 200
        assert used[4] is used[0]
        assert used[5] is not used[0]
        # Nor one that it closed while it rested.
        engine = used[5]
        assert engine is not None
        gateway.loop.call_soon_threadsafe(engine.close)
        assert sealed_chat(gateway, chat()).status == 200
        assert used[6] is not used[5]
