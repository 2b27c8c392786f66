"""Images in a request: which are accepted, and how callers' images are kept apart.

1. Images are the only media, and they come only as `data:` URLs: fetching an address would reveal to others what the
   request is about, and the engine has no network.
2. Each is a PNG, JPEG, WebP or GIF by its own first bytes. vLLM looks at these, not at the type in the URL, and would
   pass anything else to some thirty decoders.
3. Their number, bytes and pixels are bounded.
4. The request's cache salt is appended to each image, where no decoder looks. vLLM's image caches use a hash of the
   bytes and no salt: without it, timing would reveal that another caller had sent the same image.
"""

import base64
import binascii
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from adytum.inference.gateway.admission import images
from adytum.inference.gateway.failures import Refusal, Refused
from adytum.inference.gateway.limits import LIMITS

TEXTS = ("messages", "input", "system", "instructions")
"""Fields of a request that contain content parts."""
_OTHER_MEDIA = frozenset(
    {
        *("audio_embeds", "audio_url", "file_data", "file_url", "image_embeds"),
        *("image_pil", "input_audio", "video_embeds", "video_url"),
    }
)
_TEXT = frozenset({"role", "content"})
_TYPES = frozenset({"image/png", "image/jpeg", "image/jpg", "image/webp", "image/gif"})
_DATA_URL = re.compile(r"data:([^;,]*);base64,", re.IGNORECASE)
_TOKENS = 256
"""Gemma 3 makes this many of any image."""
_PIXELS_PER_TOKEN = 1024
"""An image's further cost until it is scaled down: 3 KiB of an engine's memory for each of these tokens."""


@dataclass(frozen=True)
class MediaCost:
    """A request's images together. `characters`: their length in the body."""

    tokens: int = 0
    characters: int = 0


@dataclass(frozen=True)
class _Slot:
    """The place of a medium: `holder[name]`, called `place` in errors. `kind` is set if the type is a field of its own
    and the value is base64 alone (Anthropic's `source`)."""

    holder: dict[str, Any]
    name: str
    place: str
    kind: str | None = None


def admit(body: Mapping[str, Any], salt: str) -> MediaCost:
    """Checks the body's images, and changes them in place (4). Raises `Refused`."""
    for place in _named_parts(body):
        raise Refused(
            Refusal(
                400,
                "\"uuid\" is not taken here: it names an entry in the engine's cache of all callers' media.",
                "unsupported_field",
                place,
            )
        )
    slots = [slot for name in TEXTS for slot in _slots(body.get(name), name)]
    if len(slots) > LIMITS.images:
        raise Refused(Refusal(400, f"A request has at most {LIMITS.images} images.", "too_many_values", "messages"))
    pixels = characters = 0
    for slot in slots:
        kind, encoded = _encoded(slot)
        characters += len(encoded)
        if characters > LIMITS.image_characters:
            limit = LIMITS.image_characters >> 20
            raise Refused(
                Refusal(413, f"The images of a request have at most {limit} MiB in base64.", "too_large", slot.place)
            )
        data, image = _image(slot, kind, encoded)
        pixels += image.pixels
        if pixels > LIMITS.image_pixels:
            raise Refused(
                Refusal(
                    400,
                    f"The images of a request have at most {LIMITS.image_pixels:,} pixels together; this one has "
                    f"{image.width} x {image.height}. The model looks at far fewer: scale it down.",
                    "too_large",
                    slot.place,
                )
            )
        marked = base64.b64encode(data + salt.encode()).decode()
        slot.holder[slot.name] = marked if slot.kind is not None else f"data:image/{image.kind};base64,{marked}"
        characters += len(marked) - len(encoded)
    return MediaCost(len(slots) * _TOKENS + pixels // _PIXELS_PER_TOKEN, characters)


def _encoded(slot: _Slot) -> tuple[str, str]:
    """The media type that the client names, and the image in base64."""
    value = slot.holder.get(slot.name)
    if not isinstance(value, str):
        value = ""
    if slot.kind is not None:
        return slot.kind, value
    if not value[:5].lower() == "data:":
        raise Refused(
            Refusal(
                400,
                "Images are taken as data: URLs only (data:image/png;base64,...): the engine has no network, and an "
                "address would tell others what is asked about.",
                "remote_media",
                slot.place,
            )
        )
    found = _DATA_URL.match(value)
    if found is None:
        raise _not_an_image(slot, "A data: URL looks like data:image/png;base64,... here.")
    return found[1], value[found.end() :]


def _image(slot: _Slot, named: str, encoded: str) -> tuple[bytes, images.Image]:
    if named.lower() not in _TYPES:
        raise Refused(
            Refusal(
                400,
                "Images are taken as image/png, image/jpeg, image/webp or image/gif, and no other media.",
                "unsupported_media",
                slot.place,
            )
        )
    try:
        # Other characters than base64's are refused, not skipped, as in vLLM.
        data = binascii.a2b_base64(encoded, strict_mode=True)
        return data, images.read(data)
    except images.BadImage as error:
        raise _not_an_image(slot, f"This is no PNG, JPEG, WebP or GIF that can be read: {error}.") from None
    except ValueError:
        raise _not_an_image(slot, "The image is not in base64.") from None


def _not_an_image(slot: _Slot, message: str) -> Refused:
    return Refused(Refusal(400, message, "invalid_image", slot.place))


def _slots(value: Any, place: str) -> Iterator[_Slot]:
    """Media anywhere in messages: OpenAI's parts, and Anthropic's `source`."""
    if isinstance(value, list):
        for i, item in enumerate(value):
            if _is_text(item):
                continue
            yield from _slots(item, f"{place}[{i}]")
    elif isinstance(value, dict):
        for name, item in value.items():
            where = f"{place}.{name}"
            if name in _OTHER_MEDIA:
                raise Refused(
                    Refusal(400, "Of media only images are taken, as data: URLs.", "unsupported_media", where)
                )
            if name == "image_url":
                yield _Slot(item, "url", where) if isinstance(item, dict) else _Slot(value, name, where)
            elif name == "source" and isinstance(item, dict) and item.get("type") == "url":
                yield _Slot(item, "url", where)
            elif name == "source" and isinstance(item, dict) and value.get("type") == "image":
                named = item.get("media_type")
                yield _Slot(item, "data", where, named if isinstance(named, str) else "")
            elif name == "input" and value.get("type") == "tool_use":
                # A tool call's arguments: their names are the tool's own.
                continue
            else:
                yield from _slots(item, where)


def _is_text(item: Any) -> bool:
    """Whether it is a message of text only, as nearly all are, and so without media."""
    return isinstance(item, dict) and item.keys() == _TEXT and all(isinstance(value, str) for value in item.values())


def _named_parts(body: Mapping[str, Any]) -> Iterator[str]:
    """Content parts with a `uuid`: vLLM 0.32 uses it as the key in its media cache, with or without the media."""
    for name in ("messages", "input"):
        stack = [(body.get(name), name)]
        while stack:
            value, place = stack.pop()
            if isinstance(value, list):
                stack += [(item, f"{place}[{i}]") for i, item in enumerate(value) if not _is_text(item)]
            elif isinstance(value, dict):
                if value.get("uuid") is not None:
                    yield f"{place}.uuid"
                # Not into the arguments of a tool call, which are the client's own names.
                if "content" in value:
                    stack.append((value["content"], f"{place}.content"))
