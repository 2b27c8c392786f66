"""What becomes of a request's JSON on its way to the engine: one field is set, some are refused, the rest is passed on.

The body is parsed once and written again, so the engine reads exactly what was checked here: of a name that occurs
twice there is one left.
"""

import hmac
import json
import os
from collections.abc import Mapping
from typing import Any

from adytum.inference.gateway.admission import media
from adytum.inference.gateway.failures import Refusal, Refused
from adytum.inference.gateway.limits import LIMITS

CACHE_DOMAIN_FIELD = b"x-adytum-cache-domain"
"""Inner request header in which a client names its cache domain; `prompt_cache_key` in the body does the same."""
_DOMAIN_LIMIT = 1024

REFUSED: Mapping[str, str] = {
    "kv_transfer_params": "it addresses the engine's cache of other requests",
    "ec_transfer_params": "it addresses the engine's cache of other requests",
    "previous_input_messages": "nothing is kept between requests: send the conversation as input",
    "previous_response_id": "nothing is kept between requests: send the conversation as input",
    "background": "nothing is kept between requests: an answer has to be read while it is made",
    "session_id": "nothing is kept between requests",
    "request_id": "it could name another client's request",
    "priority": "it would let one client go before the others",
    "prompt_embeds": "it is a serialised tensor, which the engine would have to unpack",
    "mm_payload": "it bypasses the checks of images",
    "mm_processor_kwargs": "it changes how the engine processes images",
    "media_io_kwargs": "it changes how the engine reads images",
    "vllm_xargs": "it reaches into the engine",
    "chat_template": "a template is a program that the engine would run; the model's own is used",
}
"""Fields that no client may set, and why. null, false and empty values count as not set."""

_USAGE_ON_REQUEST = frozenset({"/v1/chat/completions", "/v1/completions"})
_USUAL_ANSWER = 1024


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


# `json.loads` and `json.dumps` make these anew in each call with options.
_DECODER = json.JSONDecoder(parse_constant=_no_constant)
_ENCODER = json.JSONEncoder(separators=(",", ":"), allow_nan=False)


class CacheSalts:
    """Who may share computed prefixes: nobody, unless a client names a domain, and then only under the same API key.

    vLLM finds a prefix again only under the same `cache_salt`, and a hit is faster, so a shared cache would tell a
    client what others had asked. The secret is made at boot and never leaves this process.
    """

    def __init__(self) -> None:
        self._secret = os.urandom(32)

    def salt(self, api_key: bytes, domain: bytes) -> str:
        """64 hexadecimal digits. If `domain` is empty, they serve one request only."""
        if not domain:
            return os.urandom(32).hex()
        return hmac.digest(self._secret, len(api_key).to_bytes(4, "big") + api_key + domain, "sha256").hex()

    def __repr__(self) -> str:
        return "CacheSalts(...)"


def parse(body: bytes) -> dict[str, Any]:
    """The body's JSON object. Raises `Refused`."""
    if sum(map(body.count, (b",", b"[", b"{"))) > LIMITS.values:
        raise Refused(Refusal(413, f"The body has more than {LIMITS.values:,} values.", "too_many_values"))
    try:
        value = _DECODER.decode(body.decode(json.detect_encoding(body), "surrogatepass"))
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise Refused(Refusal(400, "The body must be a JSON object in UTF-8.", "invalid_json"))
    _check_depth(value)
    return value


def _check_depth(value: dict[str, Any]) -> None:
    level: list[Any] = [value]
    for _ in range(LIMITS.depth):
        level = [
            child
            for item in level
            for child in (item.values() if isinstance(item, dict) else item)
            if isinstance(child, dict | list)
        ]
        if not level:
            return
    raise Refused(Refusal(400, f"The body is nested more than {LIMITS.depth} levels deep.", "invalid_json"))


