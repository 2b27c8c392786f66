"""A bound for every peer-controlled size. Those of sealed messages are in `inference/channel/limits.py`."""

from dataclasses import dataclass


@dataclass(frozen=True)
class GatewayLimits:
    """Bounds on what peers may take. Sizes in bytes, times in seconds."""

    head: int = 32 * 1024
    """Request line and header of an outer request."""
    head_lines: int = 100
    head_seconds: float = 15.0
    """From a connection's start, or a request's first byte, to the end of its header."""
    write_seconds: float = 30.0
    """For a reader to take the 48 KiB between the transport's two water marks, once more than 64 KiB wait for it."""
    pipelined: int = 8
    """Requests that one connection may send ahead of its answers."""
    values: int = 2_000_000
    """Commas and brackets in a request's JSON, counted before it is parsed: each can become an object of 60 bytes."""
    depth: int = 64
    """Levels of a request's JSON."""
    choices: int = 16
    """`n` and `best_of`: each is a sequence of its own."""
    images: int = 16
    """Images in one request."""
    image_characters: int = 20 << 20
    """All images of a request, in base64."""
    image_pixels: int = 1 << 25
    """All images of a request, unpacked: 100 MB of an engine's memory. An engine has the same bound for each image."""
    inputs: int = 2048
    """Texts in one batch of embeddings or completions."""
    stops: int = 16
    """Stop sequences: each is looked for after every token."""
    template_values: int = 4096
    """`chat_template_kwargs`, as JSON: it is handed to the model's template, a program."""


LIMITS = GatewayLimits()
