"""However a request ends, all that it held is released, once: the ways to end one by one, and every counter after each.

The gateway's hot path in this thread, called as its web server would call it, in front of a scripted engine.
"""

import asyncio
import hashlib
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from starlette.types import Message

from adytum.inference.channel import ohttp
from adytum.inference.channel.errors import ChannelError
from adytum.inference.channel.exchange import Shape
from adytum.inference.channel.openings import OhttpOpening
from adytum.inference.channel.padding import Padding
from adytum.inference.channel.shaping import Cells
from adytum.inference.core.config import Config, Model, parse
from adytum.inference.gateway.accounting.ledger import Account, ledger
from adytum.inference.gateway.accounting.metering import Records
from adytum.inference.gateway.admission.admission import Admission, EngineCall
from adytum.inference.gateway.admission.load import Load
from adytum.inference.gateway.callers.callers import Caller, Callers, Hold
from adytum.inference.gateway.exchange.engines import Engines
from adytum.inference.gateway.exchange.lease import Lease
from adytum.inference.gateway.exchange.notary import Notary
from adytum.inference.gateway.exchange.sealed import SealedService
from adytum.inference.gateway.keys import KeyRing
from tests.support import config_text, open_answer, seal
from tests.unit.gateway.support import ScriptedEngine

KEY = "sk-lease"
MODEL = "demo/llama-awq"
TOKENS = 100_000
UPLOAD = 256 * 1024
SHAPES: dict[str, Shape] = {"plain": Padding.PAD, "paced": Cells(512, 4, 0.005)}
NOTHING = dict.fromkeys(
    ("in progress", "bytes arriving", "caller", "load", "load's tokens", "engine's connections", "caller's tokens"), 0
)


class Fault(Exception):
    """A fault of ours."""


def broken(*_: object, **__: object) -> Any:
    raise Fault


@dataclass
class Client:
    """The network's side of one request, as the web server shows it. `at_message` is called with the number of each
    message that the gateway writes."""

    pieces: list[bytes]
    whole: bool = True
    at_message: Callable[[int], None] = lambda _: None
    written: list[Message] = field(default_factory=list)
    gone: asyncio.Event = field(default_factory=asyncio.Event)

    async def receive(self) -> Message:
        if self.pieces:
            data = self.pieces.pop(0)
            return {"type": "http.request", "body": data, "more_body": bool(self.pieces) or not self.whole}
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        self.written.append(message)
        self.at_message(len(self.written))
        await asyncio.sleep(0)

    @property
    def status(self) -> int | None:
        return self.written[0]["status"] if self.written else None

    @property
    def body(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.written)


@dataclass
class Gateway:
    """The service and everything that counts what requests hold."""

    sealed: SealedService
    keys: KeyRing
    callers: Callers
    load: Load
    pool: Engines
    engine: ScriptedEngine
    shape: Shape
    records: Path

    def held(self) -> dict[str, float]:
        _, account = self.callers._accounts["caller"]
        assert account.tokens is not None
        reserved = TOKENS - account.tokens.level
        return {
            "in progress": self.sealed.in_progress,
            "bytes arriving": self.sealed.arrivals.held,
            "caller": account.in_progress,
            "load": self.load.requests[MODEL],
            "load's tokens": self.load.tokens[MODEL],
            "engine's connections": self.pool.in_progress(MODEL),
            # At least a usual answer's 1,024 tokens are reserved; those that were used do not come back.
            "caller's tokens": reserved // 1024,
        }

    def sealer(self, media: ohttp.Media = ohttp.CHUNKED) -> ohttp.RequestSealer:
        return ohttp.RequestSealer(media, self.keys.configurations[0])

    async def handle(self, client: Client, media: ohttp.Media = ohttp.CHUNKED) -> None:
        await self.sealed.handle(
            {"type": "http", "method": "POST", "headers": []},
            client.receive,
            client.send,
            lambda: OhttpOpening(media, self.keys.find, self.shape),
        )


@asynccontextmanager
async def serving(folder: Path, shape: Shape) -> AsyncIterator[Gateway]:
    config = parse(config_text(port=0, runtime=folder).encode())
    engine, socket = ScriptedEngine(), folder / "engine.sock"
    runner = web.AppRunner(engine.app(), handler_cancellation=True)
    await runner.setup()
    await web.UnixSite(runner, str(socket)).start()
    pool = Engines({model.id: socket for model in config.models})
    pool.open(MODEL)
    caller = Caller(name="caller", key_sha256=hashlib.sha256(KEY.encode()).hexdigest(), tokens_per_minute=TOKENS)
    # The clock of rates stands still: nothing comes back by itself.
    callers = Callers((caller,), clock=time.time, monotonic=lambda: 0.0)
    load = Load(_narrow(config))
    records = Records(folder / "usage.jsonl", 1)
    keys = KeyRing(time.time, 3600, 600)
    sealed = SealedService(
        keys,
        Admission(config, callers),
        pool,
        Notary({model.id: bytes(32) for model in config.models}, time.time),
        ledger(records),
        max_requests=2,
        request_seconds=0.3,
        max_upload=UPLOAD,
        load=load,
    )
    try:
        yield Gateway(sealed, keys, callers, load, pool, engine, shape, folder / "usage.jsonl")
    finally:
        pool.close()
        records.close()
        await runner.cleanup()


