"""`adytum models canary`: starts a configuration's engines and keeps what they answer as golden."""

import asyncio

from adytum.inference.backend import parts
from adytum.inference.core.config import Config, Model
from adytum.inference.engine.run.process import Engine, EngineSpec
from adytum.inference.engine.supervise import canary


async def make_golden(config: Config, chosen: frozenset[str], *, missing: bool) -> list[str]:
    """Writes the golden answers of the chosen models, or of all; one line for each. On a GPU one after another.

    `missing`: only where there are none for the model's weights.

    Raises `StepFailed`, `EngineError`, `CanaryFailed` or `OSError`.
    """
    models = [model for model in config.models if not chosen or model.id in chosen]
    if missing:
        models = [model for model in models if not _there(config, model)]
    if not models:
        return []
    folders = {model.id: parts.folder(config, model) for model in config.models}
    specs = parts.engine_specs(config, folders, parts.devices(config))
    if config.engines.device == "cuda":
        return [await _make(config, model, specs[model.id]) for model in models]
    made = await asyncio.gather(*(_make(config, model, specs[model.id]) for model in models), return_exceptions=True)
    for result in made:
        if isinstance(result, BaseException):
            raise result
    return [result for result in made if isinstance(result, str)]


def _there(config: Config, model: Model) -> bool:
    root = parts.manifest(model, parts.folder(config, model)).root
    try:
        canary.Golden.load(parts.canary_path(model), root)
    except canary.CanaryFailed:
        return False
    return True


async def _make(config: Config, model: Model, spec: EngineSpec) -> str:
    root = parts.manifest(model, parts.folder(config, model)).root
    engine = Engine(spec)
    try:
        await engine.start()
        await engine.wait_ready(config.engines.ready_seconds)
        golden = await canary.make(spec.socket, model.id, model.task, root, config.engines.device, parts.CANARY_SECONDS)
    finally:
        await engine.stop()
    path = parts.canary_path(model)
    golden.save(path)
    return f"{model.id}: {path}"