def check_sizes(body: Mapping[str, Any]) -> None:
    """What one request may ask for at once. Raises `Refused`."""
    for name in ("n", "best_of"):
        if isinstance(body.get(name), int) and body[name] > LIMITS.choices:
            raise _too_many(name, LIMITS.choices)
    for name, limit in (("stop", LIMITS.stops), ("input", LIMITS.inputs), ("prompt", LIMITS.inputs)):
        value = body.get(name)
        # A list of numbers is one text.
        if isinstance(value, list) and len(value) > limit and not isinstance(value[0], int):
            raise _too_many(name, limit)
    values = body.get("chat_template_kwargs")
    if values is not None and len(json.dumps(values)) > LIMITS.template_values:
        raise _too_many("chat_template_kwargs", LIMITS.template_values)


def _too_many(name: str, limit: int) -> Refused:
    return Refused(Refusal(400, f'"{name}" is at most {limit:,} here.', "too_many_values", name))


def longest_answer(body: Mapping[str, Any]) -> int:
    """Tokens that the answer may have; where the request does not say, what is usual."""
    asked = [body.get(name) for name in ("max_completion_tokens", "max_tokens", "max_output_tokens")]
    longest = next((value for value in asked if isinstance(value, int) and value > 0), _USUAL_ANSWER)
    choices = body.get("n")
    return longest * (choices if isinstance(choices, int) and choices > 1 else 1)


def domain_of(body: Mapping[str, Any], named: bytes | None) -> bytes:
    """The cache domain of a request: what the header names, else `prompt_cache_key`. Raises `Refused`."""
    if named is None:
        key = body.get("prompt_cache_key")
        if key is not None and not isinstance(key, str):
            raise Refused(Refusal(400, '"prompt_cache_key" must be a string.', param="prompt_cache_key"))
        # The two spaces of names are told apart.
        named = b"key:" + key.encode("utf-8", "surrogatepass") if key else b""
    elif named:
        named = b"header:" + named
    if len(named) > _DOMAIN_LIMIT:
        raise Refused(Refusal(400, f"A cache domain has at most {_DOMAIN_LIMIT} bytes.", param="prompt_cache_key"))
    return named


def ask_for_usage(body: dict[str, Any], path: str) -> tuple[dict[str, Any], bool]:
    """A stream's request with the count of its tokens asked for, and whether only we asked. The other APIs always tell.

    A value that is not an object stays: the engine refuses it.
    """
    options = body.get("stream_options")
    if (
        path not in _USAGE_ON_REQUEST
        or not body.get("stream")
        or (options is not None and not isinstance(options, dict))
    ):
        return body, False
    options = options or {}
    if options.get("include_usage"):
        return body, False
    # Without it vLLM passes over this one too.
    kept = {name: value for name, value in options.items() if name != "continuous_usage_stats"}
    return {**body, "stream_options": {**kept, "include_usage": True}}, True


def for_engine(body: dict[str, Any], salt: str) -> tuple[bytes, int]:
    """The engine's request, and the tokens that it may have at most: a quarter of its bytes, images counted apart.

    Raises `Refused` for a field or a medium that no client may send.
    """
    try:
        return _for_engine(body, salt)
    except RecursionError:
        raise Refused(Refusal(400, "The body is nested too deeply.", "invalid_json")) from None
    except ValueError:
        # 1e999 is JSON, but reads as infinity, which JSON cannot write.
        raise Refused(Refusal(400, "The body has a number beyond a double's range.", "invalid_json")) from None


def _for_engine(body: dict[str, Any], salt: str) -> tuple[bytes, int]:
    check_sizes(body)
    for name, value in body.items():
        if value and name in REFUSED:
            raise Refused(Refusal(400, f'"{name}" is not taken here: {REFUSED[name]}.', "unsupported_field", name))
    found = media.admit(body, salt)
    changed = {**body, "cache_salt": salt}
    if body.get("store"):
        changed["store"] = False
    written = _ENCODER.encode(changed).encode()
    return written, (len(written) - found.characters) // 4 + found.tokens
