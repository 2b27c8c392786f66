"""Where everything is put together: `cloister serve`.

Start-up follows `lifecycle.NEXT`. The gateway listens from the first step on, so `/readyz` can tell the step, but
opens nothing before SERVING.
"""

import asyncio
import contextlib
import ctypes
import datetime
import importlib.metadata
import logging
import os
import resource
import signal
import socket
import ssl
import time
from collections.abc import Iterator
from pathlib import Path

import uvicorn
import uvloop

from attestation.collect import Collector
from attestation.devices import Devices
from attestation.errors import AttestationError, CollectionError
from attestation.evidence import Claims, ModelClaim
from attestation.policy import Policy
from attestation.trust import TrustRoots
from attestation.verify import verify
from inference.channel import keyconfig
from inference.config import Config, Model
from inference.engine.hub import HubError, resolve
from inference.engine.process import Engine, EngineError, EngineSpec
from inference.engine.weights import Manifest, WeightsError, check, lock
from inference.gateway import tls
from inference.gateway.admission import Admission
from inference.gateway.app import GATEWAY_PATH, create_gateway
from inference.gateway.engines import Engines
from inference.gateway.evidence import EvidenceService, EvidenceUnavailable
from inference.gateway.logs import names_only
from inference.gateway.sealed import SealedService
from inference.keys import KeyRing
from inference.lifecycle import Lifecycle, Step, StepFailed

_log = logging.getLogger("cloister")
_GRACE_S = 20
"""Streams in progress may end within this time after SIGTERM."""


_VENDOR_SECONDS, _VENDOR_PAUSE_S = 600.0, 1.0
"""How long the first evidence waits for certificates from a vendor; after a failure that is asked again in minutes."""
_REFRESH_S = 60.0
_PR_SET_DUMPABLE = 4
_KEEP_ALIVE_S = 75
"""Longer than most clients and balancers keep an idle connection, so that no request meets one that is closing."""


class Backend:
    """One backend: gateway and engines of one configuration."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self.lifecycle = Lifecycle()
        self._sockets = {model.id: _socket_path(config, model) for model in config.models}
        self._folders = {model.id: _folder(config, model) for model in config.models}
        self._manifests = {model.id: _manifest(model, self._folders[model.id]) for model in config.models}
        self._keys = KeyRing(time.time, config.channel.key_lifetime_s, config.channel.key_overlap_s)
        self._tls, self._spki = _tls(config)
        self._devices = _devices(config)
        self._evidence = EvidenceService(
            Collector(self._devices.cpu, self._devices.gpus, self._devices.endorsements),
            self._claims,
            interval=config.evidence.interval_s,
            round_nonces=config.evidence.round_nonces,
            clients=config.evidence.max_clients,
        )
        self._engines: list[Engine] = []

    async def run(self) -> bool:
        """Serves until a signal or a failed step. Whether it ended well."""
        config = self._config
        names_only(asyncio.get_running_loop())
        pool = Engines(self._sockets)
        admission = Admission(config)
        gateway = create_gateway(
            replica=config.server.replica,
            padding=config.channel.padding,
            lifecycle=self.lifecycle,
            keys=self._keys,
            evidence=self._evidence,
            admission=admission,
            sealed=SealedService(
                self._keys,
                admission,
                pool,
                max_requests=config.server.max_requests,
                request_seconds=config.server.request_seconds,
            ),
        )
        server = _Server(gateway, config, self._tls)
        starting = asyncio.create_task(self._start(server))
        rotating = asyncio.create_task(self._rotate())
        refreshing = asyncio.create_task(self._refresh())
        try:
            await server.serve(sockets=[_listen(config.server.host, config.server.port)])
        finally:
            if self.lifecycle.serving:
                self.lifecycle.advance(Step.DRAINING)
            for task in (starting, rotating, refreshing):
                task.cancel()
            await asyncio.gather(starting, rotating, refreshing, return_exceptions=True)
            pool.close()
            await asyncio.gather(*(engine.stop() for engine in self._engines))
        return self.lifecycle.step is not Step.FAILED

    async def _start(self, server: "_Server") -> None:
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
            self._advance(Step.SERVING)
        except StepFailed as failed:
            _log.error("%s failed: %s", self.lifecycle.step, failed)
            self.lifecycle.advance(Step.FAILED, str(failed))
            server.should_exit = True
        except Exception as error:
            _log.error("%s failed: %s", self.lifecycle.step, type(error).__name__)
            self.lifecycle.advance(Step.FAILED, type(error).__name__)
            server.should_exit = True

    def _advance(self, step: Step) -> None:
        self.lifecycle.advance(step)
        _log.info("%s", step)

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
                "`cloister preflight` says what of this machine is not as it should be"
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
                _log.error("refreshing the vendors' collateral failed: %s", type(error).__name__)

    def _set_ready(self) -> None:
        try:
            self._devices.set_ready()
        except CollectionError as error:
            raise StepFailed(str(error)) from error

    async def _check_weights(self) -> None:
        for model in self._config.models:
            try:
                await asyncio.to_thread(check, self._folders[model.id], self._manifests[model.id])
            except WeightsError as error:
                raise StepFailed(
                    f"{model.id}: {error}. Restore the files, or make a new manifest with `cloister models lock` "
                    "and give clients its root"
                ) from error

    async def _start_engines(self) -> None:
        self._engines = [Engine(self._engine_spec(model)) for model in self._config.models]
        try:
            for engine in self._engines:
                await engine.start()
            await asyncio.gather(*(engine.wait_ready(self._config.engines.ready_seconds) for engine in self._engines))
        except EngineError as error:
            raise StepFailed(str(error)) from error

    def _engine_spec(self, model: Model) -> EngineSpec:
        engines = self._config.engines
        socket_path = self._sockets[model.id]
        return EngineSpec(
            id=model.id,
            aliases=model.aliases,
            model=str(self._folders[model.id]),
            task=model.task,
            python=engines.python.absolute(),
            socket=socket_path,
            log=socket_path.with_suffix(".log"),
            arguments=model.arguments,
            kv_cache_bytes=model.kv_cache_bytes,
            tool_parser=model.tool_parser,
            device=engines.device,
            private_network=engines.sandbox == "full",
        )

    async def _rotate(self) -> None:
        while True:
            await asyncio.sleep(max(0.0, self._keys.rotate_at - time.time()))
            self._keys.rotate()

    def _claims(self) -> Claims:
        config = self._config
        return Claims(
            key_configurations=keyconfig.encode_list(self._keys.configurations),
            ehbp_key_configuration=self._keys.ehbp_configuration.encode(),
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
            software_version=importlib.metadata.version("cloister"),
            cc_mode=self._devices.cc_mode(),
            issued_at=int(time.time()),
            keys_expire_at=int(self._keys.expires_at),
        )


class _Server(uvicorn.Server):
    """uvicorn that leaves the process's end to us: engines have to be stopped after a signal."""

    def __init__(self, app: object, config: Config, context: ssl.SSLContext | None) -> None:
        super().__init__(
            uvicorn.Config(
                app,  # type: ignore[arg-type]
                loop="uvloop",
                http="httptools",
                ws="none",
                lifespan="off",
                access_log=False,
                log_config=None,
                server_header=False,
                proxy_headers=False,
                timeout_graceful_shutdown=_GRACE_S,
                timeout_keep_alive=_KEEP_ALIVE_S,
            )
        )
        self._context = context

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        self.config.load()
        # A key that exists in memory only has no path to give to uvicorn.
        self.config.ssl = self._context
        await super().serve(sockets)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._stop)
        yield

    def _stop(self) -> None:
        self.force_exit = self.should_exit  # A second signal does not wait for streams.
        self.should_exit = True


