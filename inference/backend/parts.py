"""The parts of a backend, made from its configuration. Each raises `StepFailed` where a part cannot be made."""

import datetime
import resource
import ssl
import subprocess
import time
from pathlib import Path

from adytum.attestation.collect.devices import Devices
from adytum.attestation.core.errors import CollectionError
from adytum.inference.core.config import Config, Model
from adytum.inference.core.lifecycle import StepFailed
from adytum.inference.engine.placement.placement import PlacementError, memory_of, plan
from adytum.inference.engine.placement.shapes import ShapeError, read
from adytum.inference.engine.run import cc_settings
from adytum.inference.engine.run.process import LAUNCHER, EngineSpec
from adytum.inference.engine.supervise.canary import CanaryFailed, Golden, check
from adytum.inference.engine.supervise.fleet import Fleet
from adytum.inference.engine.supervise.supervisor import Canary, Gate, Supervisor, Timing
from adytum.inference.engine.weights.hub import HubError, resolve
from adytum.inference.engine.weights.weights import CANARY, Manifest, WeightsError, lock
from adytum.inference.gateway.callers.callers import Caller, Callers, CallersError, SignedFile
from adytum.inference.gateway.edge import tls

CANARY_SECONDS = 120.0
"""For one request of the canary."""
_OTHER_FILES = 512
_CPU_SEQUENCES = 64
"""Enough for the demo and its benchmark."""


def socket_path(config: Config, model: Model) -> Path:
    """Where the model's engine listens."""
    name = "".join(c if c.isalnum() else "-" for c in model.id)
    # A directory of its own: an engine does not see the others' sockets.
    return config.engines.runtime_directory.absolute() / name / "engine.sock"


def folder(config: Config, model: Model) -> Path:
    """The model's folder, fetched from the hub where it is not here."""
    try:
        return resolve(model.source, model.revision, config.engines.python, config.engines.runtime_directory / "models")
    except HubError as error:
        raise StepFailed(f"{model.id}: {error}") from error


def manifest(model: Model, folder: Path) -> Manifest:
    """What the folder must hold; without a manifest, what it holds now."""
    try:
        return Manifest.load(model.manifest) if model.manifest is not None else lock(folder)
    except WeightsError as error:
        raise StepFailed(f"{model.id}: {error}") from error


def devices(config: Config) -> Devices:
    """What signs the evidence."""
    try:
        return Devices.of(config.evidence.cpu, config.evidence.gpus)
    except CollectionError as error:
        raise StepFailed(f"evidence.cpu or evidence.gpus: {error}") from error


def tls_context(config: Config) -> tuple[ssl.SSLContext | None, bytes | None]:
    """The outer connection's context and the SHA-256 of its public key; neither without TLS."""
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


def engine_specs(config: Config, folders: dict[str, Path], devices: Devices) -> dict[str, EngineSpec]:
    """How each model's engine is started."""
    settings, placement = _settings(config, devices), placements(config, folders)
    return {
        model.id: _engine_spec(config, model, folders[model.id], placement[model.id], settings)
        for model in config.models
    }


def _engine_spec(
    config: Config, model: Model, folder: Path, placement: tuple[str, ...], settings: dict[str, str]
) -> EngineSpec:
    engines = config.engines
    path = socket_path(config, model)
    return EngineSpec(
        id=model.id,
        aliases=model.aliases,
        model=str(folder),
        task=model.task,
        python=engines.python.absolute(),
        socket=path,
        log=path.parent.with_suffix(".log"),
        arguments=model.arguments,
        placement=placement,
        environment=settings,
        tool_parser=model.tool_parser,
        device=engines.device,
        sandbox=engines.sandbox == "full",
        user=engines.first_user + config.models.index(model),
        devices=_gpu_devices(engines.gpu_index) if engines.device == "cuda" else (),
    )


def _gpu_devices(index: int) -> tuple[Path, ...]:
    """What CUDA opens for one GPU; only those that are there."""
    names = ["nvidiactl", "nvidia-uvm", "nvidia-uvm-tools", f"nvidia{index}"]
    capabilities = sorted(Path("/dev/nvidia-caps").glob("nvidia-cap*"))
    return tuple(path for path in (*(Path("/dev", name) for name in names), *capabilities) if path.exists())


def runtime_directory(config: Config) -> None:
    """Makes the folder of sockets and logs, for this user only."""
    folder = config.engines.runtime_directory
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        folder.chmod(0o700)
    except OSError as error:
        raise StepFailed(f"engines.runtime_directory: {folder}: {error.strerror}") from error


def callers_file(config: Config) -> SignedFile | None:
    """The signed list of callers, where there is one."""
    if config.callers.file is None or config.callers.signed_by is None:
        return None
    return SignedFile(config.callers.file, bytes.fromhex(config.callers.signed_by))


