"""How much each model's engine may have at a time: what is beyond is refused before the engine is touched.

A queue in an engine helps nobody who waits in it longer than their client does, and its memory is bounded by nothing
that this side knows.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from adytum.inference.core.config import Model
from adytum.inference.gateway.admission.admission import EngineCall
from adytum.inference.gateway.failures import RETRY_AFTER_S, Refusal, Refused


class Load:
    """Counts what the engines have. Tokens are an upper bound: a quarter of the bytes asked, and the longest answer."""

    def __init__(self, models: tuple[Model, ...]) -> None:
        self._models = {model.id: model for model in models}
        self.requests = dict.fromkeys(self._models, 0)
        self.tokens = dict.fromkeys(self._models, 0)

    @contextmanager
    def holding(self, call: EngineCall) -> Iterator[None]:
        """Counts a request while it lasts. Raises `Refused` where there is no room."""
        model = self._models[call.model.id]
        requests, tokens = self.requests[model.id], self.tokens[model.id]
        # One request alone always has room: whether it fits is the engine's to say.
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
