"""A gateway in front of a scripted engine.

The scripted engine is a test double of vLLM behind the real port (HTTP on a Unix socket): it answers what a test needs
and no real engine would do on demand. The tests under `tests/system` use real engines.
"""

import asyncio
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import uvicorn
from aiohttp import web

from adytum.attestation.collect.rounds import Collector, NoEndorsements, NoGpus
from adytum.attestation.document.evidence import Claims, ModelClaim
from adytum.attestation.simulated.device import SimulatedCpu
from adytum.inference.backend.parts import callers, callers_file
from adytum.inference.channel import keyconfig
from adytum.inference.core.config import Config
from adytum.inference.core.lifecycle import Lifecycle, Step
from adytum.inference.gateway.accounting.ledger import ledger
from adytum.inference.gateway.accounting.metering import Records
from adytum.inference.gateway.accounting.telemetry import Telemetry
from adytum.inference.gateway.admission.admission import Admission
from adytum.inference.gateway.admission.load import Load
from adytum.inference.gateway.edge.app import GATEWAY_PATH, create_gateway
from adytum.inference.gateway.edge.connections import Guard
from adytum.inference.gateway.edge.evidence import EvidenceService
from adytum.inference.gateway.exchange.engines import Engines
from adytum.inference.gateway.exchange.notary import Notary
from adytum.inference.gateway.exchange.sealed import SealedService
from adytum.inference.gateway.keys import REPLAY_LIMIT, KeyRing
from adytum.inference.gateway.limits import LIMITS, GatewayLimits
from tests.serving import ClockLoop, QuickServer
from tests.support import Wire

USAGE = {"prompt_tokens": 21, "completion_tokens": 5, "prompt_tokens_details": {"cached_tokens": 16}}


@dataclass
class ScriptedEngine:
    """Answers by the first message's words. `seen` holds what reached it, `aborted` counts clients that went away.

    `connections`: those that requests came on, in order.
    """

    seen: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    aborted: int = 0
    connections: list[asyncio.Transport | None] = field(default_factory=list)

    def app(self) -> web.Application:
        # Without this aiohttp does not tell a handler that its client is gone.
        app = web.Application(client_max_size=64 * 1024 * 1024)
        app.router.add_route("*", "/{path:.*}", self._answer)
        return app

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.seen.append((request.path, body))
        self.headers.append(dict(request.headers))
        self.connections.append(request.transport)
        script = body["messages"][0]["content"] if body.get("messages") else ""
        if script == "error":
            return web.json_response({"error": {"message": "scripted", "type": "BadRequestError"}}, status=400)
        if script == "die mid-answer":
            response = web.StreamResponse(headers={"Content-Type": "application/json", "Content-Length": "100"})
            await response.prepare(request)
            await response.write(b'{"half": ')
            assert request.transport is not None
            request.transport.close()
            return response
        if script == "die":
            assert request.transport is not None
            request.transport.close()
            return web.Response()
        if not body.get("stream"):
            await asyncio.sleep(body.get("wait", 0))
            if script == "forever":
                await self._wait_for_abort(asyncio.sleep(3600))
            return web.json_response({"said": script, "pad": "x" * body.get("size", 0), "usage": USAGE})
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8", "X-Engine": "1"})
        await response.prepare(request)
        for i in range(body.get("events", 3)):
            await self._wait_for_abort(response.write(event(i)))
            await self._wait_for_abort(asyncio.sleep(body.get("gap", 0)))
            if script == "die mid-stream" and i == 1:
                assert request.transport is not None
                request.transport.close()
                return response
        if (body.get("stream_options") or {}).get("include_usage"):
            await response.write(b"data: " + json.dumps({"choices": [], "usage": USAGE}).encode() + b"\n\n")
        await response.write(b"data: [DONE]\n\n")
        return response

    async def _wait_for_abort(self, waiting: Any) -> None:
        try:
            await waiting
        except (asyncio.CancelledError, ConnectionError):
            self.aborted += 1
            raise


def event(i: int) -> bytes:
    """The i-th event of a scripted stream."""
    return b'data: {"choices":[{"delta":{"content":"word%d"}}]}\n\n' % i


@dataclass
class RunningGateway(Wire):
    """A gateway on loopback and what is behind it."""

    engine: ScriptedEngine
    keys: KeyRing
    lifecycle: Lifecycle
    sealed: SealedService
    reread: Callable[[], None]
    """Looks at the signed list of callers again."""
    telemetry: Telemetry
    loop: ClockLoop
    """The gateway's and the engine's."""
    guard: Guard