def _narrow(config: Config) -> tuple[Model, ...]:
    """The models, whose engines take one request at a time."""
    return tuple(model.model_copy(update={"max_requests": 1}) for model in config.models)


def chat(script: str = "hello", **more: Any) -> dict[str, Any]:
    return {"model": MODEL, "messages": [{"role": "user", "content": script}], **more}


LONG = chat(stream=True, events=500, gap=0.01)
WAITING = chat("forever")

Said = int | str | None
"""A sealed answer's status, "clear 503" for one outside the seal, "cut" for one without its end, `None` for nothing."""
Way = Callable[[Gateway], Awaitable[Said]]


async def ask(
    gateway: Gateway, body: Any, *, key: str = KEY, media: ohttp.Media = ohttp.CHUNKED, path: str = "", method: str = ""
) -> Said:
    """A request whose client stays to the end."""
    sealer = gateway.sealer(media)
    fields = ((b"authorization", b"Bearer " + key.encode()),)
    client = Client([seal(sealer, body, path or "/v1/chat/completions", method or "POST", media, fields)])
    await gateway.handle(client, media)
    return said(client, sealer)


def said(client: Client, sealer: ohttp.RequestSealer) -> Said:
    if client.status is None:
        return None
    if client.status != 200:
        return f"clear {client.status}"
    try:
        return open_answer(sealer, client.body).status
    except ChannelError:
        return "cut"


def asked(body: Any, **more: Any) -> Way:
    return lambda gateway: ask(gateway, body, **more)


def leaving(body: Any, *, at_message: int | None = None, by: str) -> Way:
    """Its client leaves, or the server ends its task: at a message of the answer, or while the engine works on it."""

    async def run(gateway: Gateway) -> Said:
        sealer = gateway.sealer()
        client = Client([seal(sealer, body, fields=((b"x-api-key", KEY.encode()),))])
        task = asyncio.ensure_future(gateway.handle(client))
        leave = client.gone.set if by == "client" else task.cancel
        if at_message is not None:
            client.at_message = lambda count: _at(count, at_message, leave)
        else:
            while not gateway.engine.seen:
                await asyncio.sleep(0.001)
            leave()
        await asyncio.wait({task})
        assert task.cancelled() == (by == "server")
        return said(client, sealer)

    return run


def _at(count: int, message: int, leave: Callable[[], object]) -> None:
    if count == message:
        leave()


def faulty(part: str, body: Any) -> Way:
    """A part of the gateway raises what it never should."""

    async def run(gateway: Gateway) -> Said:
        owner: Any = gateway.sealed
        *path, name = part.split(".")
        for step in path:
            owner = getattr(owner, step)
        setattr(owner, name, broken)
        return await ask(gateway, body)

    return run


def unwritten(body: Any) -> Way:
    """Its record cannot be written."""

    async def run(gateway: Gateway) -> Said:
        gateway.records.unlink()
        gateway.records.mkdir()
        result = await ask(gateway, body)
        gateway.records.rmdir()
        gateway.records.touch()
        return result

    return run


def sent(*pieces: bytes, whole: bool = True, leaves: bool = False) -> Way:
    """These bytes, sealed by nobody."""

    async def run(gateway: Gateway) -> Said:
        client = Client(list(pieces), whole)
        if leaves:
            client.gone.set()
        await gateway.handle(client)
        return said(client, gateway.sealer())

    return run


async def half_of_it(gateway: Gateway) -> Said:
    """The client leaves in the middle of its request."""
    client = Client([seal(gateway.sealer(), chat(pad="x" * 1000))[:700]], whole=False)
    task = asyncio.ensure_future(gateway.handle(client))
    await asyncio.sleep(0.01)
    assert gateway.held()["bytes arriving"] == 700
    client.gone.set()
    await task
    return client.status


async def slowly(gateway: Gateway) -> Said:
    """The rest of the request never comes."""
    client = Client([seal(gateway.sealer(), chat())[:100]], whole=False)
    await gateway.handle(client)
    return said(client, gateway.sealer())


