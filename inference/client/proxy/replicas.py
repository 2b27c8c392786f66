"""Several upstreams as one: each is verified before use, and a request goes to one whose evidence names its model.

How an upstream is chosen for a request:

1. Among those that are verified, offer the model and did not fail recently: the one with the fewest requests from this
   proxy in progress; if there are several, the one that was chosen longest ago. Upstreams whose verification is due are
   verified in the background.
2. If there is none, the others that did not fail recently are verified now, and the first to offer the model is used.
3. If there is still none, those that failed recently are tried too.
4. If all are verified and none offers the model, any is used: the backend's own error lists its models.

An error is passed on, unless it is certain that no backend opened the request (`ClientError.unopened`): then another
upstream is chosen, and none is tried twice. So nothing is computed twice, unless an intermediary forges refusals.
"""

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import Callable, Sequence
from http import HTTPStatus
from types import TracebackType
from typing import Any, Self
from urllib.parse import unquote

from adytum.inference.channel.bhttp import Fields, ResponseHead, field
from adytum.inference.client.answers import BUSY
from adytum.inference.client.errors import ClientError, NoUpstream, RequestRefused, ResponseForged, UpstreamRefused
from adytum.inference.client.proxy.upstream import Answer, Reply, UpstreamClient
from adytum.inference.client.session import Session

_log = logging.getLogger("adytum.proxy")
BACK_OFF_S = (1.0, 2.0, 4.0, 8.0, 16.0, 30.0)
"""Seconds without use, by the number of failures in a row. A longer `Retry-After` counts, up to 30."""
LIST_LIMIT = 1 << 20
"""Bytes of one backend's list of models."""
_MODELS_PATH = "/v1/models"
_JSON = ((b"content-type", b"application/json"),)


class Replica:
    """One upstream among others, and its state. `clock` returns monotonic seconds."""

    def __init__(self, client: UpstreamClient, clock: Callable[[], float]) -> None:
        self.client = client
        self.in_flight = 0
        """Requests from this proxy in progress."""
        self.turn = 0
        """When it was last chosen, as a count of choices."""
        self.error: ClientError | None = None
        """Its last failure, unless a request or verification has succeeded since."""
        self._clock = clock
        self._failures = 0
        self._back_off_until = 0.0
        self._unwanted: Session | None = None
        self._known = False
        self._verifying: asyncio.Task[None] | None = None

    @property
    def session(self) -> Session | None:
        """The verified session, if it can still be used."""
        return self.client.upstream.session(self._unwanted)

    @property
    def well(self) -> bool:
        """Whether it did not fail recently."""
        return self._clock() >= self._back_off_until

    def offers(self, model: str | None) -> bool:
        """Whether it is verified and its evidence names the model; any model if `None`."""
        session = self.session
        if session is None:
            return False
        return model is None or any(
            model == claim.id or model in claim.aliases for claim in session.evidence.claims.models
        )

    def verify(self) -> "asyncio.Task[None]":
        """The verification in progress, or a new one. It raises nothing; its result is in `session` and `error`."""
        if self._verifying is None or self._verifying.done():
            self._verifying = asyncio.create_task(self._verify())
        return self._verifying

    async def _verify(self) -> None:
        # Nothing has to await this task, so its errors are logged here.
        try:
            session = await self.client.session(self._unwanted)
        except ClientError as error:
            self.failed(error)
        except Exception as error:
            _log.error("verifying %s failed: %s", self.client.upstream.origin, type(error).__name__)
            self.failed(NoUpstream(f"{self.client.upstream.origin} could not be verified: {type(error).__name__}."))
        else:
            self._unwanted = None
            self.error = None
            if not self._known:
                self.client.log_verified(session)
            self._known = True

    async def send(self, method: str, path: str, fields: Fields, body: bytes) -> "Reply":
        """The answer once its head is open. Raises `ClientError`."""
        self.in_flight += 1
        try:
            answer = await self.client.send(method, path, fields, body)
        except BaseException as error:
            self.in_flight -= 1
            if isinstance(error, ClientError) and not isinstance(error, RequestRefused):
                self.failed(error)
            raise
        if answer.head.status == HTTPStatus.SERVICE_UNAVAILABLE:
            # A sealed 503: its engine is down or full. The answer is passed on, and the next request goes elsewhere.
            self._back_off(_seconds(field(answer.head.fields, b"retry-after")))
        else:
            self._failures = 0
            self.error = None
        return _Counted(answer, self)

    def failed(self, error: ClientError) -> None:
        """Does not use it for a while and, unless it was only out of capacity, verifies it before it is used again."""
        if str(error) != str(self.error):
            _log.warning("%s", error)
        self.error = error
        busy = isinstance(error, UpstreamRefused) and error.status in BUSY
        if not busy:
            self._unwanted = self.client.upstream.session()
            self._known = False
        self._back_off(error.retry_after if isinstance(error, UpstreamRefused) else None)

    def _back_off(self, seconds: float | None) -> None:
        step = BACK_OFF_S[min(self._failures, len(BACK_OFF_S) - 1)]
        self._failures += 1
        self._back_off_until = self._clock() + min(max(seconds or 0.0, step), BACK_OFF_S[-1])

    def stop(self) -> None:
        """Cancels a verification in progress."""
        if self._verifying is not None:
            self._verifying.cancel()


