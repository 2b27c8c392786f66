"""`adytum serve` from the first check to the end, in the order in which it happens.

1. `serve` checks the process and the machine, and has the parts made (`parts`).
2. `_run` listens. The gateway answers from here on, so `/readyz` shows the step, but it opens nothing before SERVING.
3. `_STEPS` lists the work of each step in the backend's life (`lifecycle.NEXT`). A step that fails ends the backend.
4. `_BESIDE` lists the tasks that run beside the steps, to the end.
"""

import asyncio
import datetime
import logging
import os
import signal
import time
from collections.abc import Awaitable, Callable

import uvloop

from adytum.attestation.core.errors import AttestationError, CollectionError
from adytum.attestation.core.trust import TrustRoots
from adytum.attestation.policy.policy import Policy
from adytum.attestation.verifier.document import verify
from adytum.inference.backend import hygiene, machine
from adytum.inference.backend.parts import Parts
from adytum.inference.backend.progress import Shown
from adytum.inference.core.config import Config
from adytum.inference.core.lifecycle import Step, StepFailed
from adytum.inference.core.logs import names_only
from adytum.inference.engine.run.process import EngineError
from adytum.inference.engine.weights.weights import WeightsError, check
from adytum.inference.gateway.accounting.telemetry import MetricsServer
from adytum.inference.gateway.edge.evidence import EvidenceUnavailable
from adytum.inference.gateway.edge.server import GatewayServer, listen

_log = logging.getLogger("adytum")
_VENDOR_SECONDS, _VENDOR_PAUSE_S = 600.0, 1.0
"""How long the first evidence waits for a vendor's certificates, and the pause between two tries."""
_REFRESH_S = 60.0
_CALLERS_S = 2.0
"""Between two looks at the list of callers."""


def serve(config: Config) -> bool:
    """Runs a backend until a signal. Returns whether it ended well."""
    try:
        hygiene.clean_environment()
        hygiene.no_core_dumps()
        hygiene.no_swap(allowed=config.server.swap == "allowed")
        machine.check_engine_environment(config)
        machine.raise_open_files(config)
        machine.make_runtime_directory(config)
        machine.probe_sandbox(config)
        parts = Parts.of(config)
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(_run(parts))
    except StepFailed as failed:
        _log.error("%(step)s failed: %(reason)s", {"step": Step.PREFLIGHT, "reason": failed})
        return False


async def _run(parts: Parts) -> bool:
    """Serves until a signal or a failed step. Returns whether it ended well."""
    names_only(asyncio.get_running_loop())
    config = parts.config
    server = GatewayServer(
        parts.gateway,
        parts.tls,
        guard=parts.guard,
        drain_seconds=config.server.drain_seconds,
        draining=lambda: _drain(parts),
        cut=lambda: _cut(parts),
    )
    metrics = await _metrics(parts)
    tasks = [asyncio.create_task(_start(parts, server)), *(asyncio.create_task(task(parts)) for task in _BESIDE)]
    try:
        await server.serve(sockets=[listen(config.server.host, config.server.port)])
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if metrics is not None:
            await metrics.stop()
        parts.pool.close()
        await parts.fleet.stop()
        if parts.records is not None:
            parts.records.close()
    return parts.lifecycle.step is not Step.FAILED


async def _metrics(parts: Parts) -> MetricsServer | None:
    port = parts.config.telemetry.port
    if port is None:
        return None
    metrics = MetricsServer(parts.telemetry, port)
    try:
        await metrics.start()
    except OSError as error:
        raise StepFailed(f"telemetry.port {port}: {error.strerror}") from error
    return metrics


async def _start(parts: Parts, server: GatewayServer) -> None:
    """Goes through `_STEPS`. Ends the server when one fails."""
    try:
        for step, work in _STEPS:
            _advance(parts, step)
            if work is not None:
                await work(parts)
    except StepFailed as failed:
        _log.error("%(step)s failed: %(reason)s", {"step": parts.lifecycle.step, "reason": failed})
        _fail(parts, server)
    except Exception as error:
        _log.error("%(step)s failed: %(kind)s", {"step": parts.lifecycle.step, "kind": type(error).__name__})
        _fail(parts, server)


def _fail(parts: Parts, server: GatewayServer) -> None:
    parts.lifecycle.advance(Step.FAILED)
    server.should_exit = True


def _drain(parts: Parts) -> None:
    if parts.lifecycle.serving:
        _advance(parts, Step.DRAINING)


