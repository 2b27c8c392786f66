"""Where everything is put together: `adytum serve`.

Start-up follows `lifecycle.NEXT`. The gateway listens from the first step on, so `/readyz` can tell the step, but
opens nothing before SERVING.
"""

import asyncio
import datetime
import importlib.metadata
import logging
import os
import signal
import time

import uvloop

from adytum.attestation.collect.rounds import Collector
from adytum.attestation.core.errors import AttestationError, CollectionError
from adytum.attestation.core.trust import TrustRoots
from adytum.attestation.document.evidence import Claims, ModelClaim
from adytum.attestation.policy.policy import Policy
from adytum.attestation.verifier.document import verify
from adytum.inference.backend import hygiene, parts
from adytum.inference.backend.progress import Shown
from adytum.inference.channel import keyconfig
from adytum.inference.core.config import Config
from adytum.inference.core.lifecycle import Lifecycle, Step, StepFailed
from adytum.inference.core.logs import names_only
from adytum.inference.engine.run.process import EngineError
from adytum.inference.engine.supervise.supervisor import NUMBERS, State
from adytum.inference.engine.weights.weights import WeightsError, check
from adytum.inference.gateway.accounting.ledger import ledger
from adytum.inference.gateway.accounting.metering import Records
from adytum.inference.gateway.accounting.telemetry import Server as MetricsServer
from adytum.inference.gateway.accounting.telemetry import Telemetry
from adytum.inference.gateway.admission.admission import Admission
from adytum.inference.gateway.admission.load import Load
from adytum.inference.gateway.edge.app import GATEWAY_PATH, create_gateway
from adytum.inference.gateway.edge.connections import Guard
from adytum.inference.gateway.edge.evidence import EvidenceService, EvidenceUnavailable
from adytum.inference.gateway.edge.server import Server, listen
from adytum.inference.gateway.exchange.engines import Engines
from adytum.inference.gateway.exchange.notary import Notary
from adytum.inference.gateway.exchange.sealed import SealedService
from adytum.inference.gateway.keys import KeyRing

_log = logging.getLogger("adytum")
_VENDOR_SECONDS, _VENDOR_PAUSE_S = 600.0, 1.0
"""How long the first evidence waits for certificates from a vendor; after a failure that is asked again in minutes."""
_REFRESH_S = 60.0
_CALLERS_S = 2.0
"""Between two looks at the list of callers."""