class _Counted:
    """An answer that counts as in progress until it is closed."""

    def __init__(self, answer: Answer, replica: Replica) -> None:
        self._answer = answer
        self._replica: Replica | None = replica

    @property
    def head(self) -> ResponseHead:
        return self._answer.head

    @property
    def receipt_token(self) -> bytes | None:
        return self._answer.receipt_token

    async def next(self) -> bytes:
        try:
            return await self._answer.next()
        except ClientError as error:
            if self._replica is not None:
                self._replica.failed(error)
            raise

    def close(self) -> None:
        if self._replica is not None:
            self._replica.in_flight -= 1
            self._replica = None
        self._answer.close()


class _Made:
    """An answer that this proxy made."""

    receipt_token = None

    def __init__(self, head: ResponseHead, content: bytes) -> None:
        self.head = head
        self._content = content

    async def next(self) -> bytes:
        content, self._content = self._content, b""
        return content

    def close(self) -> None:
        self._content = b""


class Replicas:
    """Sends requests to several upstreams, as `UpstreamClient` does to one. An async context manager.

    `clock` returns monotonic seconds.
    """

    def __init__(self, clients: Sequence[UpstreamClient], clock: Callable[[], float] = time.monotonic) -> None:
        """Raises `ValueError` if an upstream is listed twice, or if there is none."""
        origins = [client.upstream.origin for client in clients]
        if len(set(origins)) != len(origins) or not origins:
            raise ValueError("each upstream must be listed once: " + ", ".join(str(origin) for origin in origins))
        self._replicas = [Replica(client, clock) for client in clients]
        self._turns = 0
        self._opened = contextlib.AsyncExitStack()

    async def __aenter__(self) -> Self:
        for replica in self._replicas:
            await self._opened.enter_async_context(replica.client)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for replica in self._replicas:
            replica.stop()
        await self._opened.aclose()

    async def verify_at_start(self) -> None:
        """Verifies all, so that a wrong policy shows before the first request."""
        await asyncio.wait([replica.verify() for replica in self._replicas])

    @property
    def health(self) -> dict[str, Any]:
        """Whether any upstream is verified at the moment, and the state of each."""
        each = [
            {
                "upstream": str(replica.client.upstream.origin),
                "verified": replica.session is not None,
                "well": replica.well,
                "in_flight": replica.in_flight,
            }
            for replica in self._replicas
        ]
        return {"verified": any(item["verified"] for item in each), "upstreams": each}

    async def send(self, method: str, path: str, fields: Fields, body: bytes) -> Reply:
        """The answer once its head is open; for `GET /v1/models` the models of all backends. Raises `ClientError`."""
        bare = path.partition("?")[0]
        if method == "GET" and bare == _MODELS_PATH:
            return await self._models(path, fields)
        model = _model_of(bare, body)
        untried = list(self._replicas)
        refused: ClientError | None = None
        while (replica := await self._pick(untried, model)) is not None:
            untried.remove(replica)
            try:
                return await replica.send(method, path, fields, body)
            except ClientError as error:
                if not error.unopened:
                    raise
                # Only the error of an upstream without capacity tells the caller when to come back.
                refused = refused if _busy(refused) else error
        raise refused if refused is not None else self._none()

    async def _pick(self, untried: Sequence[Replica], model: str | None) -> Replica | None:
        """The upstream to use, or `None` if no untried one offers the model."""
        for there in ([replica for replica in untried if replica.well], untried):
            under_way = {replica.verify() for replica in there if replica.session is None}
            while True:
                ready = [replica for replica in there if replica.offers(model)]
                if ready:
                    return self._least(ready)
                under_way = {task for task in under_way if not task.done()}
                if not under_way:
                    break
                await asyncio.wait(under_way, return_when=asyncio.FIRST_COMPLETED)
        if len(untried) == len(self._replicas) and all(replica.session is not None for replica in untried):
            return self._least(untried)
        return None

    def _least(self, ready: Sequence[Replica]) -> Replica:
        replica = min(ready, key=lambda item: (item.in_flight, item.turn))
        self._turns += 1
        replica.turn = self._turns
        return replica

    def _none(self) -> ClientError:
        errors = [replica.error for replica in self._replicas if replica.error is not None]
        reasons = " ".join(str(error) for error in errors)
        return next(
            (error for error in errors if _busy(error)),
            NoUpstream(f"No verified upstream offers the model of the request, and nothing was sent. {reasons}"),
        )

    async def _models(self, path: str, fields: Fields) -> Reply:
        """Every model that a backend lets the caller use. A backend that cannot be asked is omitted."""
        well = [replica for replica in self._replicas if replica.well] or self._replicas
        if under_way := [replica.verify() for replica in well if replica.session is None]:
            await asyncio.wait(under_way)
        asked = [replica for replica in well if replica.session is not None]
        if not asked:
            raise self._none()
        answers = await asyncio.gather(*(_read(replica, path, fields) for replica in asked), return_exceptions=True)
        for answer in answers:
            if isinstance(answer, BaseException) and not isinstance(answer, ClientError):
                raise answer
        read = [answer for answer in answers if not isinstance(answer, BaseException)]
        listed = [content for head, content in read if head.status == HTTPStatus.OK]
        if listed:
            return _Made(ResponseHead(HTTPStatus.OK, _JSON), merged(listed))
        if read:
            return _Made(*read[0])
        raise next(answer for answer in answers if isinstance(answer, ClientError))