async def too_large(gateway: Gateway) -> Said:
    data = seal(gateway.sealer(), chat(pad="x" * UPLOAD), fields=((b"x-api-key", KEY.encode()),))
    client = Client([data[at : at + 16_384] for at in range(0, len(data), 16_384)])
    await gateway.handle(client)
    return said(client, gateway.sealer())


async def twice(gateway: Gateway) -> Said:
    """The same bytes again."""
    sealer = gateway.sealer()
    data = seal(sealer, b"", "/v1/models", "GET", fields=((b"x-api-key", KEY.encode()),))
    await gateway.handle(Client([data]))
    again = Client([data])
    await gateway.handle(again)
    return said(again, sealer)


def beside(count: int, body: Any) -> Way:
    """While others are being answered, which leave afterwards."""

    async def run(gateway: Gateway) -> Said:
        tasks, clients = [], []
        for waiting in [WAITING, {"model": "none", "messages": []}][:count]:
            client = Client([seal(gateway.sealer(), waiting, fields=((b"x-api-key", KEY.encode()),))])
            if waiting is not WAITING:
                client.pieces, client.whole = [client.pieces[0][:50]], False
            clients.append(client)
            tasks.append(asyncio.ensure_future(gateway.handle(client)))
        while not gateway.engine.seen:
            await asyncio.sleep(0.001)
        result = await ask(gateway, body)
        for client in clients:
            client.gone.set()
        await asyncio.gather(*tasks)
        return result

    return run


async def more_than_its_tokens(gateway: Gateway) -> Said:
    assert await ask(gateway, chat()) == 200
    return await ask(gateway, chat(max_tokens=TOKENS))


async def shut(gateway: Gateway) -> Said:
    """The engine is not live."""
    gateway.pool.shut(MODEL)
    return await ask(gateway, chat())


async def shut_meanwhile(gateway: Gateway) -> Said:
    """The backend ends the engines' answers, as at the end of its drain."""
    sealer = gateway.sealer()
    client = Client([seal(sealer, LONG, fields=((b"x-api-key", KEY.encode()),))])
    client.at_message = lambda count: _at(count, 2, lambda: gateway.pool.shut(MODEL))
    await gateway.handle(client)
    return said(client, sealer)


