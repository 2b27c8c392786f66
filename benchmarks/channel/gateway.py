"""The gateway alone, in a process: the parts and the server of `adytum serve`, without its engines."""

import asyncio
import time
from pathlib import Path

import uvicorn
import uvloop

from adytum.attestation.collect.rounds import Collector, NoEndorsements, NoGpus
from adytum.attestation.simulated.device import SimulatedCpu
from adytum.benchmarks.processes import many_files
from adytum.deploy.demo.processes import CONFIG
from adytum.inference.backend.parts import callers, callers_file
from adytum.inference.channel.exchange import Shape
from adytum.inference.core.config import parse
from adytum.inference.core.lifecycle import Lifecycle, Step
from adytum.inference.gateway.accounting.ledger import ledger
from adytum.inference.gateway.admission.admission import Admission
from adytum.inference.gateway.admission.load import Load
from adytum.inference.gateway.edge.app import create_gateway
from adytum.inference.gateway.edge.connections import Guard
from adytum.inference.gateway.edge.evidence import EvidenceService
from adytum.inference.gateway.exchange.engines import Engines
from adytum.inference.gateway.exchange.notary import Notary
from adytum.inference.gateway.exchange.sealed import SealedService
from adytum.inference.gateway.keys import KeyRing


def gateway_process(path: str, port: int, shape: Shape | None = None) -> None:
    """A gateway of the demo's configuration, with one engine socket, `path`, for all models.

    `shape`: the answers' shape, if not the configuration's.
    """
    many_files()
    config = parse(CONFIG.read_bytes())
    keys = KeyRing(time.time, 3600, 600)

    async def serve() -> None:
        admission = Admission(config, callers(config, callers_file(config)))
        pool = Engines({model.id: Path(path) for model in config.models})
        for model in config.models:
            pool.open(model.id)
        notary = Notary({model.id: bytes(32) for model in config.models}, time.time)
        sealed = SealedService(
            keys,
            admission,
            pool,
            notary,
            ledger(None),
            max_requests=10_000,
            request_seconds=60,
            max_upload=1 << 30,
            load=Load(tuple(model.model_copy(update={"max_requests": 10_000}) for model in config.models)),
        )
        app = create_gateway(
            replica="bench",
            padding=shape or config.channel.shape,
            lifecycle=Lifecycle(Step.SERVING),
            model_states=dict,
            keys=keys,
            evidence=EvidenceService(Collector(SimulatedCpu(), NoGpus(), NoEndorsements()), lambda: NotImplemented),
            admission=admission,
            sealed=sealed,
        )
        guard = Guard(20_000, config.server.request_seconds)
        options = uvicorn.Config(
            app,
            port=port,
            loop="uvloop",
            http=guard.protocol(),
            ws="none",
            lifespan="off",
            access_log=False,
            log_level="critical",
            server_header=False,
            proxy_headers=False,
            backlog=4096,
            timeout_keep_alive=75,
        )
        await uvicorn.Server(options).serve()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(serve())
