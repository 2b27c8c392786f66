"""The policy's TOML file: reading each kind of value, and writing a file with comments. Every key has to be there."""

import difflib
import re
import tomllib
from collections.abc import Collection, Iterable, Mapping
from os import PathLike
from typing import Literal

from attestation.errors import PolicyFileError
from attestation.limits import LIMITS

KEYS: Mapping[str, tuple[str, str]] = {
    # Key: what it decides (the comment in a written file), what to write where it is missing.
    "cpu": (
        'Whose CPU evidence counts. "simulated" proves nothing about hardware: only for a local demo.',
        'cpu = ["sev-snp"], or cpu = ["simulated"] for a local demo',
    ),
    "measurement": (
        'What the CPU measured at launch: a list of 96 hexadecimal digits each, or "any".',
        'measurement = ["<96 hexadecimal digits>"], or measurement = "any"',
    ),
    "gpu": (
        '"required": GPUs have to be attested. "none": no GPU is expected.',
        'gpu = "required", or gpu = "none" where no GPU is expected',
    ),
    "cc_mode": (
        'Accepted confidential-computing modes of the GPUs: "on", "off", "devtools", or "none" (there is no GPU).',
        'cc_mode = ["on"], or cc_mode = ["none"] where there is no GPU',
    ),
    "configuration": (
        'Accepted SHA-256 of the backend\'s configuration: a list of 64 hexadecimal digits each, or "any".',
        'configuration = ["<64 hexadecimal digits>"], or configuration = "any"',
    ),
    "software": ('Accepted software versions: a list, or "any".', 'software = ["0.1.0"], or software = "any"'),
    "replica": ('Accepted names of the backend: a list, or "any".', 'replica = ["<name>"], or replica = "any"'),
    "tls": (
        'SHA-256 of the accepted TLS keys: a list of 64 hexadecimal digits each, "none" (no TLS), or "any".',
        'tls = ["<64 hexadecimal digits>"], tls = "none", or tls = "any"',
    ),
    "padding": (
        'Accepted padding of lengths: "pad", "off".',
        'padding = ["pad"], or padding = ["off", "pad"] where lengths do not matter',
    ),
    "maximum_age_s": ("How old the evidence may be, in seconds.", "maximum_age_s = 300"),
    "clock_skew_s": ("How far the backend's clock and this one may be apart, in seconds.", "clock_skew_s = 60"),
    "models": (
        'Model id = root hash of its weights, 64 hexadecimal digits; a model that is not listed is refused. Or "any".',
        'models = "any", or a table [models] with "<model id>" = "<64 hexadecimal digits>"',
    ),
}


class PolicyFile:
    """A policy file whose keys are exactly `KEYS`; each method reads one kind of value."""

    def __init__(self, source: bytes | PathLike[str]) -> None:
        self._values = _load(source)
        unknown = sorted(self._values.keys() - KEYS.keys())
        if unknown:
            near = difflib.get_close_matches(unknown[0], KEYS, 1)
            advice = f"did you mean {near[0]!r}?" if near else f"the keys are {', '.join(KEYS)}"
            raise PolicyFileError(f"the policy has an unknown key {unknown[0]!r}; {advice}")
        missing = [key for key in KEYS if key not in self._values]
        if missing:
            raise PolicyFileError(
                f"the policy lacks {missing[0]!r}, and what is not stated is not skipped. Write: {KEYS[missing[0]][1]}"
            )

    def word(self, key: str, choices: Collection[str]) -> str:
        """One of a closed set of words."""
        value = self._values[key]
        if not isinstance(value, str):
            raise _unusable(key)
        return _choice(key, value, choices)

    def words(self, key: str, choices: Collection[str]) -> frozenset[str]:
        """A list of words of a closed set, not empty."""
        return frozenset(_choice(key, value, choices) for value in self._list(key))

    def names(self, key: str) -> frozenset[str] | Literal["any"]:
        """`any`, or a list of free words."""
        return "any" if self._values[key] == "any" else frozenset(self._list(key))

    def digests(self, key: str, size: int) -> frozenset[bytes] | Literal["any"]:
        """`any`, or a list of hashes."""
        if self._values[key] == "any":
            return "any"
        return frozenset(_digest(key, value, size) for value in self._list(key))

    def is_word(self, key: str, word: str) -> bool:
        """Whether the value is this word instead of a list."""
        return self._values[key] == word

    def seconds(self, key: str) -> int:
        """A number of seconds."""
        value = self._values[key]
        if type(value) is not int or value < 0:
            raise _unusable(key)
        return value

    def roots(self, key: str) -> Mapping[str, bytes] | Literal["any"]:
        """`any`, or a table from names to 32-byte hashes."""
        value = self._values[key]
        if value == "any":
            return "any"
        if not isinstance(value, dict) or not value:
            raise _unusable(key)
        return {name: _digest(f"{key}.{name}", root, 32) for name, root in value.items()}

    def _list(self, key: str) -> list[str]:
        value = self._values[key]
        if not isinstance(value, list) or not value or not all(isinstance(item, str) for item in value):
            raise _unusable(key)
        return value


