"""`adytum models canary`: starts a configuration's engines and keeps their answers as the golden ones."""

import asyncio

from adytum.inference.backend.models import CANARY_SECONDS, canary_path, folder, manifest, specs
from adytum.inference.backend.parts import devices_of
from adytum.inference.core.config import Config, Model
from adytum.inference.engine.run.process import Engine, EngineSpec
from adytum.inference.engine.supervise import canary


async def make_golden(config: Config, chosen: frozenset[str], *, missing: bool) -> list[str]:
    """Writes the golden answers of the chosen models, or of all if `chosen` is empty. On a GPU one after another.

    `missing`: only of models that have none for their weights. Returns one line for each model.

    Raises `StepFailed`, `EngineError`, `CanaryFailed` or `OSError`.
    """
    models = [model for model in config.models if not chosen or model.id in chosen]
    if missing:
        models = [model for model in models if not _exist(config, model)]
    if not models:
        return []
    folders = {model.id: folder(config, model) for model in config.models}
    found = specs(config, folders, devices_of(config))
    if config.engines.device == "cuda":
        return [await _make(config, model, found[model.id]) for model in models]
    made = await asyncio.gather(*(_make(config, model, found[model.id]) for model in models), return_exceptions=True)
    for result in made:
        if isinstance(result, BaseException):
            raise result
    return [result for result in made if isinstance(result, str)]


def _exist(config: Config, model: Model) -> bool:
    """Whether there are golden answers for the model's weights."""
    root = manifest(model, folder(config, model)).root
    try:
        canary.Golden.load(canary_path(model), root)
    except canary.CanaryFailed:
        return False
    return True


async def _make(config: Config, model: Model, spec: EngineSpec) -> str:
    root = manifest(model, folder(config, model)).root
    engine = Engine(spec)
    try:
        await engine.start()
        await engine.wait_ready(config.engines.ready_seconds)
        golden = await canary.make(spec.socket, model.id, model.task, root, config.engines.device, CANARY_SECONDS)
    finally:
        await engine.stop()
    path = canary_path(model)
    golden.save(path)
    return f"{model.id}: {path}"
