"""What vLLM is told, and must not be told, if the machine computes confidentially: one table.

"Confidentially" is either flag: the virtual machine's memory is encrypted (SEV-SNP, TDX), or the GPU is in CC mode. The
facts come from the issues that the rows name (vllm#N is github.com/vllm-project/vllm/issues/N); none was tried here.
Names of arguments were compared with vLLM 0.32.0's parser, which `tests/unit/engine/test_cc_settings.py` does again.
An engine's environment has no rows of this kind: it is fixed (`process.environment`), and no configuration adds to it.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any


class ForbiddenFlag(Exception):
    """An argument that cannot work under confidential computing. The message says which, why, and what to do."""


@dataclass(frozen=True)
class Variable:
    """A variable of the engine's environment that is set, and why."""

    name: str
    value: str
    reason: str
    source: str


@dataclass(frozen=True)
class Forbidden:
    """An argument (`--name`) that is refused if `when` returns True for its value.

    `when` gets None for an argument without a value. `short` is vLLM's second spelling.
    """

    name: str
    when: Callable[[str | None], bool]
    reason: str
    source: str
    short: str | None = None


def confidential(cpu: str, cc_mode: str) -> bool:
    """Whether either flag is set: `cpu` as in `evidence.cpu`, `cc_mode` as the claims state it for the GPUs."""
    return cpu != "simulated" or cc_mode in ("on", "devtools")


def environment(cc_mode: bool) -> dict[str, str]:
    """What is added to an engine's environment; empty if `cc_mode`, the answer of `confidential`, is False."""
    return {row.name: row.value for row in VARIABLES} if cc_mode else {}


def refuse(arguments: Sequence[str]) -> None:
    """Raises `ForbiddenFlag` for the first argument that a row of `FORBIDDEN` refuses.

    Arguments are read as vLLM reads them: `--a b` and `--a=b`, underscores for hyphens, abbreviations, `-O0`,
    `--compilation-config.cudagraph_mode`. An abbreviation counts as every argument that it may stand for.
    """
    for name, value in options(arguments):
        for row in FORBIDDEN:
            if _means(name, row) and row.when(_inner(name, value)):
                shown = name if value is None else f"{name} {value}"
                raise ForbiddenFlag(f"{shown}: {row.reason} ({row.source}). Remove it from the model's arguments")


def options(arguments: Sequence[str]) -> Iterator[tuple[str, str | None]]:
    """Each option with its value, None without one. Names up to the first dot get hyphens, as in vLLM's parser.

    An argument after an option is its value unless it starts with a hyphen; -1 is a value too.
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


def _means(name: str, row: Forbidden) -> bool:
    head = name.partition(".")[0]
    return stands_for(head, row.name) or (row.short is not None and stands_for(head, row.short))


def _inner(name: str, value: str | None) -> str | None:
    """The value, as JSON if the name has a dot: `--a.b c` sets {"b": "c"}."""
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


def _without_graphs(value: str | None) -> bool:
    """Whether a compilation config (JSON, or the level alone) turns the capture of CUDA graphs off."""
    found = _object(value)
    if found is None:
        # For a text that is neither, vLLM itself reports the error.
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

VARIABLES = (Variable("VLLM_USE_V2_MODEL_RUNNER", "0", _V2, "vllm#57224"),)

FORBIDDEN = (
    Forbidden("--watermark-config", _always, f"it turns the V2 model runner on: {_V2}", "vllm#57224"),
    Forbidden("--attention-config", _hisparse, f"HiSparse turns the V2 runner on: {_V2}", "vllm#57224", "-ac"),
    Forbidden("--enable-sleep-mode", _always, _BOUNCE, "CC facts, sleep mode"),
    Forbidden("--enable-cumem-allocator", _always, "it is the allocator of sleep mode, refused too", "CC facts"),
    Forbidden("--cpu-offload-gb", _not_zero, _HOST, "vllm#55428"),
    Forbidden("--cpu-offload-params", _always, _HOST, "vllm#55428"),
    Forbidden("--offload-backend", _always, _HOST, "vllm#55428"),
    Forbidden("--offload-group-size", _not_zero, _HOST, "vllm#55428"),
    Forbidden("--offload-num-in-group", _always, _HOST, "vllm#55428"),
    Forbidden("--offload-prefetch-step", _always, _HOST, "vllm#55428"),
    Forbidden("--offload-params", _always, _HOST, "vllm#55428"),
    Forbidden("--kv-offloading-size", _not_zero, _HOST, "vllm#55428"),
    Forbidden("--kv-offloading-backend", _always, _HOST, "vllm#55428"),
    Forbidden(
        "--kv-transfer-config", _always, "its connectors register host memory or send KV out of the TEE", "vllm#55428"
    ),
    Forbidden("--ec-transfer-config", _always, "its connectors register host memory or send data out", "vllm#55428"),
    Forbidden("--enforce-eager", _always, _EAGER, "CC facts, launches"),
    Forbidden("--optimization-level", _zero, f"level 0 is eager: {_EAGER}", "CC facts, launches", "-O"),
    Forbidden("--compilation-config", _without_graphs, _EAGER, "CC facts, launches", "-cc"),
    Forbidden("--max-cudagraph-capture-size", _zero, _EAGER, "CC facts, launches"),
    Forbidden("--cudagraph-capture-sizes", _zero, _EAGER, "CC facts, launches"),
    Forbidden("--config", _always, "its file's arguments would not be checked: write them here", "adytum"),
)

_WHOLE = frozenset({"--watermark"})
"""Arguments whose whole name is the beginning of a refused one: no abbreviations. A test compares this with vLLM's
parser."""
