"""The gateway alone, in a process: the parts and the server that `inference.app` puts together, without its engines."""

import asyncio
import time
from pathlib import Path

import uvicorn
import uvloop

from attestation.collect import Collector, NoEndorsements, NoGpus
from attestation.simulated.device import SimulatedCpu
from benchmarks.channel.processes import many_files
from deploy.demo.processes import CONFIG
from inference.assembly import callers, callers_file
from inference.channel.exchange import Shape
from inference.config import parse
from inference.gateway.admission import Admission
from inference.gateway.app import create_gateway
from inference.gateway.connections import Guard
from inference.gateway.engines import Engines
from inference.gateway.evidence import EvidenceService
from inference.gateway.ledger import ledger
from inference.gateway.load import Load
from inference.gateway.notary import Notary
from inference.gateway.sealed import SealedService
from inference.keys import KeyRing
from inference.lifecycle import Lifecycle, Step


def gateway_process(path: str, port: int, shape: Shape | None = None) -> None:
    """A gateway of the demo's configuration whose models all live on `path`. `shape`: of answers, if another."""
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