class Backend:
    """One backend: gateway and engines of one configuration."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self.lifecycle = Lifecycle()
        self._folders = {model.id: parts.folder(config, model) for model in config.models}
        self._manifests = {model.id: parts.manifest(model, self._folders[model.id]) for model in config.models}
        self._pool = Engines({model.id: parts.socket_path(config, model) for model in config.models})
        self._keys = KeyRing(time.time, config.channel.key_lifetime_s, config.channel.key_overlap_s)
        self._callers_file = parts.callers_file(config)
        self._callers = parts.callers(config, self._callers_file)
        self._notary = Notary({name: manifest.root for name, manifest in self._manifests.items()}, time.time)
        metering = config.metering
        self._records = Records(metering.records, metering.token_bucket) if metering.records is not None else None
        self._tls, self._spki = parts.tls_context(config)
        self._devices = parts.devices(config)
        self._fleet = parts.fleet(config, self._folders, self._manifests, self._devices, self._pool)
        self._evidence = EvidenceService(
            Collector(self._devices.cpu, self._devices.gpus, self._devices.endorsements),
            self._claims,
            interval=config.evidence.interval_s,
            round_nonces=config.evidence.round_nonces,
            clients=config.evidence.max_clients,
        )

    async def run(self) -> bool:
        """Serves until a signal or a failed step. Whether it ended well."""
        config = self._config
        names_only(asyncio.get_running_loop())
        admission = Admission(config, self._callers)
        guard = Guard(config.server.max_connections, config.server.request_seconds)
        telemetry = Telemetry(config.metering.token_bucket, lambda: self._gauges(guard, sealed))
        sealed = SealedService(
            self._keys,
            admission,
            self._pool,
            self._notary,
            ledger(self._records, telemetry),
            max_requests=config.server.max_requests,
            request_seconds=config.server.request_seconds,
            max_upload=config.server.max_upload_mib << 20,
            load=Load(config.models),
            telemetry=telemetry,
        )
        gateway = create_gateway(
            replica=config.server.replica,
            padding=config.channel.shape,
            lifecycle=self.lifecycle,
            model_states=lambda: self._fleet.states,
            keys=self._keys,
            evidence=self._evidence,
            admission=admission,
            sealed=sealed,
        )
        server = Server(
            gateway,
            self._tls,
            guard=guard,
            drain_seconds=config.server.drain_seconds,
            draining=self._drain,
            cut=self._cut,
        )
        metrics = MetricsServer(telemetry, config.telemetry.port) if config.telemetry.port is not None else None
        if metrics is not None:
            try:
                await metrics.start()
            except OSError as error:
                raise StepFailed(f"telemetry.port {config.telemetry.port}: {error.strerror}") from error
        starting = asyncio.create_task(self._start(server))
        rotating = asyncio.create_task(self._rotate())
        refreshing = asyncio.create_task(self._refresh())
        reading = asyncio.create_task(self._read_callers())
        try:
            await server.serve(sockets=[listen(config.server.host, config.server.port)])
        finally:
            tasks = (starting, rotating, refreshing, reading)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            if metrics is not None:
                await metrics.stop()
            self._pool.close()
            await self._fleet.stop()
            if self._records is not None:
                self._records.close()
        return self.lifecycle.step is not Step.FAILED

    def _gauges(self, guard: Guard, sealed: SealedService) -> dict[str, list[tuple[dict[str, str], float]]]:
        states, numbers = self._fleet.states, self._fleet.numbers
        return {
            "adytum_requests_in_progress": [({}, sealed.in_progress)],
            "adytum_engine_requests": [({"model": name}, self._pool.in_progress(name)) for name in states],
            "adytum_model_state": [
                ({"model": name, "state": state}, float(state == found))
                for name, found in states.items()
                for state in State
            ],
            "adytum_engine_restarts": [({"model": name}, float(n)) for name, n in self._fleet.restarts.items()],
            **{
                metric: [({"model": name}, said[metric]) for name, said in numbers.items() if metric in said]
                for metric in NUMBERS.values()
            },
            "adytum_step": [({"step": step}, float(step is self.lifecycle.step)) for step in Step],
            "adytum_connections": [({}, len(guard.open))],
            "adytum_connections_cut": [({}, guard.cut)],
            "adytum_key_age_seconds": [({}, self._keys.age)],
            "adytum_key_expires_seconds": [({}, self._keys.expires_at - time.time())],
            "adytum_evidence_rounds": [({}, self._evidence.rounds)],
            "adytum_evidence_failures": [({}, self._evidence.failures)],
        }

    def _drain(self) -> None:
        if self.lifecycle.serving:
            self._advance(Step.DRAINING)

    def _cut(self) -> None:
        for model in self._config.models:
            self._pool.shut(model.id)

    async def _start(self, server: Server) -> None:
        try:
            self._advance(Step.KEYS)
            self._advance(Step.EVIDENCE)
            await self._verify_own_evidence()
            self._advance(Step.SELF_VERIFIED)
            self._advance(Step.GPU_READY)
            await asyncio.to_thread(self._set_ready)
            self._advance(Step.WEIGHTS)
            await self._check_weights()
            self._advance(Step.ENGINES)
            await self._start_engines()
            self._advance(Step.CANARY)
            await self._check_engines()
            self._advance(Step.SERVING)
            await self._fleet.watch()
            raise StepFailed("no model is left: " + "; ".join(self._fleet.reasons))
        except StepFailed as failed:
            _log.error("%(step)s failed: %(reason)s", {"step": self.lifecycle.step, "reason": failed})
            self.lifecycle.advance(Step.FAILED, str(failed))
            server.should_exit = True
        except Exception as error:
            _log.error("%(step)s failed: %(kind)s", {"step": self.lifecycle.step, "kind": type(error).__name__})
            self.lifecycle.advance(Step.FAILED, type(error).__name__)
            server.should_exit = True

    def _advance(self, step: Step) -> None:
        self.lifecycle.advance(step)
        _log.info("%(step)s", {"step": step})

    async def _verify_own_evidence(self) -> None:
        nonce = os.urandom(32)
        try:
            await asyncio.to_thread(self._devices.refresh)
            document = await self._first_document(nonce)
            now = datetime.datetime.now(datetime.UTC)
            # The clients' verifier.
            policy = Policy.self_check(
                self._devices.cpu.provider, self._devices.cc_mode(), self._config.evidence.gpus != "none"
            )
            verify(document, nonce=nonce, policy=policy, trust=TrustRoots(), now=now)
        except (AttestationError, EvidenceUnavailable) as error:
            raise StepFailed(
                f"no evidence, or none that verifies: {error}. "
                "`adytum preflight` says what of this machine is not as it should be"
            ) from error

    async def _first_document(self, nonce: bytes) -> bytes:
        """Waits for certificates that the host does not give and the vendor's service does."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + _VENDOR_SECONDS
        while True:
            try:
                return await self._evidence.document(nonce)
            except EvidenceUnavailable as error:
                if not error.soon or loop.time() > deadline:
                    raise
            await asyncio.to_thread(self._devices.refresh)
            await asyncio.sleep(_VENDOR_PAUSE_S)

    async def _refresh(self) -> None:
        while True:
            await asyncio.sleep(_REFRESH_S)
            try:
                await asyncio.to_thread(self._devices.refresh)
            except Exception as error:
                # A fault of ours must not end the task: collateral would expire unnoticed.
                _log.error("refreshing the vendors' collateral failed: %(kind)s", {"kind": type(error).__name__})

    def _set_ready(self) -> None:
        try:
            self._devices.set_ready()
        except CollectionError as error:
            raise StepFailed(str(error)) from error

    async def _check_weights(self) -> None:
        for model in self._config.models:
            try:
                shown = Shown(model.id, self.lifecycle)
                storage = await asyncio.to_thread(check, self._folders[model.id], self._manifests[model.id], shown)
                level = logging.INFO if storage.protected else logging.WARNING
                _log.log(level, "%(model)s: %(storage)s", {"model": model.id, "storage": storage.says()})
            except WeightsError as error:
                raise StepFailed(
                    f"{model.id}: {error}. Restore the files, or make a new manifest with `adytum models lock` "
                    "and give clients its root"
                ) from error

    async def _start_engines(self) -> None:
        try:
            await self._fleet.begin()
        except EngineError as error:
            raise StepFailed(str(error)) from error

    async def _check_engines(self) -> None:
        await self._fleet.check()
        if not self._fleet.alive:
            raise StepFailed("no model passed its canary: " + "; ".join(self._fleet.reasons))

    async def _read_callers(self) -> None:
        file = self._callers_file
        if file is None:
            return
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, lambda: file.refresh(self._callers, force=True))
        while True:
            await asyncio.sleep(_CALLERS_S)
            file.refresh(self._callers)

    async def _rotate(self) -> None:
        while True:
            await asyncio.sleep(max(0.0, self._keys.rotate_at - time.time()))
            self._keys.refresh()

    def _claims(self) -> Claims:
        config = self._config
        return Claims(
            key_configurations=keyconfig.encode_list(self._keys.configurations),
            ehbp_key_configuration=self._keys.ehbp_configuration.encode(),
            receipt_key=self._notary.public_key,
            gateway_path=f"{GATEWAY_PATH}/{config.server.replica}",
            replica=config.server.replica,
            tls_spki_sha256=self._spki,
            models=tuple(
                ModelClaim(
                    id=model.id, task=model.task, aliases=model.aliases, weights_root=self._manifests[model.id].root
                )
                for model in config.models
            ),
            configuration_sha256=config.sha256,
            padding=config.channel.padding.value,
            sandbox=config.engines.sandbox,
            software_version=importlib.metadata.version("adytum"),
            cc_mode=self._devices.cc_mode(),
            issued_at=int(time.time()),
            keys_expire_at=int(self._keys.expires_at),
        )


def serve(config: Config) -> bool:
    """Runs a backend until a signal. Whether it ended well."""
    try:
        hygiene.clean_environment()
        hygiene.no_core_dumps()
        hygiene.no_swap(allowed=config.server.swap == "allowed")
        if not config.engines.python.exists():
            raise StepFailed(f"engines.python: {config.engines.python} is not there; `make engine-env` installs it")
        parts.open_files(config)
        parts.runtime_directory(config)
        parts.probe_sandbox(config)
        backend = Backend(config)
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(backend.run())
    except StepFailed as failed:
        _log.error("%(step)s failed: %(reason)s", {"step": Step.PREFLIGHT, "reason": failed})
        return False