def callers(config: Config, file: SignedFile | None) -> Callers:
    """Who may ask."""
    found: tuple[Caller, ...] | None = None
    serial = 0
    if config.callers.authentication == "keys":
        found = tuple(Caller(name=digest[:12], key_sha256=digest) for digest in sorted(config.callers.key_sha256))
    if file is not None:
        try:
            listed = file.load()
        except CallersError as error:
            raise StepFailed(f"callers.file: {config.callers.file}: {error}") from error
        found, serial = listed.caller, listed.serial
    return Callers(found, clock=time.time, monotonic=time.monotonic, serial=serial)


def open_files(config: Config) -> None:
    """Raises the limit of open files to what the configured connections need. Raises `StepFailed`."""
    needed = config.server.max_connections + sum(model.max_requests for model in config.models) + _OTHER_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise StepFailed(
            f"server.max_connections = {config.server.max_connections} needs {needed} open files, and the limit is "
            f"{hard}: raise it (LimitNOFILE= in the unit, ulimit -n in a shell), or lower max_connections"
        )
    if soft != resource.RLIM_INFINITY and soft < needed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def probe_sandbox(config: Config) -> None:
    """Tries the sandbox, so that a kernel that refuses it is known before anything else. Raises `StepFailed`."""
    if config.engines.sandbox == "none":
        return
    command = [str(config.engines.python), "-P", str(LAUNCHER), "--probe"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, env={}, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise StepFailed(f"{config.engines.python} cannot be run: {error}") from error
    if done.returncode != 0:
        said = done.stderr.strip().splitlines() or ["no reason given"]
        raise StepFailed(f'{said[-1]} Or set engines.sandbox = "none", which the evidence shows')


def placements(config: Config, folders: dict[str, Path]) -> dict[str, tuple[str, ...]]:
    """By model, the arguments that divide the memory: on a GPU the plan's, on a CPU the configuration's."""
    if config.engines.device == "cpu":
        return {model.id: _on_cpu(model) for model in config.models}
    if config.engines.gpu_memory is None:
        raise StepFailed('engines.gpu_memory is missing: write the GPU\'s size, like "80GB"')
    try:
        shapes = {model.id: read(folders[model.id]) for model in config.models}
        planned = plan(config, shapes, memory_of(config.engines.gpu_memory), config.engines.plan_length)
    except (PlacementError, ShapeError) as error:
        raise StepFailed(f"the models cannot be placed: {error}") from error
    return {engine.id: engine.flags for engine in planned.engines}


def _on_cpu(model: Model) -> tuple[str, ...]:
    flags: list[str] = []
    if model.kv_cache_bytes is not None:
        flags += ["--kv-cache-memory-bytes", str(model.kv_cache_bytes)]
    if model.kv_cache_dtype != "auto":
        flags += ["--kv-cache-dtype", model.kv_cache_dtype]
    if model.max_model_len is not None:
        flags += ["--max-model-len", str(model.max_model_len)]
    return (*flags, "--max-num-seqs", str(model.max_num_seqs or _CPU_SEQUENCES))


def _settings(config: Config, devices: Devices) -> dict[str, str]:
    try:
        confidential = cc_settings.confidential(config.evidence.cpu, devices.cc_mode())
    except CollectionError as error:
        raise StepFailed(str(error)) from error
    if confidential:
        for model in config.models:
            try:
                cc_settings.refuse(model.arguments)
            except cc_settings.ForbiddenFlag as error:
                raise StepFailed(f"{model.id}: {error}") from error
    return cc_settings.environment(confidential)


def fleet(
    config: Config, folders: dict[str, Path], manifests: dict[str, Manifest], devices: Devices, gate: Gate
) -> Fleet:
    """The engines, not started."""
    engines = config.engines
    specs = engine_specs(config, folders, devices)
    timing = Timing(engines.ready_seconds, engines.hung_seconds, engines.canary_seconds)
    return Fleet(
        [
            Supervisor(
                specs[model.id],
                _canary(config, model, manifests[model.id]),
                gate,
                timing,
            )
            for model in config.models
        ],
        one_by_one=engines.device == "cuda",
    )


def canary_path(model: Model) -> Path:
    """Where a model's golden answers are: beside its manifest, or in its folder."""
    return (model.manifest.parent if model.manifest is not None else Path(model.source)) / CANARY


def _canary(config: Config, model: Model, manifest: Manifest) -> Canary | None:
    if config.engines.canary == "off":
        return None
    path = canary_path(model)
    try:
        golden = Golden.load(path, manifest.root)
    except CanaryFailed as error:
        raise StepFailed(
            f"{model.id}: {error}. `adytum models canary` makes the golden answers; make them where you trust the "
            'weights and the machine, or set engines.canary = "off"'
        ) from error
    if golden.device != config.engines.device:
        raise StepFailed(
            f"{model.id}: {path} was made on {golden.device}, and the engines run on {config.engines.device}: make the "
            "golden answers there"
        )
    socket = socket_path(config, model)
    return lambda: check(socket, model.id, golden, CANARY_SECONDS)