def _load(source: bytes | PathLike[str]) -> dict[str, object]:
    if isinstance(source, bytes):
        data = source
    else:
        try:
            with open(source, "rb") as file:
                data = file.read(LIMITS.policy + 1)
        except (OSError, ValueError) as error:
            raise PolicyFileError(f"the policy file {source} cannot be read: {error}") from error
    if len(data) > LIMITS.policy:
        raise PolicyFileError(f"the policy is larger than {LIMITS.policy} bytes")
    try:
        return tomllib.loads(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise PolicyFileError("the policy is not UTF-8 text") from error
    except (ValueError, RecursionError) as error:
        raise PolicyFileError(f"the policy is not TOML: {error}") from error


def _choice(key: str, value: str, choices: Collection[str]) -> str:
    if value in choices:
        return value
    near = difflib.get_close_matches(value.lower(), choices, 1)
    advice = f"did you mean {near[0]!r}?" if near else f"choose from {', '.join(sorted(choices))}"
    raise PolicyFileError(f"the policy's {key!r} has {value!r}, which does not exist; {advice}")


def _digest(key: str, value: object, size: int) -> bytes:
    if not isinstance(value, str) or not re.fullmatch(rf"[0-9a-fA-F]{{{2 * size}}}", value):
        raise PolicyFileError(f"the policy's {key!r} has a value that is not {2 * size} hexadecimal digits")
    return bytes.fromhex(value)


def _unusable(key: str) -> PolicyFileError:
    return PolicyFileError(f"the policy's {key!r} has a value of a wrong kind, or an empty one. Write: {KEYS[key][1]}")


Value = str | int | Iterable[str] | Iterable[bytes] | Mapping[str, bytes]


def render(values: Mapping[str, Value]) -> str:
    """A policy file with a comment over every key. `values` has every key of `KEYS`."""
    lines = ["# What this client requires of a backend before it sends anything. Every key has to be here."]
    # `models` is last in KEYS: it may be a table, and a table swallows the keys that follow it.
    for key, (comment, _) in KEYS.items():
        lines += ["", f"# {comment}"]
        value = values[key]
        if isinstance(value, Mapping):
            lines.append(f"[{key}]")
            lines += [f"{_quote(name)} = {_quote(root.hex())}" for name, root in sorted(value.items())]
        elif isinstance(value, str):
            lines.append(f"{key} = {_quote(value)}")
        elif isinstance(value, int):
            lines.append(f"{key} = {value}")
        else:
            items = sorted(item.hex() if isinstance(item, bytes) else item for item in value)
            lines.append(f"{key} = [{', '.join(map(_quote, items))}]")
    return "\n".join(lines) + "\n"


def _quote(text: str) -> str:
    escaped = "".join(
        f"\\u{ord(c):04x}" if ord(c) < 0x20 or ord(c) == 0x7F else f"\\{c}" if c in '"\\' else c for c in text
    )
    return f'"{escaped}"'
