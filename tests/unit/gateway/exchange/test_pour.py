"""An engine's answer poured into a sink: in order, whole, and no faster than the sink takes it."""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from adytum.inference.gateway.exchange.advance import advance
from adytum.inference.gateway.exchange.engines import EngineAnswer, EngineCut

_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
Emit = Callable[[asyncio.StreamWriter], Coroutine[Any, Any, None]]


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


async def _answered(folder: Path, emit: Emit) -> EngineAnswer:
    """An answer whose head is there, from a server that then does `emit`."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(_HEAD)
        try:
            await emit(writer)
        finally:
            writer.close()

    path = folder / "engine.sock"
    await asyncio.start_unix_server(serve, path)
    loop = asyncio.get_running_loop()
    _, answer = await loop.create_unix_connection(lambda: EngineAnswer(lambda _: None), str(path))
    answer._idle = False
    assert answer._transport is not None
    answer._transport.write(b"POST / HTTP/1.1\r\n\r\n")
    while not answer._head_done:
        await answer._wait()
    return answer


def test_pour_gives_everything_in_order_and_ends(tmp_path: Path) -> None:
    async def emit(writer: asyncio.StreamWriter) -> None:
        for i in range(50):
            writer.write(_chunk(b"%d;" % i))
            await writer.drain()
            await asyncio.sleep(0.001 if i % 3 else 0)
        writer.write(b"0\r\n\r\n")

    async def run() -> bytes:
        answer = await _answered(tmp_path, emit)
        taken: list[bytes] = []
        await asyncio.wait_for(answer.pour(taken.append), 5)
        assert len(taken) > 10  # As they came, not at the end.
        return b"".join(taken)

    assert asyncio.run(run()) == b"".join(b"%d;" % i for i in range(50))


def test_pour_raises_where_the_engine_goes_away(tmp_path: Path) -> None:
    async def emit(writer: asyncio.StreamWriter) -> None:
        writer.write(_chunk(b"half"))
        await writer.drain()
        await asyncio.sleep(0.01)

    async def run() -> list[bytes]:
        answer = await _answered(tmp_path, emit)
        taken: list[bytes] = []
        with pytest.raises(EngineCut):
            await asyncio.wait_for(answer.pour(taken.append), 5)
        return taken

    assert asyncio.run(run()) == [b"half"]


def test_pour_raises_what_the_sink_raises(tmp_path: Path) -> None:
    async def emit(writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(0.02)
        writer.write(_chunk(b"x"))
        await asyncio.sleep(5)

    def broken(data: bytes) -> None:
        raise ZeroDivisionError

    async def run() -> None:
        answer = await _answered(tmp_path, emit)
        with pytest.raises(ZeroDivisionError):
            await asyncio.wait_for(answer.pour(broken), 5)

    asyncio.run(run())


def test_a_sink_that_cannot_take_more_makes_the_engine_wait(tmp_path: Path) -> None:
    size, count, written = 64 * 1024, 200, 0

    async def emit(writer: asyncio.StreamWriter) -> None:
        nonlocal written
        for _ in range(count):
            writer.write(_chunk(b"x" * size))
            await writer.drain()
            written += 1
        writer.write(b"0\r\n\r\n")

    async def run() -> int:
        answer = await _answered(tmp_path, emit)
        free = asyncio.Event()
        taken = 0

        def sink(data: bytes) -> Awaitable[None] | None:
            nonlocal taken
            taken += len(data)
            return None if free.is_set() else _until(free)

        pouring = asyncio.create_task(answer.pour(sink))
        await asyncio.sleep(0.3)
        assert 0 < taken < 10 * size
        assert written < count // 2, "the engine was not made to wait"
        free.set()
        await asyncio.wait_for(pouring, 10)
        return taken

    assert asyncio.run(run()) == size * count


async def _until(event: asyncio.Event) -> None:
    await event.wait()


def test_advance_ends_a_coroutine_that_never_waits() -> None:
    done: list[int] = []

    async def write() -> None:
        done.append(1)

    assert advance(write()) is None
    assert done == [1]


def test_advance_raises_at_once_what_comes_before_the_first_wait() -> None:
    async def write() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        advance(write())


def test_what_waits_goes_on_in_the_task_that_awaits_it() -> None:
    async def run() -> None:
        gate, steps = asyncio.Event(), list[str]()

        async def write() -> None:
            steps.append("begun")
            await gate.wait()
            await asyncio.sleep(0)
            steps.append("ended")

        rest = advance(write())
        assert rest is not None
        assert steps == ["begun"]
        asyncio.get_running_loop().call_later(0.01, gate.set)
        await rest
        assert steps == ["begun", "ended"]

    asyncio.run(run())


def test_cancelling_reaches_the_coroutine() -> None:
    async def run() -> None:
        steps: list[str] = []

        async def write() -> None:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                steps.append("cancelled")
                raise

        rest = advance(write())
        assert rest is not None
        task = asyncio.ensure_future(rest)
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert steps == ["cancelled"]

    asyncio.run(run())
