"""From an opened request to what may be asked of an engine. Raises `Refused`, whose text is sealed for the client.

An allow-list decides: whatever else the engine offers is unreachable. `rewrite` says what becomes of the body.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from inference.channel.bhttp import Fields, field
from inference.channel.exchange import InnerRequest
from inference.config import Config, Model
from inference.gateway import rewrite
from inference.gateway.failures import BAD_KEY, Refusal, Refused
from inference.gateway.rewrite import CacheSalts

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
    """A request that an engine may have."""

    model: Model
    path: str
    body: bytes
    stream: bool
    caller: str = "anyone"
    """The name that records have for whoever asked."""
    hide_usage: bool = False
    """Whether the stream's event of usage is for us only."""
    tokens: int = 0
    """What it may take at most, prompt and answer: a quarter of the body's bytes, and the longest answer."""

    def __repr__(self) -> str:
        return f"EngineCall({self.model.id}, {self.path})"


class Admission:
    """Decides on opened requests."""

    def __init__(self, config: Config) -> None:
        self._callers = config.callers
        self._models = {name: model for model in config.models for name in (model.id, *model.aliases)}
        self.model_list = _model_list(config.models)
        self._salts = CacheSalts()

    def admit(self, request: InnerRequest) -> EngineCall | bytes:
        """What to ask of which engine, or the model list for `GET /v1/models`. Raises `Refused`."""
        key = self._authenticate(request.fields)
        path = request.path.partition("?")[0]
        if path == MODELS_PATH or path.startswith(MODELS_PATH + "/"):
            return self._list(request.method, path)
        task = ROUTES.get(path)
        if task is None:
            raise Refused(
                Refusal(404, f"Unknown path. This backend has {MODELS_PATH}, {', '.join(ROUTES)}.", "unknown_path")
            )
        if request.method != "POST":
            raise Refused(Refusal(405, f"{path} takes POST.", "method_not_allowed"))
        body = rewrite.parse(request.body)
        model = self._model(body, task, path)
        stream = body.get("stream")
        if stream is not None and not isinstance(stream, bool):
            raise Refused(Refusal(400, '"stream" must be true or false.', param="stream"))
        domain = rewrite.domain_of(body, field(request.fields, rewrite.CACHE_DOMAIN_FIELD))
        body, hide_usage = rewrite.ask_for_usage(body, path)
        for_engine = rewrite.for_engine(body, self._salts.salt(key, domain))
        tokens = len(for_engine) // 4 + rewrite.longest_answer(body)
        return EngineCall(model, path, for_engine, bool(stream), _caller(key), hide_usage, tokens)

    def _authenticate(self, fields: Fields) -> bytes:
        """The caller's API key; empty where none is asked for. Raises `Refused`."""
        if self._callers.authentication == "none":
            return b""
        key = field(fields, b"x-api-key")
        if key is None:
            scheme, _, key = (field(fields, b"authorization") or b"").partition(b" ")
            key = key.strip() if scheme.lower() == b"bearer" else b""
        # A lookup by digest: its time tells nothing about an accepted key.
        if not key or hashlib.sha256(key).hexdigest() not in self._callers.key_sha256:
            raise Refused(BAD_KEY)
        return key

    def _list(self, method: str, path: str) -> bytes:
        if method != "GET":
            raise Refused(Refusal(405, f"{MODELS_PATH} takes GET.", "method_not_allowed"))
        if path == MODELS_PATH:
            return json.dumps(self.model_list).encode()
        name = path.removeprefix(MODELS_PATH + "/")
        entry = next((item for item in self.model_list["data"] if item["id"] == name), None)
        if entry is None:
            raise self._unknown_model()
        return json.dumps(entry).encode()

    def _model(self, body: dict[str, Any], task: Task, path: str) -> Model:
        name = body.get("model")
        if not isinstance(name, str) or not name:
            raise Refused(Refusal(400, f'"model" is missing. This backend has {self._names()}.', param="model"))
        model = self._models.get(name)
        if model is None:
            raise self._unknown_model()
        if model.task != task:
            raise Refused(
                Refusal(400, f"{model.id} is for {model.task}; {path} needs a model for {task}.", param="model")
            )
        return model

    def _unknown_model(self) -> Refused:
        message = f"The model does not exist. This backend has {self._names()}."
        return Refused(Refusal(404, message, "model_not_found", "model"))

    def _names(self) -> str:
        return ", ".join(item["id"] for item in self.model_list["data"])


def _caller(key: bytes) -> str:
    """A name that says which key, and not the key."""
    return hashlib.sha256(key).hexdigest()[:12] if key else "anyone"


def _model_list(models: tuple[Model, ...]) -> dict[str, Any]:
    """`GET /v1/models`: every id and alias with its tasks."""
    names = [(model.id, model.task) for model in models]
    names += [(alias, model.task) for model in models for alias in model.aliases]
    return {"object": "list", "data": [{"id": name, "object": "model", "tasks": [task]} for name, task in names]}
