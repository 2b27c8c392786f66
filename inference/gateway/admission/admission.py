"""From an opened request to the request for an engine. Raises `Refused`, whose text is sealed for the client.

An allow-list of routes decides: nothing else that an engine offers can be reached. `rewrite` rewrites the body.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from adytum.inference.channel.bhttp import Fields, field
from adytum.inference.channel.exchange import InnerRequest
from adytum.inference.core.config import Config, Model
from adytum.inference.gateway.admission import rewrite
from adytum.inference.gateway.admission.rewrite import CacheSalts
from adytum.inference.gateway.callers.callers import ANYONE, Caller, Callers, Hold
from adytum.inference.gateway.failures import Refusal, Refused

Task = Literal["generate", "embed"]

ROUTES: Mapping[str, Task] = {
    "/v1/chat/completions": "generate",
    "/v1/completions": "generate",
    "/v1/responses": "generate",
    "/v1/messages": "generate",
    "/v1/embeddings": "embed",
}
"""Inner paths that are forwarded, and the task that a model needs for them."""

MODELS_PATH = "/v1/models"


@dataclass(frozen=True)
class EngineCall:
    """A request that may go to an engine."""

    model: Model
    path: str
    body: bytes
    stream: bool
    caller: str = ANYONE.name
    """The caller's name in records."""
    hold: Hold | None = None
    """Its share of its caller's limits, which the `Lease` ends."""
    hide_usage: bool = False
    """Whether only the gateway asked for the stream's usage event."""
    tokens: int = 0
    """An upper bound on its tokens: a quarter of the body's bytes, its images' tokens, and the longest answer."""

    def __repr__(self) -> str:
        return f"EngineCall({self.model.id}, {self.path})"


class Admission:
    """Decides on opened requests."""

    def __init__(self, config: Config, callers: Callers) -> None:
        self._callers = callers
        self._models = {name: model for model in config.models for name in (model.id, *model.aliases)}
        self.model_list = _model_list(config.models)
        self._salts = CacheSalts()

    def know(self, fields: Fields) -> None:
        """Raises `Refused` if `admit` would refuse the API key."""
        self._callers.authenticate(fields)

    def admit(self, request: InnerRequest) -> EngineCall | bytes:
        """The request for an engine, or the body of the answer to `GET /v1/models`. Raises `Refused`."""
        caller, key = self._callers.authenticate(request.fields)
        path = request.path.partition("?")[0]
        if path == MODELS_PATH or path.startswith(MODELS_PATH + "/"):
            return self._list(request.method, path, caller)
        task = ROUTES.get(path)
        if task is None:
            raise Refused(
                Refusal(404, f"Unknown path. This backend has {MODELS_PATH}, {', '.join(ROUTES)}.", "unknown_path")
            )
        if request.method != "POST":
            raise Refused(Refusal(405, f"{path} takes POST.", "method_not_allowed"))
        hold = self._callers.begin(caller)
        try:
            return self._admit(request, path, task, caller, key, hold)
        except BaseException:
            hold.end()
            raise

    def _admit(
        self, request: InnerRequest, path: str, task: Task, caller: Caller, key: bytes, hold: Hold
    ) -> EngineCall:
        body = rewrite.parse(request.body)
        model = self._model(body, task, path, caller)
        stream = body.get("stream")
        if stream is not None and not isinstance(stream, bool):
            raise Refused(Refusal(400, '"stream" must be true or false.', param="stream"))
        domain = rewrite.domain_of(body, field(request.fields, rewrite.CACHE_DOMAIN_FIELD))
        body, hide_usage = rewrite.ask_for_usage(body, path)
        for_engine, tokens = rewrite.for_engine(body, self._salts.salt(key, domain))
        tokens += rewrite.longest_answer(body)
        self._callers.reserve(hold, tokens)
        return EngineCall(model, path, for_engine, bool(stream), caller.name, hold, hide_usage, tokens)

    def _list(self, method: str, path: str, caller: Caller) -> bytes:
        if method != "GET":
            raise Refused(Refusal(405, f"{MODELS_PATH} takes GET.", "method_not_allowed"))
        if path == MODELS_PATH:
            return json.dumps({**self.model_list, "data": self._entries(caller)}).encode()
        name = path.removeprefix(MODELS_PATH + "/")
        entry = next((item for item in self._entries(caller) if item["id"] == name), None)
        if entry is None:
            raise self._unknown_model(caller)
        return json.dumps(entry).encode()

    def _entries(self, caller: Caller) -> list[dict[str, Any]]:
        """The models that the caller may use."""
        return [
            item
            for item in self.model_list["data"]
            if caller.models is None or self._models[item["id"]].id in caller.models
        ]

    def _model(self, body: dict[str, Any], task: Task, path: str, caller: Caller) -> Model:
        name = body.get("model")
        if not isinstance(name, str) or not name:
            raise Refused(Refusal(400, f'"model" is missing. You may use {self._names(caller)}.', param="model"))
        model = self._models.get(name)
        if model is None or (caller.models is not None and model.id not in caller.models):
            raise self._unknown_model(caller)
        if model.task != task:
            raise Refused(
                Refusal(400, f"{model.id} is for {model.task}; {path} needs a model for {task}.", param="model")
            )
        return model

    def _unknown_model(self, caller: Caller) -> Refused:
        message = f"The model does not exist, or your key is not for it. You may use {self._names(caller)}."
        return Refused(Refusal(404, message, "model_not_found", "model"))

    def _names(self, caller: Caller) -> str:
        return ", ".join(item["id"] for item in self._entries(caller)) or "none"


def _model_list(models: tuple[Model, ...]) -> dict[str, Any]:
    """`GET /v1/models`: every id and alias with its tasks."""
    names = [(model.id, model.task) for model in models]
    names += [(alias, model.task) for model in models for alias in model.aliases]
    return {"object": "list", "data": [{"id": name, "object": "model", "tasks": [task]} for name, task in names]}
