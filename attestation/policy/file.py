"""The policy's TOML file: reading each kind of value, and writing a file with comments. Every key has to be there."""

import difflib
import re
import tomllib
from collections.abc import Collection, Iterable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any, Literal

from adytum.attestation.core.ed25519 import small_order
from adytum.attestation.core.errors import PolicyFileError
from adytum.attestation.core.limits import LIMITS
from adytum.attestation.reference import release

KEYS: Mapping[str, tuple[str, str]] = {
    # Key: what it decides (the comment in a written file), what to write if it is missing.
    "cpu": (
        'Whose CPU evidence counts. "simulated" proves nothing about hardware: only for a local demo.',
        'cpu = ["sev-snp"], or cpu = ["simulated"] for a local demo',
    ),
    "measurement": (
        'What the CPU measured at launch: a list of 96 hexadecimal digits each, or "any".',
        'measurement = ["<96 hexadecimal digits>"], or measurement = "any"',
    ),
    "release": (
        "The signed release that names launch and configuration: its file (with FILE.sig beside it), the keys that "
        'may sign it, the lowest sequence that counts; or "none".',
        'release = { file = "release.json", keys = ["<64 hexadecimal digits>"], minimum = 1 }, or release = "none"',
    ),
    "minimum_tcb": (
        "Oldest firmware that counts, by line (Milan, Genoa, Turin) and part (bootloader, tee, snp, microcode, fmc); "
        'or "any". A line that is not listed is refused.',
        'minimum_tcb = { Genoa = { bootloader = 9, tee = 0, snp = 23, microcode = 72 } }, or minimum_tcb = "any"',
    ),
    "debug": (
        '"refused", or "allowed": a guest with debugging on, whose memory its host can read.',
        'debug = "refused"',
    ),
    "migration": ('"refused", or "allowed": a guest that a migration agent may move.', 'migration = "refused"'),
    "vmpl": ('Privilege levels (0 to 3) from which the SNP report may come, or "any".', 'vmpl = [0], or vmpl = "any"'),
    "platform_set": (
        'SNP platform flags that have to be set: a list, or "any".',
        'platform_set = ["tsme"], or platform_set = "any"',
    ),
    "platform_clear": (
        'SNP platform flags that must not be set: a list, or "any".',
        'platform_clear = ["smt"], or platform_clear = "any"',
    ),
    "chips": (
        'Accepted processors: a list of SNP chip ids, 128 hexadecimal digits each, or "any".',
        'chips = ["<128 hexadecimal digits>"], or chips = "any"',
    ),
    "pcrs": (
        'Values that registers of the vTPM must have, where the evidence has to come from one; or "any".',
        'pcrs = { 4 = "<64 hexadecimal digits>" }, or pcrs = "any"',
    ),
    "tdx_status": (
        'Accepted verdicts of Intel on a TDX platform: a list like "UpToDate", or "any".',
        'tdx_status = ["UpToDate"], or tdx_status = "any"',
    ),
    "cpu_revocation": (
        '"required": the CPU\'s certificates were checked against a current list of revoked ones. "optional".',
        'cpu_revocation = "required", or cpu_revocation = "optional"',
    ),
    "gpu": (
        'How many GPUs have to be attested: a number, "required" (at least one), or "none" (no GPU is expected).',
        'gpu = "required", a number, or gpu = "none" if no GPU is expected',
    ),
    "gpu_architecture": (
        'Accepted architectures: a list of "hopper", "blackwell", or "any".',
        'gpu_architecture = ["hopper"], or gpu_architecture = "any"',
    ),
    "cc_mode": (
        'Accepted confidential-computing modes of the GPUs: "on", "off", "devtools", or "none" (there is no GPU).',
        'cc_mode = ["on"], or cc_mode = ["none"] if there is no GPU',
    ),
    "gpu_driver": (
        'Accepted driver versions: a list of exact ones and of ">=" with the oldest, or "any".',
        'gpu_driver = [">=550.90.07"], or gpu_driver = "any"',
    ),
    "gpu_vbios": (
        'Accepted VBIOS versions: a list of exact ones and of ">=" with the oldest, or "any".',
        'gpu_vbios = [">=96.00.9F.00.01"], or gpu_vbios = "any"',
    ),
    "gpu_rims": (
        '"required": each GPU\'s measurements agree with NVIDIA\'s manifests of driver and VBIOS. "optional".',
        'gpu_rims = "required", or gpu_rims = "optional"',
    ),
    "gpu_revocation": (
        '"required": NVIDIA\'s OCSP answers are there for every GPU certificate that needs one. "optional".',
        'gpu_revocation = "required", or gpu_revocation = "optional"',
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
        'Accepted padding of lengths: "pad", "constant" (and of times), "off".',
        'padding = ["constant", "pad"], or padding = ["constant", "off", "pad"] where lengths do not matter',
    ),
    "sandbox": (
        'Accepted isolation of the engines: "full", "none".',
        'sandbox = ["full"], or sandbox = ["full", "none"] where the engines need not be isolated',
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
        self._folder = Path() if isinstance(source, bytes) else Path(source).parent
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

    def release(self, key: str) -> release.RequiredRelease | Literal["none"]:
        """`none`, or a signed release beside the policy."""
        value = self._values[key]
        if value == "none":
            return "none"
        if not isinstance(value, dict) or value.keys() != {"file", "keys", "minimum"}:
            raise _unusable(key)
        file, keys = value["file"], value["keys"]
        if not isinstance(file, str) or not file or not isinstance(keys, list) or not keys:
            raise _unusable(key)
        found = frozenset(_digest(f"{key}.keys", item, 32) for item in keys)
        if any(map(small_order, found)):
            raise PolicyFileError(f"the policy's {key!r} has a key under which anybody can sign; put the publisher's")
        minimum = _number(f"{key}.minimum", value["minimum"], LIMITS.sequence)
        return release.load(self._folder / file, file, found, minimum)

    def choices(self, key: str, choices: Collection[str]) -> frozenset[str] | Literal["any"]:
        """`any`, or a list of words of a closed set."""
        return "any" if self._values[key] == "any" else self.words(key, choices)

    def numbers(self, key: str, largest: int) -> frozenset[int] | Literal["any"]:
        """`any`, or a list of numbers from 0 to `largest`, not empty."""
        value = self._values[key]
        if value == "any":
            return "any"
        if not isinstance(value, list) or not value:
            raise _unusable(key)
        return frozenset(_number(key, item, largest) for item in value)

    def count(self, key: str, words: Collection[str], largest: int) -> int | str:
        """One of a closed set of words, or a number from 1 to `largest`."""
        value = self._values[key]
        if type(value) is int and value > 0:
            return _number(key, value, largest)
        return self.word(key, words)

    def levels(
        self, key: str, lines: Mapping[str, Collection[str]]
    ) -> Mapping[str, Mapping[str, int]] | Literal["any"]:
        """`any`, or a table of a closed set of names, each of which has a table of levels from 0 to 255."""
        value = self._values[key]
        if value == "any":
            return "any"
        if not isinstance(value, dict) or not value:
            raise _unusable(key)
        found: dict[str, dict[str, int]] = {}
        for line, levels in value.items():
            components = lines[_choice(key, line, lines)]
            if not isinstance(levels, dict) or not levels:
                raise _unusable(key)
            found[line] = {_choice(key, name, components): _number(key, level, 255) for name, level in levels.items()}
        return found

    def registers(self, key: str) -> Mapping[int, bytes] | Literal["any"]:
        """`any`, or a table from PCR numbers to 32-byte hashes."""
        value = self._values[key]
        if value == "any":
            return "any"
        if not isinstance(value, dict) or not value:
            raise _unusable(key)
        if not all(re.fullmatch("[0-9]|1[0-9]|2[0-3]", index) for index in value):
            raise PolicyFileError(f"the policy's {key!r} names a register that is not 0 to 23")
        return {int(index): _digest(f"{key}.{index}", hash_, 32) for index, hash_ in value.items()}

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


def _number(key: str, value: object, largest: int) -> int:
    if type(value) is not int or not 0 <= value <= largest:
        raise PolicyFileError(f"the policy's {key!r} has a value that is not a number from 0 to {largest}")
    return value


def _unusable(key: str) -> PolicyFileError:
    return PolicyFileError(f"the policy's {key!r} has a value of a wrong kind, or an empty one. Write: {KEYS[key][1]}")


Value = str | int | Iterable[str] | Iterable[int] | Iterable[bytes] | Mapping[Any, Any]


def render(values: Mapping[str, Value]) -> str:
    """A policy file with a comment over every key. `values` has every key of `KEYS`."""
    lines = ["# What this client requires of a backend before it sends anything. Every key has to be here."]
    # `models` is last in KEYS: as a table of its own it would swallow the keys that follow it.
    for key, (comment, _) in KEYS.items():
        lines += ["", f"# {comment}"]
        value = values[key]
        if key == "models" and isinstance(value, Mapping):
            lines.append(f"[{key}]")
            lines += [f"{_quote(name)} = {_write(root)}" for name, root in sorted(value.items())]
        else:
            lines.append(f"{key} = {_write(value)}")
    return "\n".join(lines) + "\n"


def _write(value: Value | bytes) -> str:
    if isinstance(value, bytes):
        return _quote(value.hex())
    if isinstance(value, str):
        return _quote(value)
    if isinstance(value, int):
        return str(value)
    if isinstance(value, Mapping):
        return f"{{ {', '.join(f'{name} = {_write(item)}' for name, item in sorted(value.items()))} }}"
    return f"[{', '.join(sorted(map(_write, value)))}]"


def _quote(text: str) -> str:
    escaped = "".join(
        f"\\u{ord(c):04x}" if ord(c) < 0x20 or ord(c) == 0x7F else f"\\{c}" if c in '"\\' else c for c in text
    )
    return f'"{escaped}"'
