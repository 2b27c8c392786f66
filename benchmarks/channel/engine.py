"""A synthetic engine: HTTP on a Unix socket (and on a TCP port for LiteLLM), events at a set rate, cheap.

A request's `max_tokens` is the number of events. Its `seed` is 1,000 times the pause in milliseconds, plus the number
of events in one write. Both are fields of OpenAI's API, so every peer passes them on.
"""

import asyncio
import re

import uvloop

from adytum.benchmarks.processes import many_files

EVENT = (
    b'data: {"id":"chatcmpl-9f0123456789abcdef","object":"chat.completion.chunk","created":1763859000,'
    b'"model":"synthetic","choices":[{"index":0,"delta":{"content":"word"},"logprobs":null,"finish_reason":null}]}\n\n'
)
_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
_EVENTS = re.compile(rb'"max_tokens": *(\d+)')
_PACE = re.compile(rb'"seed": *(\d+)')


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


async def _serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while True:
            head = await reader.readuntil(b"\r\n\r\n")
            length = _LENGTH.search(head)
            body = await reader.readexactly(int(length[1])) if length else b""
            await _answer(body, writer)
    except (asyncio.IncompleteReadError, ConnectionError):
        pass  # The other side closed: at a stream's end, or because a measurement cut it.
    finally:
        writer.close()


async def _answer(body: bytes, writer: asyncio.StreamWriter) -> None:
    asked, pace = _EVENTS.search(body), _PACE.search(body)
    if asked is None or pace is None:
        writer.write(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")
        return
    left, gap, batch = int(asked[1]), int(pace[1]) // 1000 / 1000, int(pace[1]) % 1000
    usage = b'data: {"choices":[],"usage":{"prompt_tokens":1,"completion_tokens":%d}}\n\n' % left
    loop = asyncio.get_running_loop()
    writer.write(_HEAD)
    due = loop.time()
    while left:
        # One HTTP chunk per event, as vLLM writes them; a batch is one write.
        writer.write(_chunk(EVENT) * min(batch, left))
        left -= min(batch, left)
        await writer.drain()
        due += gap
        await asyncio.sleep(max(0.0, due - loop.time()) if gap else 0)
    writer.write(_chunk(usage) + _chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n")
    await writer.drain()


def engine_process(path: str, port: int) -> None:
    """Serves on the Unix socket `path` and, unless `port` is 0, on loopback."""
    many_files()

    async def serve() -> None:
        unix = await asyncio.start_unix_server(_serve, path, backlog=4096)
        if port:
            await asyncio.start_server(_serve, "127.0.0.1", port, backlog=4096)
        await unix.serve_forever()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(serve())
