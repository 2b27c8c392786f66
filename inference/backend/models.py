"""A configuration's models: their folders and manifests, how their engines are started and checked.

Each function raises `StepFailed` if the configuration or the files do not allow it.
"""

from collections.abc import Mapping
from pathlib import Path

from adytum.attestation.collect.devices import Devices
from adytum.attestation.core.errors import CollectionError
from adytum.inference.core.config import Config, Model
from adytum.inference.core.lifecycle import StepFailed
from adytum.inference.engine.placement.placement import PlacementError, memory_of, plan
from adytum.inference.engine.placement.shapes import ShapeError, read
from adytum.inference.engine.run import cc_settings
from adytum.inference.engine.run.process import EngineSpec
from adytum.inference.engine.supervise.canary import CanaryFailed, Golden, check
from adytum.inference.engine.supervise.fleet import Fleet
from adytum.inference.engine.supervise.supervisor import Canary, Gate, Supervisor, Timing
from adytum.inference.engine.weights.hub import HubError, resolve
from adytum.inference.engine.weights.weights import CANARY, Manifest, WeightsError, lock

CANARY_SECONDS = 120.0
"""For one request of the canary."""
_CPU_SEQUENCES = 64
"""On a CPU: enough for the demo and its benchmark."""


def socket_path(config: Config, model: Model) -> Path:
    """Where the model's engine listens."""
    name = "".join(c if c.isalnum() else "-" for c in model.id)
    # A directory of its own: an engine does not see the others' sockets.
    return config.engines.runtime_directory.absolute() / name / "engine.sock"


def folder(config: Config, model: Model) -> Path:
    """The model's folder, fetched from the hub if it is not on this machine."""
    try:
        return resolve(model.source, model.revision, config.engines.python, config.engines.runtime_directory / "models")
    except HubError as error:
        raise StepFailed(f"{model.id}: {error}") from error


def manifest(model: Model, folder: Path) -> Manifest:
    """What the folder must hold; without a configured manifest, what it holds now."""
    try:
        return Manifest.load(model.manifest) if model.manifest is not None else lock(folder)
    except WeightsError as error:
        raise StepFailed(f"{model.id}: {error}") from error


def fleet(
    config: Config, folders: Mapping[str, Path], manifests: Mapping[str, Manifest], devices: Devices, gate: Gate
) -> Fleet:
    """The engines of all models, not started."""
    engines = config.engines
    found = specs(config, folders, devices)
    timing = Timing(engines.ready_seconds, engines.hung_seconds, engines.canary_seconds)
    return Fleet(
        [
            Supervisor(found[model.id], _canary(config, model, manifests[model.id]), gate, timing)
            for model in config.models
        ],
        one_by_one=engines.device == "cuda",
    )


def specs(config: Config, folders: Mapping[str, Path], devices: Devices) -> dict[str, EngineSpec]:
    """By model id, how its engine is started."""
    environment, placement = _environment(config, devices), _placements(config, folders)
    return {
        model.id: _spec(config, model, folders[model.id], placement[model.id], environment) for model in config.models
    }


def _environment(config: Config, devices: Devices) -> Mapping[str, str]:
    """The variables that confidential computing needs. Refuses arguments that it does not allow."""
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


def _placements(config: Config, folders: Mapping[str, Path]) -> dict[str, tuple[str, ...]]:
    """By model id, the arguments that divide the memory: on a GPU the plan's, on a CPU the configuration's."""
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


def _spec(
    config: Config, model: Model, folder: Path, placement: tuple[str, ...], environment: Mapping[str, str]
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
        environment=environment,
        tool_parser=model.tool_parser,
        device=engines.device,
        sandbox=engines.sandbox == "full",
        user=engines.first_user + config.models.index(model),
        devices=_gpu_devices(engines.gpu_index) if engines.device == "cuda" else (),
    )


def _gpu_devices(index: int) -> tuple[Path, ...]:
    """The device files that CUDA opens for one GPU, those of them that exist."""
    names = ["nvidiactl", "nvidia-uvm", "nvidia-uvm-tools", f"nvidia{index}"]
    capabilities = sorted(Path("/dev/nvidia-caps").glob("nvidia-cap*"))
    return tuple(path for path in (*(Path("/dev", name) for name in names), *capabilities) if path.exists())


def canary_path(model: Model) -> Path:
    """The file of a model's golden answers: beside its manifest, or in its folder."""
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
