"""A TCP relay in the network's place: it records all bytes and can change one. For the demo and the tests."""

import asyncio
import contextlib
from dataclasses import dataclass, field

_HEAD_END = b"\r\n\r\n"


@dataclass
class Relay:
    """Forwards loopback connections to `port`. `sent` and `answered` hold every byte that passed."""

    port: int
    sent: bytearray = field(default_factory=bytearray)
    answered: bytearray = field(default_factory=bytearray)
    flip_at: int | None = None
    """Offset in the body of the next answer at which one bit is flipped, once."""
    cut_at: int | None = None
    """Offset in the body of the next answer after which both connections are closed, once."""
    _server: asyncio.Server | None = None
    _connections: set[asyncio.Task[None]] = field(default_factory=set)

    async def start(self) -> int:
        """Starts to listen. Returns the port."""
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        return int(self._server.sockets[0].getsockname()[1])

    async def stop(self) -> None:
        """Stops listening and closes all connections."""
        if self._server is not None:
            self._server.close()
        for task in self._connections:
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.ensure_future(self._forward(reader, writer))
        self._connections.add(task)
        task.add_done_callback(self._connections.discard)

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            up_reader, up_writer = await asyncio.open_connection("127.0.0.1", self.port)
        except OSError:
            writer.close()
            return
        try:
            await asyncio.gather(self._up(reader, up_writer), self._down(up_reader, writer))
        finally:
            writer.close()
            up_writer.close()

    async def _up(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                self.sent += data
                writer.write(data)
                await writer.drain()
        writer.close()

    async def _down(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        body_at: int | None = None  # Body bytes passed of the answer to be changed.
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                self.answered += data
                if self.flip_at is not None or self.cut_at is not None:
                    start = 0
                    if body_at is None and _HEAD_END in data:
                        start = data.index(_HEAD_END) + len(_HEAD_END)
                        body_at = 0
                    if body_at is not None:
                        data, ended = self._change(data, start, body_at)
                        body_at += len(data) - start
                        if ended:
                            writer.write(data)
                            break
                writer.write(data)
                await writer.drain()
        writer.close()

    def _change(self, data: bytes, start: int, body_at: int) -> tuple[bytes, bool]:
        """`data` with the change that is due, and whether the answer ends here. Its part of the body begins at `start`,
        which is the body's byte `body_at`."""
        if self.flip_at is not None and body_at <= self.flip_at < body_at + len(data) - start:
            at = start + self.flip_at - body_at
            self.flip_at = None
            return data[:at] + bytes((data[at] ^ 1,)) + data[at + 1 :], False
        if self.cut_at is not None and body_at <= self.cut_at < body_at + len(data) - start:
            at = start + self.cut_at - body_at
            self.cut_at = None
            return data[:at], True
        return data, False