def admission_of(config: Config) -> Admission:
    """What a backend of this configuration lets through."""
    return Admission(config, callers(config, callers_file(config)))


@contextmanager
def running_gateway(
    config: Config,
    folder: Path,
    *,
    serving: bool = True,
    replay_limit: int = REPLAY_LIMIT,
    limits: GatewayLimits = LIMITS,
    engine: ScriptedEngine | None = None,
    clock: Callable[[], float] = time.time,
) -> Iterator[RunningGateway]:
    """A gateway with real keys, channel and simulated evidence in front of a scripted engine, in a thread.

    It listens on the configuration's port, of loopback; 0 for a free one. `clock`: Unix seconds. Limits go by the
    loop's time, which `loop.skip` moves on.
    """
    engine = engine or ScriptedEngine()
    keys = KeyRing(clock, config.channel.key_lifetime_s, config.channel.key_overlap_s, replay_limit)
    notary = Notary({model.id: bytes(32) for model in config.models}, clock)
    metering = config.metering
    telemetry = Telemetry(metering.token_bucket, dict)
    records = Records(metering.records, metering.token_bucket) if metering.records is not None else None
    lifecycle = Lifecycle(step=Step.SERVING if serving else Step.CANARY)
    socket = folder / "engine.sock"
    started = threading.Event()
    holder: dict[str, Any] = {}

    def claims() -> Claims:
        return Claims(
            key_configurations=keyconfig.encode_list(keys.configurations),
            ehbp_key_configuration=keys.ehbp_configuration.encode(),
            receipt_key=notary.public_key,
            gateway_path=f"{GATEWAY_PATH}/{config.server.replica}",
            replica=config.server.replica,
            tls_spki_sha256=None,
            models=tuple(ModelClaim(m.id, m.task, m.aliases, bytes(32)) for m in config.models),
            configuration_sha256=config.sha256,
            padding=config.channel.padding.value,
            sandbox=config.engines.sandbox,
            software_version="test",
            cc_mode="none",
            issued_at=int(clock()),
            keys_expire_at=int(keys.expires_at),
        )

    async def serve() -> None:
        runner = web.AppRunner(engine.app(), handler_cancellation=True)
        await runner.setup()
        await web.UnixSite(runner, str(socket)).start()
        pool = Engines({model.id: socket for model in config.models})
        for model in config.models:
            pool.open(model.id)
        file = callers_file(config)
        known = callers(config, file)
        admission = Admission(config, known)
        sealed = SealedService(
            keys,
            admission,
            pool,
            notary,
            ledger(records, telemetry),
            max_requests=config.server.max_requests,
            request_seconds=config.server.request_seconds,
            max_upload=config.server.max_upload_mib << 20,
            load=Load(config.models),
            telemetry=telemetry,
        )
        evidence = EvidenceService(
            Collector(cpu=SimulatedCpu(clock=clock), gpus=NoGpus(), endorsements=NoEndorsements()), claims
        )
        app = create_gateway(
            replica=config.server.replica,
            padding=config.channel.shape,
            lifecycle=lifecycle,
            model_states=dict,
            keys=keys,
            evidence=evidence,
            admission=admission,
            sealed=sealed,
        )
        guard = Guard(config.server.max_connections, config.server.request_seconds, limits)
        server = QuickServer(
            uvicorn.Config(
                app,
                port=config.server.port,
                http=guard.protocol(),
                lifespan="off",
                access_log=False,
                log_level="critical",
            )
        )
        holder.update(server=server, sealed=sealed, guard=guard, reread=lambda: file.refresh(known) if file else None)
        serving_task = asyncio.create_task(server.serve())
        while not server.started:
            await asyncio.sleep(0.01)
        holder["port"] = server.servers[0].sockets[0].getsockname()[1]
        started.set()
        await serving_task
        pool.close()
        await runner.cleanup()
        if records is not None:
            records.close()

    def run() -> None:
        with asyncio.Runner(loop_factory=lambda: loop) as runner:
            runner.run(serve())

    loop = ClockLoop()
    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    assert started.wait(20)
    try:
        yield RunningGateway(
            holder["port"],
            engine,
            keys,
            lifecycle,
            holder["sealed"],
            holder["reread"],
            telemetry,
            loop,
            holder["guard"],
        )
    finally:
        holder["server"].end()
        thread.join(20)
