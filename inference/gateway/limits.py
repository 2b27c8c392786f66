"""A bound for every peer-controlled size. Bounds on sealed messages are in `inference/channel/limits.py`."""

from dataclasses import dataclass


@dataclass(frozen=True)
class GatewayLimits:
    """Bounds on what peers may take. Sizes in bytes, times in seconds."""

    head: int = 32 * 1024
    """Request line and header of an outer request."""
    head_lines: int = 100
    head_seconds: float = 15.0
    """From the start of a connection, or from the first byte of a later request, to the end of the header."""
    write_seconds: float = 30.0
    """Once more than 64 KiB wait for a client: its time to read the 48 KiB between the transport's two water marks."""
    pipelined: int = 8
    """Requests that one connection may send ahead of its answers."""
    values: int = 2_000_000
    """Commas and opening brackets in a request's JSON, counted before parsing: each may become an object of 60 B."""
    depth: int = 64
    """Levels of nesting in a request's JSON."""
    choices: int = 16
    """`n` and `best_of`: each is a sequence of its own."""
    images: int = 16
    """Images in one request."""
    image_characters: int = 20 << 20
    """Base64 characters of all images in a request."""
    image_pixels: int = 1 << 25
    """Pixels of all images in a request: 100 MB of an engine's memory. An engine has the same bound for each image."""
    inputs: int = 2048
    """Texts in one batch of embeddings or completions."""
    stops: int = 16
    """Stop sequences: each is looked for after every token."""
    template_values: int = 4096
    """Characters of `chat_template_kwargs` as JSON. It is passed to the model's template, which is a program."""


LIMITS = GatewayLimits()
