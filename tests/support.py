"""Helpers that several test packages use."""

import hashlib
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def config_text(
    *, port: int, runtime: Path, api_keys: list[str] | None = None, changes: dict[str, str] | None = None
) -> str:
    """The demo's configuration on another port and folder. `changes`: whole lines by their name."""
    text = (ROOT / "deploy" / "config" / "demo.toml").read_text()
    lines = {"port": str(port), "runtime_directory": f'"{runtime}"', **(changes or {})}
    if api_keys:
        digests = ", ".join(f'"{hashlib.sha256(key.encode()).hexdigest()}"' for key in api_keys)
        lines["authentication"] = f'"keys"\nkey_sha256 = [{digests}]'
    for name, value in lines.items():
        text, count = re.subn(rf"(?m)^{name} = .*$", lambda _, n=name, v=value: f"{n} = {v}", text)
        assert count == 1, name
    return text
