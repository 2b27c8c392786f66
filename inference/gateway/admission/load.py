"""How much each model's engine may have at a time. More is refused before the engine is asked.

A request that waits in an engine's queue for longer than its client waits is wasted, and nothing on this side bounds
the queue's memory.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from adytum.inference.core.config import Model
from adytum.inference.gateway.admission.admission import EngineCall
from adytum.inference.gateway.failures import RETRY_AFTER_S, Refusal, Refused


class Load:
    """Counts the requests and tokens that the engines have. The tokens are upper bounds (`EngineCall.tokens`)."""

    def __init__(self, models: tuple[Model, ...]) -> None:
        self._models = {model.id: model for model in models}
        self.requests = dict.fromkeys(self._models, 0)
        self.tokens = dict.fromkeys(self._models, 0)

    @contextmanager
    def holding(self, call: EngineCall) -> Iterator[None]:
        """Counts a request while it lasts. Raises `Refused` if there is no room."""
        model = self._models[call.model.id]
        requests, tokens = self.requests[model.id], self.tokens[model.id]
        # One request alone always has room: the engine decides whether it fits.
        if requests and (requests >= model.max_requests or tokens + call.tokens > model.max_tokens):
            raise Refused(
                Refusal(
                    503, f"{model.id} has all the work it takes. Try again shortly.", "overloaded", None, RETRY_AFTER_S
                )
            )
        self.requests[model.id] += 1
        self.tokens[model.id] += call.tokens
        try:
            yield
        finally:
            self.requests[model.id] -= 1
            self.tokens[model.id] -= call.tokens