def merged(lists: Sequence[bytes]) -> bytes:
    """One list of models from several: each id once, as in the first list that has it. Raises `ResponseForged`."""
    entries: dict[str, Any] = {}
    try:
        for content in lists:
            for entry in json.loads(content)["data"]:
                entries.setdefault(entry["id"], entry)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ResponseForged("A backend's list of models is invalid and was not used. Ask its operator.") from error
    return json.dumps({"object": "list", "data": list(entries.values())}).encode()


async def _read(replica: Replica, path: str, fields: Fields) -> tuple[ResponseHead, bytes]:
    """Head and content of one backend's list of models."""
    answer = await replica.send("GET", path, fields, b"")
    try:
        content = b""
        while data := await answer.next():
            content += data
            if len(content) > LIST_LIMIT:
                raise ResponseForged(f"A backend's list of models is larger than {LIST_LIMIT} bytes and was not used.")
        return answer.head, content
    finally:
        answer.close()


def _model_of(path: str, body: bytes) -> str | None:
    """The model that a request names, or `None` if it is not clear. The backend validates the request itself."""
    if path.startswith(_MODELS_PATH + "/"):
        return unquote(path.removeprefix(_MODELS_PATH + "/"))
    try:
        document = json.loads(body)
    except (ValueError, RecursionError):
        return None
    model = document.get("model") if isinstance(document, dict) else None
    return model if isinstance(model, str) else None


def _busy(error: ClientError | None) -> bool:
    return isinstance(error, UpstreamRefused) and error.status in BUSY


def _seconds(value: bytes | None) -> float | None:
    return float(value) if value is not None and value.isdigit() and len(value) <= 5 else None
