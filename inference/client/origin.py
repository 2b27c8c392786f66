"""An upstream's origin (RFC 6454): scheme, host and port, nothing else."""

from dataclasses import dataclass
from urllib.parse import urlsplit


@dataclass(frozen=True)
class Origin:
    """The origin of an upstream."""

    scheme: str
    host: str
    port: int

    @classmethod
    def parse(cls, url: str) -> "Origin":
        """Raises `ValueError` for a URL that is not exactly an origin."""
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.path not in ("", "/"):
            raise ValueError(f"the upstream must be an origin such as https://llm.example.org, not {printable(url)}")
        if parts.query or parts.fragment or parts.username is not None:
            raise ValueError("the upstream must have no query, fragment or user name; pass the API key separately")
        host = parts.hostname.lower().encode("idna").decode()
        return cls(parts.scheme, host, parts.port or _default_port(parts.scheme))

    def matches(self, scheme: str, host: str, port: int | None) -> bool:
        """Whether a URL's parts name this origin."""
        return (scheme, host.lower(), port or _default_port(scheme)) == (self.scheme, self.host, self.port)

    @property
    def authority(self) -> str:
        """The host, with the port if it is not the scheme's default."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == _default_port(self.scheme) else f"{host}:{self.port}"

    def __str__(self) -> str:
        return f"{self.scheme}://{self.authority}"


def _default_port(scheme: str) -> int:
    return 443 if scheme == "https" else 80


def printable(text: str) -> str:
    """The start of a peer's text, fit for a line of a log: at most 200 printable characters."""
    return "".join(c for c in text[:200] if c.isprintable())
