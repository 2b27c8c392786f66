"""Which models fit on one GPU, and the arguments of each engine that make them fit.

A pure computation: sizes in, a plan out (docs/how-to/placement.md has the formulas). Bytes are counted as vLLM 0.32.0
counts them, in blocks that a model's layers share, so that an engine with the plan's numbers neither refuses to start
nor takes another engine's memory. GB is 10**9 bytes.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from adytum.inference.core.config import Config, Model
from adytum.inference.engine.placement.shapes import Shape, ShapeError, read
from adytum.inference.engine.run.cc_settings import options, stands_for

GB = 10**9
MIB = 2**20
CARDS = {"80GB": 81_559 * MIB, "94GB": 95_830 * MIB, "141GB": 143_771 * MIB}
"""Memory as `nvidia-smi` reports it, by the advertised size: H100, H100 NVL, H200."""
RESERVE = GB
"""Given to no engine: CUDA shows about half a GB less than `nvidia-smi`, and the rest covers what the figures below
miss."""
GENERATING_OVERHEAD = 3 * GB
POOLING_OVERHEAD = 2 * GB
"""Per process, in addition to weights and KV cache: CUDA's context, activations, CUDA graphs, libraries' workspaces.
Reported as 2 to 3 GB, not measured here; a pooling model has no KV cache and captures fewer graphs."""
CUDA_CONTEXT = GB
"""The part of the overhead that a process has taken before vLLM looks at how much memory is free."""
PREFILL_TOKENS = 2048
"""Tokens of one step. A 70B model's step is bound by computation with far fewer, and every layer with a window holds
twice as many tokens beyond the window while a prompt is read. vLLM's own default on such a card is 8192."""
_STEPS_IN_FLIGHT = 2
"""On a GPU vLLM schedules a step while the previous one runs, and frees a window's blocks only after both."""
BLOCK_TOKENS = 16
MAX_SEQS = 256
POOLING_SEQS = 64
"""A pooling model reads `PREFILL_TOKENS` at a time; more sequences than that fill with short texts only wait."""
DEFAULT_LENGTH = 4096
"""Tokens of prompt and answer together that a plan counts for each sequence."""

# Arguments that the plan decides, each with the configuration's name for it, or None if there is no such name.
_DECIDED = {
    "--kv-cache-memory-bytes": "kv_cache_bytes",
    "--kv-cache-dtype": "kv_cache_dtype",
    "--max-model-len": "max_model_len",
    "--max-num-seqs": "max_num_seqs",
    "--gpu-memory-utilization": None,
    "--device-memory-utilization": None,
}
# Arguments that change a model's needs in ways that are not counted here.
_NOT_COUNTED = (
    *("--tensor-parallel-size", "-tp", "--pipeline-parallel-size", "-pp", "--decode-context-parallel-size", "-dcp"),
    *("--speculative-config", "-sc", "--spec-model", "--enable-lora", "--block-size", "--num-gpu-blocks-override"),
    *("--disable-hybrid-kv-cache-manager", "--disable-sliding-window", "--quantization", "-q", "--hf-overrides"),
)


class PlacementError(Exception):
    """The models do not fit, or cannot be planned. The message says by how many GB, or what to change.

    `missing` is in bytes, 0 for any other reason.
    """

    def __init__(self, text: str, missing: int = 0) -> None:
        super().__init__(text)
        self.missing = missing


