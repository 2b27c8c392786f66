"""All engines of a backend: started in order, checked, watched, stopped."""

import asyncio
import logging
from collections.abc import Sequence

from adytum.inference.engine.run.process import EngineError
from adytum.inference.engine.supervise.supervisor import State, Supervisor

_log = logging.getLogger("adytum.engine")


class Fleet:
    """The supervisors of all models. `one_by_one`: each engine starts only when the previous one is ready. Engines that
    share a GPU need this, because vLLM measures the free memory while it starts."""

    def __init__(self, supervisors: Sequence[Supervisor], *, one_by_one: bool) -> None:
        self._supervisors = tuple(supervisors)
        self._one_by_one = one_by_one

    @property
    def states(self) -> dict[str, str]:
        """State by model id."""
        return {supervisor.spec.id: supervisor.state.value for supervisor in self._supervisors}

    @property
    def restarts(self) -> dict[str, int]:
        """Starts of each model's engine after the first."""
        return {supervisor.spec.id: supervisor.restarts for supervisor in self._supervisors}

    @property
    def numbers(self) -> dict[str, dict[str, float]]:
        """What each live engine last reported of itself."""
        return {supervisor.spec.id: supervisor.numbers for supervisor in self._supervisors}

    @property
    def reasons(self) -> list[str]:
        """Why each failed model failed."""
        return [item.reason for item in self._supervisors if item.state is State.FAILED]

    @property
    def alive(self) -> bool:
        """Whether any model is live or can become live again."""
        return any(item.state not in (State.FAILED, State.STOPPED) for item in self._supervisors)

    async def begin(self) -> None:
        """Starts all engines. Raises `EngineError` for the first that does not come up."""
        if self._one_by_one:
            for supervisor in self._supervisors:
                await supervisor.begin()
            return
        # A plain `gather` would not wait for the other starts.
        async with asyncio.TaskGroup() as group:
            starts = [group.create_task(_caught(supervisor)) for supervisor in self._supervisors]
        for start in starts:
            if (error := start.result()) is not None:
                raise error

    async def check(self) -> None:
        """Runs every canary; failed models are closed. One after another if the engines start that way."""
        if self._one_by_one:
            for supervisor in self._supervisors:
                await supervisor.check()
        else:
            await asyncio.gather(*(supervisor.check() for supervisor in self._supervisors))

    async def watch(self) -> None:
        """Keeps the engines live. Returns when no model is left."""
        async with asyncio.TaskGroup() as group:
            for supervisor in self._supervisors:
                group.create_task(_watch(supervisor))

    async def stop(self) -> None:
        """Ends all engines."""
        await asyncio.gather(*(supervisor.stop() for supervisor in self._supervisors))


async def _caught(supervisor: Supervisor) -> EngineError | None:
    try:
        await supervisor.begin()
    except EngineError as error:
        return error
    return None


async def _watch(supervisor: Supervisor) -> None:
    try:
        await supervisor.watch()
    except Exception as error:
        # A fault of ours takes this model down, and no other.
        _log.critical(
            "%(model)s is not watched any more: %(kind)s", {"model": supervisor.spec.id, "kind": type(error).__name__}
        )
        supervisor.reason = type(error).__name__
        await supervisor.stop(grace=0)
        supervisor.state = State.FAILED
