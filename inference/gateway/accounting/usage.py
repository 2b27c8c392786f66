"""The number of tokens of an answer, read from the engine's own count.

The gateway asks for usage in every stream (`stream_options.include_usage`). If the client did not ask for it, the event
that carries it is removed again, so that the client gets the stream that it asked for.
"""

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_EVENT_END = b"\n\n"
_NAMED = b'"usage":'
_DATA = b"data:"
_USAGE_LIMIT = 4096
_DECODER = json.JSONDecoder()
_PROMPT = ("prompt_tokens", "input_tokens")
_COMPLETION = ("completion_tokens", "output_tokens")
_CACHE = ("cache_read_input_tokens", "cache_creation_input_tokens")
_DETAILS = ("prompt_tokens_details", "input_tokens_details")


@dataclass(frozen=True)
class Usage:
    """Tokens of one answer. `cached`: those of the prompt that the engine had computed before.

    `exact` is false if the engine's count never came because the answer was cut. Then `prompt` is a quarter of the
    request's bytes, and `completion` the number of events that were passed on, each of at least one token.
    """

    prompt: int
    cached: int
    completion: int
    exact: bool = True

    @property
    def total(self) -> int:
        return self.prompt + self.completion


def of_whole(body: bytes) -> Usage | None:
    """The usage in a whole answer; `None` if there is none, as in an error."""
    at = len(body)
    # The last one that parses as an object. The body itself is not parsed: a batch of embeddings is megabytes long.
    while (at := body.rfind(_NAMED, 0, at)) >= 0:
        text = body[at + len(_NAMED) : at + len(_NAMED) + _USAGE_LIMIT].decode("utf-8", "replace").lstrip()
        try:
            usage, _ = _DECODER.raw_decode(text)
        except (ValueError, RecursionError):
            continue
        if isinstance(usage, dict):
            counts: dict[str, int] = {}
            _take(usage, counts)
            return _usage(counts)
    return None


class StreamUsage:
    """Counts one stream. `hidden`: the client did not ask for usage, so the event that has it is not passed on."""

    def __init__(self, request_bytes: int, *, hidden: bool) -> None:
        self._request_bytes = request_bytes
        self._hidden = hidden
        self._held = b""
        self.events = 0
        self.first_at = 0.0
        """When the first event came, in seconds of the monotonic clock."""
        self._counts: dict[str, int] = {}

    def feed(self, data: bytes) -> bytes:
        """What the client gets of `data`: whole events only. The start of an event waits for its end."""
        if self._held:
            data = self._held + data
            self._held = b""
        if not data.endswith(_EVENT_END):
            end = data.rfind(_EVENT_END) + 2
            if end < 2:
                self._held = data
                return b""
            self._held = data[end:]
            data = data[:end]
        if not self.events:
            self.first_at = time.monotonic()
        self.events += data.count(_EVENT_END)
        # A model's text cannot contain these bytes: inside JSON a quotation mark is escaped.
        return data if _NAMED not in data else self._read(data)

    def finish(self) -> bytes:
        """The rest of a stream that did not end with a whole event."""
        held, self._held = self._held, b""
        return held

    @property
    def usage(self) -> Usage:
        """The engine's count, or an estimate if it never came."""
        found = _usage(self._counts)
        return found if found is not None else Usage(self._request_bytes // 4, 0, self.events, exact=False)

    def _read(self, data: bytes) -> bytes:
        kept = []
        for event in data.split(_EVENT_END)[:-1]:
            if _NAMED not in event:
                kept.append(event + _EVENT_END)
                continue
            line = next((line for line in event.split(b"\n") if line.startswith(_DATA)), b"")
            try:
                document = json.loads(line[len(_DATA) :])
            except (ValueError, RecursionError):
                document = None
            had = _collect(document, self._counts)
            # OpenAI's usage event has no choices. In the other APIs an event with usage carries other content too.
            if not (had and self._hidden and isinstance(document, dict) and document.get("choices") == []):
                kept.append(event + _EVENT_END)
        return b"".join(kept)


def _collect(document: Any, counts: dict[str, int]) -> bool:
    """Adds a document's usage: at its top, in `response` (Responses) or in `message` (Messages). Returns whether there
    is any."""
    if not isinstance(document, dict):
        return False
    places = (document, document.get("response"), document.get("message"))
    found = [place["usage"] for place in places if isinstance(place, dict) and isinstance(place.get("usage"), dict)]
    for usage in found:
        _take(usage, counts)
    return bool(found)


def _take(usage: Mapping[str, Any], counts: dict[str, int]) -> None:
    for kind, names in (("prompt", _PROMPT), ("completion", _COMPLETION)):
        for name in names:
            _put(counts, kind, usage.get(name))
    _put(counts, "cached", usage.get("cache_read_input_tokens"))
    # Anthropic's `input_tokens` are those that no cache had; in the other APIs they are the whole prompt.
    parts = [usage.get(name) for name in ("input_tokens", *_CACHE)]
    if any(part is not None for part in parts[1:]):
        _put(counts, "prompt", sum(part for part in parts if isinstance(part, int)))
    for name in _DETAILS:
        details = usage.get(name)
        if isinstance(details, dict):
            _put(counts, "cached", details.get("cached_tokens"))


def _put(counts: dict[str, int], kind: str, value: Any) -> None:
    # Messages counts in two events, and the later one may repeat a zero, so the greater number counts.
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        counts[kind] = max(value, counts.get(kind, 0))


def _usage(counts: Mapping[str, int]) -> Usage | None:
    if "prompt" not in counts:
        return None
    return Usage(counts["prompt"], counts.get("cached", 0), counts.get("completion", 0))