@dataclass(frozen=True)
class Blocks:
    """How vLLM lays out a model's KV cache: layers in groups of one size, and blocks of tokens for a whole group.

    The group's size is the number of layers of the rarer kind, and the last group of the other kind is padded with
    layers that do not exist: Gemma 3 27B has 10 global layers and 52 with a window, which make one and six groups of
    10.
    """

    global_groups: int
    sliding_groups: int
    window: int
    block_bytes: int
    in_flight: int
    tokens: int = BLOCK_TOKENS
    """Of one block; 16 on CUDA, 128 on the CPU."""

    @classmethod
    def of(cls, shape: Shape, element: int, in_flight: int, tokens: int = BLOCK_TOKENS) -> "Blocks":
        """For numbers of `element` bytes, with `in_flight` tokens in unfinished steps. Not for an encoder's shape."""
        counts = [count for count in (shape.global_layers, shape.sliding_layers) if count]
        size = min(counts)
        if max(counts) < 1.5 * size:
            size = max(counts)
        return cls(
            global_groups=-(-shape.global_layers // size),
            sliding_groups=-(-shape.sliding_layers // size),
            window=shape.window or 0,
            block_bytes=tokens * size * shape.token_bytes(element),
            in_flight=in_flight,
            tokens=tokens,
        )

    def sequence(self, length: int) -> int:
        """Blocks of a sequence of `length` tokens whose prompt has been read."""
        return self._of(length, min(self.window, length))

    def first(self, length: int) -> int:
        """Blocks that must be free for a sequence of `length` tokens before vLLM admits it."""
        return self._of(length, min(self.window - 1 + self.in_flight, length))

    def needed(self, sequences: float, length: int) -> int:
        """Bytes for that many sequences of `length` tokens if one prompt is still being read.

        One block is vLLM's own.
        """
        held = self.sequence(length)
        return (1 + self.first(length) - held + math.ceil(sequences * held)) * self.block_bytes

    def sequences(self, size: int, length: int) -> float:
        """How many sequences of `length` tokens fit into `size` bytes if one prompt is still being read."""
        held = self.sequence(length)
        return max(0.0, (size // self.block_bytes - 1 - (self.first(length) - held)) / held)

    def longest(self, size: int, limit: int) -> int:
        """The longest sequence, in tokens and up to `limit`, with which an engine of `size` bytes starts; 0 if none."""
        low, high = 0, limit
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.needed(1, middle) <= size else (low, middle - 1)
        return low

    def _of(self, length: int, kept: int) -> int:
        # One more, because a window need not start at a block's start.
        sliding = -(-kept // self.tokens) + 1
        return self.global_groups * -(-length // self.tokens) + self.sliding_groups * sliding


@dataclass(frozen=True)
class EnginePlan:
    """One engine's part. Sizes are in bytes unless stated otherwise."""

    id: str
    shape: Shape
    kv_cache_dtype: str
    overhead: int
    kv_cache_bytes: int
    """0 for a model without a KV cache."""
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    length: int
    """Tokens that were counted for each sequence."""
    sequences: float | None
    """How many of them the KV cache holds; None for a model without one."""
    utilization: float
    """Share of the GPU's memory, rounded down: vLLM does not start if less is free once CUDA's context exists."""

    @property
    def total(self) -> int:
        """All memory that the process uses."""
        return self.shape.weight_bytes + self.overhead + self.kv_cache_bytes

    @property
    def flags(self) -> tuple[str, ...]:
        """The plan as arguments of `vllm serve`."""
        kv = ("--kv-cache-memory-bytes", str(self.kv_cache_bytes)) if self.kv_cache_bytes else ()
        dtype = ("--kv-cache-dtype", self.kv_cache_dtype) if self.sequences is not None else ()
        return (
            *kv,
            *dtype,
            *("--max-model-len", str(self.max_model_len), "--max-num-seqs", str(self.max_num_seqs)),
            *("--max-num-batched-tokens", str(self.max_num_batched_tokens)),
            # Without it each engine would expect 92 % of the GPU to be free.
            *("--gpu-memory-utilization", f"{self.utilization:.3f}"),
        )


@dataclass(frozen=True)
class Plan:
    """The parts of all engines of one GPU. `memory` is the GPU's, in bytes."""

    memory: int
    engines: tuple[EnginePlan, ...]

    @property
    def left(self) -> int:
        """Bytes given to no engine, without `RESERVE`."""
        return self.memory - RESERVE - sum(engine.total for engine in self.engines)

    def table(self) -> str:
        """For people: a line per engine, what is left, and the engines' arguments."""
        width = max(len("model"), *(len(engine.id) for engine in self.engines))
        lines = [
            f"{'model':<{width}} {'weights':>9} {'GB':>6} {'KV':>6} {'KiB/token':>9} {'window MiB':>10} "
            f"{'other GB':>8} "
            f"{'KV GB':>6} {'longest':>7} {'sequences':>14} {'of GPU':>6}"
        ]
        lines += [f"{engine.id:<{width}} {_row(engine)}" for engine in self.engines]
        used = sum(engine.total for engine in self.engines)
        lines.append(
            f"GPU {self.memory / GB:.1f} GB ({self.memory // MIB} MiB): {used / GB:.1f} planned, "
            f"{RESERVE / GB:.1f} kept free, {self.left / GB:.1f} left"
        )
        if any(engine.shape.estimated for engine in self.engines):
            lines.append("~ computed from config.json, as the folder has no safetensors files")
        return "\n".join([*lines, "", *(f"{engine.id}: {' '.join(engine.flags)}" for engine in self.engines)])


def _row(engine: EnginePlan) -> str:
    shape, element = engine.shape, _element(engine.kv_cache_dtype)
    weights = ("~" if shape.estimated else "") + f"{shape.weight_bytes / GB:.1f}"
    token = shape.token_bytes(element)
    per_token = f"{shape.global_layers * token / 1024:.1f}" if token else "-"
    windows = shape.sliding_layers * token * (shape.window or 0)
    sequences = "-" if engine.sequences is None else f"{engine.sequences:.1f} of {engine.length}"
    kind = "-" if not token else "fp8" if element == 1 else "16-bit"
    return (
        f"{shape.weights:>9} {weights:>6} {kind:>6} {per_token:>9} {f'{windows / MIB:.0f}' if windows else '-':>10} "
        f"{engine.overhead / GB:>8.1f} {engine.kv_cache_bytes / GB:>6.1f} {engine.max_model_len:>7} {sequences:>14} "
        f"{engine.utilization:>6.3f}"
    )


@dataclass(frozen=True)
class _Wish:
    """A model and its configuration, before the KV cache is divided. `blocks` is None for a model without one."""

    model: Model
    shape: Shape
    blocks: Blocks | None
    prefill: int
    length: int

    @property
    def overhead(self) -> int:
        return POOLING_OVERHEAD if self.model.task == "embed" else GENERATING_OVERHEAD

    @property
    def least(self) -> int:
        """The least KV cache with which the engine starts and serves one sequence of the planned length."""
        if self.model.kv_cache_bytes is not None:
            return self.model.kv_cache_bytes
        return 0 if self.blocks is None else self.blocks.needed(1, self.model.max_model_len or self.length)

    def share(self, sequences: float) -> int:
        """KV cache for that many sequences, or for as many as the configuration allows."""
        if self.blocks is None or self.model.kv_cache_bytes is not None:
            return self.least
        most = self.model.max_num_seqs or MAX_SEQS
        return max(self.least, self.blocks.needed(min(sequences, most), self.length))


def plan(config: Config, shapes: Mapping[str, Shape], memory: int, length: int = DEFAULT_LENGTH) -> Plan:
    """Divides a GPU of `memory` bytes between the configuration's models. `shapes` are by model id.

    1. Weights and overhead of every model are taken from the memory, and each KV cache that the configuration fixes.
    2. Every other model with a KV cache gets enough for one sequence of its `max_model_len`, else of `length`.
    3. The rest is divided so that each can hold the same number of sequences of `length` tokens at a time. A model with
       a smaller `max_num_seqs` gets no more than that needs, and the others share what it does not take.
    4. A model without `max_model_len` accepts texts as long as its part holds, up to the positions that it knows.
    Raises `PlacementError` if 1 and 2 do not fit.
    """
    if length < 1:
        raise PlacementError("the length to plan for has to be at least one token")
    wishes = [_wish(model, shapes[model.id], length) for model in config.models]
    fixed = sum(wish.shape.weight_bytes + wish.overhead for wish in wishes)
    available = memory - RESERVE - fixed
    least = sum(wish.least for wish in wishes)
    if least > available:
        raise _does_not_fit(wishes, memory, fixed, least)
    low, high = 1000, 1000 * MAX_SEQS
    while low < high:
        middle = (low + high + 1) // 2
        fits = sum(wish.share(middle / 1000) for wish in wishes) <= available
        low, high = (middle, high) if fits else (low, middle - 1)
    return Plan(memory, tuple(_engine(wish, wish.share(low / 1000), memory) for wish in wishes))


def memory_of(text: str) -> int:
    """Bytes of a GPU: the size of a card in `CARDS` ("80GB"), or an exact number with GB, GiB or MiB.

    So "80GB" is 85.5 * 10**9 bytes, as an H100 reports, and "79GB" is 79 * 10**9. Raises `PlacementError`.
    """
    spaceless = text.replace(" ", "")
    if spaceless in CARDS:
        return CARDS[spaceless]
    match = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,9})?)(GB|GiB|MiB)", spaceless)
    if match is None or float(match[1]) == 0:
        raise PlacementError(
            f"{text!r} is not a size of GPU memory: write a card's ({', '.join(CARDS)}) or a number with GB, GiB or MiB"
        )
    return int(float(match[1]) * {"GB": GB, "GiB": 1024 * MIB, "MiB": MIB}[match[2]])


def plan_command(config: Config, gpu_memory: str, length: int = DEFAULT_LENGTH) -> str:
    """`adytum models plan`: reads the models' folders and returns the plan as text. Raises `PlacementError`."""
    shapes = {}
    for model in config.models:
        folder = Path(model.source)
        if not folder.is_dir():
            raise PlacementError(
                f"{model.id}: {model.source} is not a folder here: plan on a machine with the model, or put its "
                "config.json there"
            )
        try:
            shapes[model.id] = read(folder)
        except ShapeError as error:
            raise PlacementError(f"{model.id}: {error}") from error
    return plan(config, shapes, memory_of(gpu_memory), length).table()


def _wish(model: Model, shape: Shape, length: int) -> _Wish:
    longest = model.max_model_len or shape.positions
    if longest > shape.positions:
        raise PlacementError(f"{model.id}: max_model_len = {longest}, but the model knows {shape.positions} positions")
    # An encoder does not read a text in parts.
    prefill = max(PREFILL_TOKENS, longest) if shape.encoder else PREFILL_TOKENS
    prefill = _checked_arguments(model) or prefill
    blocks = None if shape.encoder else Blocks.of(shape, _element(model.kv_cache_dtype), _STEPS_IN_FLIGHT * prefill)
    wish = _Wish(model, shape, blocks, prefill, min(length, longest))
    if blocks is not None and model.kv_cache_bytes is not None:
        needed = blocks.needed(1, model.max_model_len or wish.length)
        if needed > model.kv_cache_bytes:
            missing = needed - model.kv_cache_bytes
            raise PlacementError(
                f"{model.id}: kv_cache_bytes is {missing / GB:.2f} GB less than one sequence of "
                f"{model.max_model_len or wish.length} tokens needs; set it to {needed}",
                missing,
            )
    return wish


def _checked_arguments(model: Model) -> int | None:
    """The model's own `--max-num-batched-tokens`, if there is one."""
    found = None
    for name, value in options(model.arguments):
        for flag, setting in _DECIDED.items():
            if stands_for(name, flag):
                instead = f"set {setting} instead" if setting else "remove it"
                raise PlacementError(f"{model.id}: the plan decides {flag}; {instead}")
        for flag in _NOT_COUNTED:
            if stands_for(name, flag):
                raise PlacementError(f"{model.id}: the plan does not count what {flag} needs; remove it")
        if stands_for(name, "--max-num-batched-tokens"):
            if value is None or not value.isdecimal() or int(value) < 1:
                raise PlacementError(f"{model.id}: write --max-num-batched-tokens as a plain number")
            found = int(value)
    return found


def _engine(wish: _Wish, size: int, memory: int) -> EnginePlan:
    model, shape, blocks = wish.model, wish.shape, wish.blocks
    sequences = None if blocks is None else blocks.sequences(size, wish.length)
    longest = shape.positions if blocks is None else blocks.longest(size, shape.positions)
    most = POOLING_SEQS if sequences is None else max(1, min(MAX_SEQS, int(sequences)))
    checked = shape.weight_bytes + wish.overhead - CUDA_CONTEXT + size
    return EnginePlan(
        id=model.id,
        shape=shape,
        kv_cache_dtype=model.kv_cache_dtype,
        overhead=wish.overhead,
        kv_cache_bytes=size,
        max_model_len=model.max_model_len or longest,
        max_num_seqs=model.max_num_seqs or most,
        max_num_batched_tokens=wish.prefill,
        length=wish.length,
        sequences=sequences,
        utilization=math.floor(1000 * checked / memory) / 1000,
    )


def _does_not_fit(wishes: list[_Wish], memory: int, fixed: int, least: int) -> PlacementError:
    missing = fixed + least - (memory - RESERVE)
    parts = ", ".join(
        f"{wish.model.id} {wish.shape.weight_bytes / GB:.1f} + {wish.overhead / GB:.1f} + {wish.least / GB:.1f}"
        for wish in wishes
    )
    return PlacementError(
        f"does not fit by {missing / GB:.1f} GB: weights, overhead and the least KV cache need "
        f"{(fixed + least) / GB:.1f} GB ({parts}), and of {memory / GB:.1f} GB {(memory - RESERVE) / GB:.1f} can be "
        'used. Take fewer models, smaller weights, kv_cache_dtype = "fp8", or a shorter max_model_len or length',
        missing,
    )


def _element(dtype: str) -> int:
    return 1 if dtype == "fp8" else 2
