"""What vLLM is told, and must not be told, where the machine computes confidentially: one table.

"Confidentially" is either flag: the virtual machine's memory is encrypted (SEV-SNP, TDX), or the GPU is in CC mode. The
facts were read in the issues that the rows name (vllm#N is github.com/vllm-project/vllm/issues/N); none was tried here.
Names of arguments were compared with vLLM 0.32.0's parser, which `tests/unit/engine/test_cc_settings.py` does again.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


class ForbiddenFlag(Exception):
    """An argument or variable that cannot work under confidential computing. The message says which, why, and what
    to do."""


@dataclass(frozen=True)
class Settings:
    """What an engine's start gets."""

    environment: Mapping[str, str]
    arguments: tuple[str, ...]


@dataclass(frozen=True)
class Set:
    """A variable of the engine's environment that is set, and why."""

    variable: str
    value: str
    reason: str
    source: str


@dataclass(frozen=True)
class Refused:
    """An argument (`--name`) or a variable of the environment that is refused where `when` holds for its value.

    `when` gets None for an argument without a value. `short` is vLLM's second spelling.
    """

    name: str
    when: Callable[[str | None], bool]
    reason: str
    source: str
    short: str | None = None


def confidential(cpu: str, cc_mode: str) -> bool:
    """Whether either flag is up: `cpu` as `evidence.cpu` names it, `cc_mode` as the claims give the GPUs'."""
    return cpu != "simulated" or cc_mode in ("on", "devtools")


def settings(cc_mode: bool) -> Settings:
    """What is added to an engine's start; nothing where `cc_mode`, the answer of `confidential`, is False."""
    return Settings({row.variable: row.value for row in SET} if cc_mode else {}, ())


def refuse(arguments: Sequence[str], environment: Mapping[str, str]) -> None:
    """Raises `ForbiddenFlag` for the first argument or variable that a row of `REFUSED` is about.

    Arguments are read as vLLM reads them: `--a b` and `--a=b`, underscores for hyphens, abbreviations, `-O0`,
    `--compilation-config.cudagraph_mode`. An abbreviation is taken for every argument that it may stand for.
    """
    for name, value in options(arguments):
        for row in REFUSED:
            if _means(name, row) and row.when(_inner(name, value)):
                shown = name if value is None else f"{name} {value}"
                raise ForbiddenFlag(f"{shown}: {row.reason} ({row.source}). Remove it from the model's arguments")
    for variable, value in environment.items():
        for row in REFUSED:
            if variable == row.name and row.when(value):
                raise ForbiddenFlag(f"{variable}={value}: {row.reason} ({row.source}). Remove it from the environment")


def options(arguments: Sequence[str]) -> Iterator[tuple[str, str | None]]:
    """Each option with its value, None without one; spelled with hyphens, up to the first dot, as vLLM's parser does.

    What follows an option and does not start with a hyphen is taken for its value; -1 is one too.
    """
    for place, argument in enumerate(arguments):
        if not argument.startswith("-") or _number(argument):
            continue
        name, equals, value = argument.partition("=")
        if not name.startswith("--") and name.startswith("-O") and name != "-O":
            name, equals, value = "-O", "=", name[2:]
        head, dot, tail = name.partition(".")
        following = arguments[place + 1] if place + 1 < len(arguments) else None
        if equals:
            found: str | None = value
        elif following is not None and (not following.startswith("-") or _number(following)):
            found = following
        else:
            found = None
        yield (head.replace("_", "-") if head.startswith("--") else head) + dot + tail, found


def stands_for(name: str, flag: str) -> bool:
    """Whether an option's name is `flag` or an abbreviation that argparse may take for it."""
    return name == flag or (len(name.lstrip("-")) > 0 and flag.startswith(name) and name not in _WHOLE)


def _means(name: str, row: Refused) -> bool:
    head = name.partition(".")[0]
    return stands_for(head, row.name) or (row.short is not None and stands_for(head, row.short))


def _inner(name: str, value: str | None) -> str | None:
    """The value as JSON, where the name goes on behind a dot: `--a.b c` sets {"b": "c"}."""
    inner: Any = value
    parts = name.split(".")[1:]
    for part in reversed(parts):
        inner = {part.rstrip("+"): inner}
    return json.dumps(inner) if parts else value


def _number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _always(_: str | None) -> bool:
    return True


def _not_zero(value: str | None) -> bool:
    return value is None or not _number(value) or float(value) != 0


def _zero(value: str | None) -> bool:
    return value is not None and _number(value) and float(value) == 0


def _true(value: str | None) -> bool:
    return (value or "").strip().lower() not in ("", "0", "false", "no", "off")