def _cut(parts: Parts) -> None:
    """Ends the answers in progress. Their clients get a sealed error."""
    for name in parts.folders:
        parts.pool.shut(name)


def _advance(parts: Parts, step: Step) -> None:
    parts.lifecycle.advance(step)
    _log.info("%(step)s", {"step": step})


# The steps' work, in their order.


async def _verify_own_evidence(parts: Parts) -> None:
    nonce = os.urandom(32)
    devices = parts.devices
    try:
        await asyncio.to_thread(devices.refresh)
        document = await _first_document(parts, nonce)
        now = datetime.datetime.now(datetime.UTC)
        # The clients' verifier.
        policy = Policy.self_check(devices.cpu.provider, devices.cc_mode(), parts.config.evidence.gpus != "none")
        verify(document, nonce=nonce, policy=policy, trust=TrustRoots(), now=now)
    except (AttestationError, EvidenceUnavailable) as error:
        raise StepFailed(
            f"no evidence, or none that verifies: {error}. `adytum preflight` shows what is wrong with this machine"
        ) from error


async def _first_document(parts: Parts, nonce: bytes) -> bytes:
    """Waits for certificates that the host does not supply and the vendor's service does."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + _VENDOR_SECONDS
    while True:
        try:
            return await parts.evidence.document(nonce)
        except EvidenceUnavailable as error:
            if not error.soon or loop.time() > deadline:
                raise
        await asyncio.to_thread(parts.devices.refresh)
        await asyncio.sleep(_VENDOR_PAUSE_S)


async def _set_gpus_ready(parts: Parts) -> None:
    try:
        await asyncio.to_thread(parts.devices.set_ready)
    except CollectionError as error:
        raise StepFailed(str(error)) from error


async def _check_weights(parts: Parts) -> None:
    for name, folder in parts.folders.items():
        try:
            storage = await asyncio.to_thread(check, folder, parts.manifests[name], Shown(name, parts.lifecycle))
        except WeightsError as error:
            raise StepFailed(
                f"{name}: {error}. Restore the files, or make a new manifest with `adytum models lock` "
                "and give clients its root"
            ) from error
        level = logging.INFO if storage.protected else logging.WARNING
        _log.log(level, "%(model)s: %(storage)s", {"model": name, "storage": storage.says()})


async def _start_engines(parts: Parts) -> None:
    try:
        await parts.fleet.begin()
    except EngineError as error:
        raise StepFailed(str(error)) from error


async def _check_engines(parts: Parts) -> None:
    await parts.fleet.check()
    if not parts.fleet.alive:
        raise StepFailed("no model passed its canary: " + "; ".join(parts.fleet.reasons))


async def _watch_engines(parts: Parts) -> None:
    await parts.fleet.watch()
    raise StepFailed("no model is left: " + "; ".join(parts.fleet.reasons))


_STEPS: tuple[tuple[Step, Callable[[Parts], Awaitable[None]] | None], ...] = (
    (Step.KEYS, None),  # Made with the parts.
    (Step.EVIDENCE, _verify_own_evidence),
    (Step.SELF_VERIFIED, None),  # Evidence is shown from here on.
    (Step.GPU_READY, _set_gpus_ready),
    (Step.WEIGHTS, _check_weights),
    (Step.ENGINES, _start_engines),
    (Step.CANARY, _check_engines),
    (Step.SERVING, _watch_engines),
)


# The tasks beside them.


async def _rotate_keys(parts: Parts) -> None:
    while True:
        await asyncio.sleep(max(0.0, parts.keys.rotate_at - time.time()))
        parts.keys.refresh()


async def _refresh_collateral(parts: Parts) -> None:
    while True:
        await asyncio.sleep(_REFRESH_S)
        try:
            await asyncio.to_thread(parts.devices.refresh)
        except Exception as error:
            # A fault of ours must not end the task: collateral would expire unnoticed.
            _log.error("refreshing the vendors' collateral failed: %(kind)s", {"kind": type(error).__name__})


async def _reread_callers(parts: Parts) -> None:
    """Looks at the signed list, if there is one, every few seconds and on SIGHUP."""
    file = parts.callers_file
    if file is None:
        return
    asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, lambda: file.refresh(parts.callers, force=True))
    while True:
        await asyncio.sleep(_CALLERS_S)
        file.refresh(parts.callers)


_BESIDE = (_rotate_keys, _refresh_collateral, _reread_callers)
