"""The bound of every peer-controlled size."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Bounds on what a peer may send. Sizes are in bytes."""

    message: int = 32 * 1024 * 1024
    """One whole binary HTTP message, opened. It is this large because requests carry images as `data:` URLs."""
    chunk: int = 1024 * 1024
    """Plaintext of one OHTTP chunk. The draft requires at least 16,384 (draft-ietf-ohai-chunked-ohttp-08, 3)."""
    frame: int = 64 * 1024 * 1024
    """One EHBP frame, tag included; the protocol's own maximum."""
    chunks: int = 65_536
    """OHTTP chunks, EHBP frames or binary HTTP content chunks in one message, empty ones included."""
    control: int = 16 * 1024
    """Method, scheme, authority and path together."""
    field_lines: int = 128
    """Header or trailer lines in one section."""
    field_section: int = 64 * 1024
    """Bytes of one header or trailer section."""
    informational: int = 8
    """Informational (1xx) responses before the final one."""
    padding: int = 4 * 1024 * 1024
    """Zero bytes after a binary HTTP message: an eighth of the largest message (`padding.bucket`)."""


DEFAULT_LIMITS = Limits()