WAYS: dict[str, tuple[Way, Said, list[str]]] = {
    # By name: the way, what the client gets, and the outcomes in the records.
    "answered whole": (asked(chat()), 200, ["ok"]),
    "answered as a stream": (asked(chat(stream=True)), 200, ["ok"]),
    "answered with the list of models": (asked(b"", path="/v1/models", method="GET"), 200, []),
    "refused for its key": (asked(chat(), key="sk-wrong"), 401, []),
    "refused for its path": (asked(chat(), path="/v1/none"), 404, []),
    "refused for its model": (asked(chat() | {"model": "none"}), 404, []),
    "refused for its body": (asked(b"{"), 400, []),
    "refused for its caller's tokens": (more_than_its_tokens, 429, ["ok"]),
    "refused for its engine's load": (beside(1, chat()), 503, ["client_gone"]),
    "refused for its form": (asked(chat(stream=True), media=ohttp.WHOLE), 400, []),
    "refused by its engine": (asked(chat("error")), 400, ["refused"]),
    "its engine is shut": (shut, 503, []),
    "its engine goes away before the answer": (asked(chat("die")), 503, []),
    "its engine goes away in a whole answer": (asked(chat("die mid-answer")), 502, ["cut"]),
    "its engine goes away in a stream": (asked(chat("die mid-stream", stream=True)), 200, ["cut"]),
    "its engine is shut meanwhile": (shut_meanwhile, 200, ["cut"]),
    "its client leaves while it arrives": (half_of_it, None, []),
    "its client leaves before the engine's answer": (leaving(WAITING, by="client"), None, ["client_gone"]),
    "its client leaves at the head of a stream": (leaving(LONG, at_message=1, by="client"), "cut", ["client_gone"]),
    "its client leaves in a stream": (leaving(LONG, at_message=4, by="client"), "cut", ["client_gone"]),
    "its client leaves at the head of a whole answer": (leaving(chat(), at_message=1, by="client"), "cut", ["ok"]),
    "the server ends before the engine's answer": (leaving(WAITING, by="server"), None, ["client_gone"]),
    "the server ends in a stream": (leaving(LONG, at_message=4, by="server"), "cut", ["client_gone"]),
    "too many at a time": (beside(2, chat()), "clear 503", ["client_gone"]),
    "not sealed": (sent(b"x" * 500), "clear 422", []),
    "empty": (sent(b""), "clear 400", []),
    "gone before a byte": (sent(leaves=True), None, []),
    "too slow": (slowly, "clear 408", []),
    "too large for those that arrive": (too_large, "clear 503", []),
    "replayed": (twice, "clear 409", []),
    "a whole answer's record cannot be written": (unwritten(chat()), 500, []),
    "a stream's record cannot be written": (unwritten(chat(stream=True)), "cut", []),
    "a fault in the key ring": (faulty("_keys.spend", chat()), "clear 500", []),
    "a fault in admission": (faulty("_admission.admit", chat()), 500, []),
    "a fault in the load": (faulty("_load.holding", chat()), 500, []),
    "a fault in the ledger": (faulty("_ledger", chat()), 500, []),
    "a fault in the engines": (faulty("_engines.send", chat()), 500, []),
    "a fault in the engines' connection": (faulty("_engines._ask", chat()), 500, []),
    "a fault in the notary": (faulty("_notary.closing", chat()), None, ["ok"]),
    "a fault in the notary after a stream": (faulty("_notary.closing", chat(stream=True)), "cut", ["ok"]),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", WAYS)
def test_nothing_is_held_after_a_request_however_it_ends(name: str, shape: str, tmp_path: Path) -> None:
    way, expected, outcomes = WAYS[name]

    async def run() -> None:
        async with serving(tmp_path, SHAPES[shape]) as gateway:
            assert await way(gateway) == expected
            assert gateway.held() == NOTHING

    asyncio.run(run())
    # Read once the records are closed, and so written.
    lines = (tmp_path / "usage.jsonl").read_bytes().splitlines()
    assert [json.loads(line)["outcome"] for line in lines] == outcomes


@pytest.mark.parametrize("shape", SHAPES)
def test_every_counter_counts_a_request_while_its_engine_works(shape: str, tmp_path: Path) -> None:
    seen: dict[str, float] = {}

    async def look(gateway: Gateway) -> None:
        while not gateway.engine.seen:
            await asyncio.sleep(0.001)
        seen.update(gateway.held())

    async def run() -> None:
        async with serving(tmp_path, SHAPES[shape]) as gateway:
            looking = asyncio.ensure_future(look(gateway))
            assert await ask(gateway, chat("slow", wait=0.05)) == 200
            await looking

    asyncio.run(run())
    tokens = seen.pop("load's tokens")
    assert tokens > 1024
    assert seen == {**dict.fromkeys(seen, 1), "bytes arriving": 0}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("stream", [False, True])
def test_the_engine_is_free_and_the_caller_is_not_while_the_answer_leaves(
    stream: bool, shape: str, tmp_path: Path
) -> None:
    async def run() -> dict[str, float]:
        async with serving(tmp_path, SHAPES[shape]) as gateway:
            held: list[dict[str, float]] = []
            client = Client([seal(gateway.sealer(), chat(stream=stream), fields=((b"x-api-key", KEY.encode()),))])
            client.at_message = lambda _: held.append(gateway.held())
            await gateway.handle(client)
            return held[-1]

    held = asyncio.run(run())
    assert (held["engine's connections"], held["caller"], held["load"], held["in progress"]) == (0, 1, 1, 1)


def call(hold: Hold | None = None) -> EngineCall:
    config = parse(config_text(port=0, runtime=Path()).encode())
    model = next(model for model in config.models if model.id == MODEL)
    return EngineCall(model, "/v1/chat/completions", json.dumps(chat()).encode(), stream=False, hold=hold)


def test_a_connection_that_was_released_is_not_taken_from_the_next_request(tmp_path: Path) -> None:
    async def run() -> None:
        async with serving(tmp_path, Padding.PAD) as gateway:
            parts = gateway.sealed._load, gateway.sealed._ledger, gateway.pool
            gateway.sealed._load._models[MODEL] = call().model
            with Lease(call(), *parts) as first:
                answer, account = await first.ask()
                while await answer.read():
                    pass
                first.answered()
                account.void()
                with Lease(call(), *parts) as second:
                    again, account = await second.ask()
                    assert again is answer
                    account.void()
                    first.answered()
                    first.__exit__(None, None, None)
                    assert gateway.pool.in_progress(MODEL) == 1
                    while await again.read():
                        pass
            assert gateway.held() == NOTHING

    asyncio.run(run())


class Unclosable(Account):
    close = broken


def unclosable(call: EngineCall) -> Account:
    return Unclosable(call, None, None)


def test_a_release_that_fails_keeps_no_other_from_running(tmp_path: Path) -> None:
    async def run() -> None:
        async with serving(tmp_path, Padding.PAD) as gateway:
            caller, _ = gateway.callers.authenticate(((b"x-api-key", KEY.encode()),))
            lease = Lease(call(gateway.callers.begin(caller)), gateway.load, unclosable, gateway.pool)
            await lease.ask()
            with pytest.raises(Fault):
                lease.__exit__(None, None, None)
            assert gateway.held() == NOTHING

    asyncio.run(run())