def _listen(host: str, port: int) -> socket.socket:
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise StepFailed(
            f"cannot listen on {host} port {port} ({error.strerror}): choose another server.port"
        ) from error


def _socket_path(config: Config, model: Model) -> Path:
    name = "".join(c if c.isalnum() else "-" for c in model.id)
    return config.engines.runtime_directory.absolute() / f"{name}.sock"


def _folder(config: Config, model: Model) -> Path:
    try:
        return resolve(model.source, model.revision, config.engines.python, config.engines.runtime_directory / "models")
    except HubError as error:
        raise StepFailed(f"{model.id}: {error}") from error


def _manifest(model: Model, folder: Path) -> Manifest:
    try:
        return Manifest.load(model.manifest) if model.manifest is not None else lock(folder)
    except WeightsError as error:
        raise StepFailed(f"{model.id}: {error}") from error


def _devices(config: Config) -> Devices:
    try:
        return Devices.of(config.evidence.cpu, config.evidence.gpus)
    except CollectionError as error:
        raise StepFailed(f"evidence.cpu or evidence.gpus: {error}") from error


def _tls(config: Config) -> tuple[ssl.SSLContext | None, bytes | None]:
    if config.tls.mode == "off":
        return None, None
    if config.tls.mode == "generated":
        return tls.generated(config.tls.names, datetime.datetime.now(datetime.UTC))
    assert config.tls.certificate is not None
    assert config.tls.key is not None
    try:
        return tls.from_files(config.tls.certificate, config.tls.key)
    except (OSError, ValueError) as error:
        raise StepFailed(f"tls.certificate or tls.key cannot be used: {error}") from error


def _no_core_dumps() -> None:
    """A core dump of this process would hold keys and requests."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # The limit does not hold where core_pattern is a pipe; this does.
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0) != 0:
        raise StepFailed("the kernel does not let this process refuse core dumps (PR_SET_DUMPABLE)")


def serve(config: Config) -> bool:
    """Runs a backend until a signal. Whether it ended well."""
    try:
        _no_core_dumps()
        if not config.engines.python.exists():
            raise StepFailed(f"engines.python: {config.engines.python} is not there; `make engine-env` installs it")
        backend = Backend(config)
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(backend.run())
    except StepFailed as failed:
        _log.error("%s failed: %s", Step.PREFLIGHT, failed)
        return False