def _expandable(value: str | None) -> bool:
    spaceless = (value or "").replace(" ", "").lower()
    return "expandable_segments:" in spaceless and "expandable_segments:false" not in spaceless


def _without_graphs(value: str | None) -> bool:
    """Whether a compilation config (JSON, or the level alone) says that no CUDA graphs are captured."""
    found = _object(value)
    if found is None:
        # vLLM explains a text that is neither itself.
        return value is not None and value.strip() == "0"
    mode = found.get("cudagraph_mode", found.get("cudagraph-mode", "unset"))
    sizes = found.get("max_cudagraph_capture_size", found.get("cudagraph_capture_sizes", "unset"))
    return str(mode).strip().upper() in ("NONE", "0") or str(sizes).strip() in ("0", "[]", "[0]")


def _hisparse(value: str | None) -> bool:
    found = _object(value)
    return found is not None and any(key.replace("-", "_") == "hisparse_config" for key in found)


def _object(value: str | None) -> dict[str, Any] | None:
    try:
        found = json.loads(value or "")
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


_V2 = "the V2 model runner reads requests through views of host memory, which under CC returns garbage with status 200"
_HOST = "it needs cudaHostRegister, which CC does not allow: the engine would not start"
_EAGER = "without CUDA graphs every kernel is launched by itself, and a launch costs twice as much under CC"
_BOUNCE = "weights would pass through CC's bounce buffer, 40 GB in 8 to 15 s each way"

SET: tuple[Set, ...] = (Set("VLLM_USE_V2_MODEL_RUNNER", "0", _V2, "vllm#57224"),)

REFUSED: tuple[Refused, ...] = (
    Refused("VLLM_USE_V2_MODEL_RUNNER", _true, _V2, "vllm#57224"),
    Refused("--watermark-config", _always, f"it turns the V2 model runner on: {_V2}", "vllm#57224"),
    Refused("--attention-config", _hisparse, f"HiSparse turns the V2 runner on: {_V2}", "vllm#57224", "-ac"),
    Refused("--enable-sleep-mode", _always, _BOUNCE, "CC facts, sleep mode"),
    Refused("--enable-cumem-allocator", _always, "it is the allocator of sleep mode, refused too", "CC facts"),
    Refused("VLLM_SERVER_DEV_MODE", _true, "it opens routes that put the engine to sleep", "CC facts, sleep mode"),
    Refused("--cpu-offload-gb", _not_zero, _HOST, "vllm#55428"),
    Refused("--cpu-offload-params", _always, _HOST, "vllm#55428"),
    Refused("--offload-backend", _always, _HOST, "vllm#55428"),
    Refused("--offload-group-size", _not_zero, _HOST, "vllm#55428"),
    Refused("--offload-num-in-group", _always, _HOST, "vllm#55428"),
    Refused("--offload-prefetch-step", _always, _HOST, "vllm#55428"),
    Refused("--offload-params", _always, _HOST, "vllm#55428"),
    Refused("--kv-offloading-size", _not_zero, _HOST, "vllm#55428"),
    Refused("--kv-offloading-backend", _always, _HOST, "vllm#55428"),
    # Older releases; newer ones do not know it and would not start.
    Refused("--swap-space", _not_zero, _HOST, "vllm#55428"),
    Refused(
        "--kv-transfer-config", _always, "its connectors register host memory or send KV out of the TEE", "vllm#55428"
    ),
    Refused("--ec-transfer-config", _always, "its connectors register host memory or send data out", "vllm#55428"),
    Refused("VLLM_USE_SIMPLE_KV_OFFLOAD", _true, _HOST, "vllm#55428"),
    Refused("--enforce-eager", _always, _EAGER, "CC facts, launches"),
    Refused("--optimization-level", _zero, f"level 0 is eager: {_EAGER}", "CC facts, launches", "-O"),
    Refused("--compilation-config", _without_graphs, _EAGER, "CC facts, launches", "-cc"),
    Refused("--max-cudagraph-capture-size", _zero, _EAGER, "CC facts, launches"),
    Refused("--cudagraph-capture-sizes", _zero, _EAGER, "CC facts, launches"),
    Refused("--config", _always, "its file's arguments would not be checked: write them here", "adytum"),
    Refused("PYTORCH_CUDA_ALLOC_CONF", _expandable, "expandable_segments gains nothing under CC", "CC facts"),
    Refused("PYTORCH_ALLOC_CONF", _expandable, "expandable_segments gains nothing under CC", "CC facts"),
)

_WHOLE = frozenset({"--watermark"})
"""Arguments whose whole name begins a refused one's: no abbreviations. A test compares this with vLLM's parser."""
