"""What a model folder says about memory, read from `config.json` and the safetensors headers; no weights are loaded.

A safetensors file starts with the length of its header, eight bytes little-endian, and the header, JSON with each
tensor's place in the file (https://huggingface.co/docs/safetensors). If a folder holds no weights yet, their size is
computed from the architecture, for the families that `_parameters` knows.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CONFIG, INDEX = "config.json", "model.safetensors.index.json"
_MAX_JSON = 100_000_000
"""Bytes; the limit that safetensors itself sets for a header."""
_ENCODERS = ("Bert", "Roberta", "XLMRoberta")
"""Architectures, by the start of their name, that read a text in one step and keep no KV cache."""
_ROBERTA = ("Roberta", "XLMRoberta")
_DTYPES = {"float32": 4, "bfloat16": 2, "float16": 2}
_NAMES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
_GEMMA3 = {
    "vocab_size": 262_208,
    "max_position_embeddings": 131_072,
    "head_dim": 256,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "tie_word_embeddings": True,
    "sliding_window_pattern": 6,
}
"""transformers' defaults (`Gemma3TextConfig`): the published files omit values that equal them."""


class ShapeError(Exception):
    """The folder cannot be read as a model. The message names the file and says what to do."""


@dataclass(frozen=True)
class Quantization:
    """How the linear layers are stored. `group` is the number of inputs that share a scale, 0 for a whole column."""

    method: str
    bits: int
    group: int
    zeros: bool

    @property
    def name(self) -> str:
        """For people: "AWQ INT4", "FP8"."""
        method = self.method.upper() + " " if self.method in ("awq", "gptq") else ""
        return method + ("FP8" if self.method == "fp8" else f"INT{self.bits}")


@dataclass(frozen=True)
class Shape:
    """What determines a model's memory. Heads and their size are those of one layer's keys, and equal its values'."""

    architecture: str
    weight_bytes: int
    """Of the tensors as stored. vLLM loads fp32 as 16-bit numbers, so for those it is twice what the GPU will hold."""
    estimated: bool
    """Whether `weight_bytes` is computed from the architecture, because there are no files to measure."""
    weights: str
    """For people: "AWQ INT4", "FP8", "bf16"."""
    global_layers: int
    """Layers that keep every token."""
    sliding_layers: int
    """Layers that keep the last `window` tokens."""
    window: int | None
    kv_heads: int
    head_dim: int
    positions: int
    """Longest text in tokens."""
    vocabulary: int
    hidden: int
    encoder: bool
    """Whether it reads a text in one step and keeps no KV cache."""

    def token_bytes(self, element: int) -> int:
        """KV cache of one token in one layer, in bytes. `element` is the size of a number in it: 2, or 1 for fp8."""
        return 0 if self.encoder else 2 * self.kv_heads * self.head_dim * element


def read(folder: Path) -> Shape:
    """The shape of a model folder. Raises `ShapeError`."""
    config = _json(folder / CONFIG)
    files = _weight_files(folder)
    return from_config(config, _stored(files) if files else None, str(folder / CONFIG))


def from_config(config: dict[str, Any], weight_bytes: int | None = None, name: str = CONFIG) -> Shape:
    """The shape that a parsed `config.json` describes. Raises `ShapeError`, which names `name`.

    Without `weight_bytes` they are computed, within 1 % of the real files for the architectures of `_parameters`.
    """
    try:
        text = _text(config)
        architecture = str((config.get("architectures") or ["unknown"])[0])
        encoder = architecture.startswith(_ENCODERS)
        quantization = _quantization(config)
        layers = int(text["num_hidden_layers"])
        sliding, window = (0, None) if encoder else _sliding(text, layers)
        heads = int(text["num_attention_heads"])
        positions = int(text["max_position_embeddings"])
        if architecture.startswith(_ROBERTA):
            # RoBERTa's positions start after the padding token's.
            positions -= int(text.get("pad_token_id", 1)) + 1
        shape = Shape(
            architecture=architecture,
            weight_bytes=_estimate(config, text, quantization) if weight_bytes is None else weight_bytes,
            estimated=weight_bytes is None,
            weights=quantization.name if quantization else _NAMES[_dtype(config)],
            global_layers=layers - sliding,
            sliding_layers=sliding,
            window=window,
            kv_heads=int(text.get("num_key_value_heads") or heads),
            head_dim=int(text.get("head_dim") or text["hidden_size"] // heads),
            positions=positions,
            vocabulary=int(text["vocab_size"]),
            hidden=int(text["hidden_size"]),
            encoder=encoder,
        )
    except KeyError as error:
        raise ShapeError(f"{name}: {error.args[0]} is missing; take config.json from the model's own folder") from error
    except (TypeError, ValueError, ArithmeticError, AttributeError) as error:
        raise ShapeError(f"{name}: a value is invalid ({error}); take it from the model's own") from error
    except ShapeError as error:
        raise ShapeError(f"{name}: {error}") from error
    sizes = (layers, heads, shape.kv_heads, shape.head_dim, positions, shape.vocabulary, shape.hidden, window or 1)
    if min(*sizes, shape.weight_bytes) < 1:
        raise ShapeError(f"{name}: a size is zero or negative; take config.json from the model's own folder")
    return shape


def _text(config: dict[str, Any]) -> dict[str, Any]:
    """The part about the language model, with the defaults of its family."""
    text = dict(config.get("text_config") or config)
    kind = str(text.get("model_type") or config.get("model_type"))
    if "kv_lora_rank" in text:
        raise ShapeError("multi-head latent attention is not supported: set kv_cache_bytes instead of planning")
    return {**_GEMMA3, **text} if kind in ("gemma3", "gemma3_text") else text


def _sliding(text: dict[str, Any], layers: int) -> tuple[int, int | None]:
    """How many layers have a window, and how long it is in tokens."""
    types = text.get("layer_types")
    if types is not None:
        unknown = sorted(set(types) - {"full_attention", "sliding_attention"})
        if unknown:
            raise ShapeError(f"layers of type {', '.join(unknown)} are not supported: set kv_cache_bytes instead")
        if len(types) != layers:
            raise ShapeError(f"{len(types)} layer_types for {layers} layers; take config.json from the model's own")
        count = types.count("sliding_attention")
    elif text.get("sliding_window") is None or text.get("use_sliding_window") is False:
        count = 0
    elif pattern := text.get("sliding_window_pattern") or text.get("_sliding_window_pattern"):
        count = layers - layers // int(pattern)
    else:
        count = layers
    return (count, int(text["sliding_window"])) if count else (0, None)


def _dtype(config: dict[str, Any]) -> str:
    name = str(config.get("torch_dtype") or config.get("dtype") or _text(config).get("torch_dtype") or "float32")
    if name not in _DTYPES:
        raise ShapeError(f"numbers of type {name} are not supported")
    return name


def _quantization(config: dict[str, Any]) -> Quantization | None:
    found = config.get("quantization_config")
    if found is None:
        return None
    method = str(found["quant_method"])
    if method in ("awq", "gptq"):
        # Both formats store zero points, symmetric or not.
        return Quantization(method, int(found["bits"]), max(0, int(found["group_size"])), True)
    if method == "fp8":
        return Quantization("fp8", 8, 0, False)
    if method == "compressed-tensors":
        # The published models have one group of layers; several would need each layer's name.
        groups = list(found["config_groups"].values())
        if not groups:
            raise ShapeError("quantization_config has no config_groups; take config.json from the model's own folder")
        weights = groups[0]["weights"]
        if weights["type"] == "float":
            return Quantization("fp8", int(weights["num_bits"]), 0, False)
        return Quantization(method, int(weights["num_bits"]), int(weights["group_size"] or 0), not weights["symmetric"])
    raise ShapeError(f"quantisation {method} is not supported: use awq, gptq, fp8 or compressed-tensors")


def _estimate(config: dict[str, Any], text: dict[str, Any], quantization: Quantization | None) -> int:
    """Bytes of the weights, from the architecture alone."""
    element = _DTYPES[_dtype(config)]
    linear, biases, other = _parameters(config, text)
    total = (biases + other) * element
    for inputs, outputs, count in linear:
        if quantization is None:
            size = inputs * outputs * element
        else:
            groups = -(-inputs // quantization.group) if quantization.group else 1
            size = inputs * outputs * quantization.bits // 8 + groups * outputs * 2
            if quantization.zeros:
                size += groups * outputs * quantization.bits // 8
        total += size * count
    return total


def _parameters(config: dict[str, Any], text: dict[str, Any]) -> tuple[list[tuple[int, int, int]], int, int]:
    """The linear layers (inputs, outputs, how many), their biases, and the numbers that are never quantised."""
    kind = str(text.get("model_type") or config.get("model_type"))
    hidden, inner = int(text["hidden_size"]), int(text["intermediate_size"])
    layers, vocabulary = int(text["num_hidden_layers"]), int(text["vocab_size"])
    if kind in ("xlm-roberta", "roberta", "bert"):
        linear = [(hidden, hidden, 4 * layers), (hidden, inner, layers), (inner, hidden, layers)]
        embedded = vocabulary + int(text["max_position_embeddings"]) + int(text.get("type_vocab_size", 1))
        # The pooler is published with the model, although mean pooling does not use it.
        return linear, layers * (5 * hidden + inner), (embedded + hidden + 1 + 2 + 4 * layers) * hidden
    if kind not in ("llama", "mistral", "qwen2", "qwen3", "gemma3", "gemma3_text"):
        raise ShapeError(f"the weights of model_type {kind} cannot be computed: put its safetensors files beside it")
    heads = int(text["num_attention_heads"])
    head = int(text.get("head_dim") or hidden // heads)
    queries, values = heads * head, int(text.get("num_key_value_heads") or heads) * head
    linear = [
        *((hidden, queries, layers), (hidden, values, 2 * layers), (queries, hidden, layers)),
        *((hidden, inner, 2 * layers), (inner, hidden, layers)),
    ]
    gemma = kind.startswith("gemma3")
    biased = text.get("attention_bias") or kind == "qwen2"
    normed = 2 * head if gemma or kind == "qwen3" else 0
    embeddings = vocabulary * hidden * (1 if text.get("tie_word_embeddings", False) else 2)
    other = embeddings + layers * ((4 if gemma else 2) * hidden + normed) + hidden
    if "vision_config" in config:
        other += _vision(config["vision_config"], hidden)
    return linear, layers * (queries + 2 * values) if biased else 0, other


def _vision(vision: dict[str, Any], hidden: int) -> int:
    """Numbers of Gemma 3's image encoder (SigLIP) and of the projection to `hidden`; quantised models keep them."""
    width, inner, patch = int(vision["hidden_size"]), int(vision["intermediate_size"]), int(vision["patch_size"])
    embedded = 3 * patch * patch * width + width + (int(vision["image_size"]) // patch) ** 2 * width
    layer = 4 * (width * width + width) + 2 * width * inner + inner + width + 4 * width
    return embedded + int(vision["num_hidden_layers"]) * layer + 2 * width + width * hidden + width


def _weight_files(folder: Path) -> list[Path]:
    """The files that vLLM would load: those that the index names, or without one all that end in .safetensors."""
    index = folder / INDEX
    if not index.exists():
        return sorted(path for path in folder.glob("*.safetensors") if not path.name.startswith("consolidated"))
    places = _json(index).get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(name, str) for name in places.values()):
        raise ShapeError(f"{index}: no weight_map with names of files; take it from the model's own folder")
    names = sorted(set(places.values()))
    for name in names:
        if Path(name).name != name:
            raise ShapeError(f"{index}: {name!r} is not a file of this folder")
        if not (folder / name).is_file():
            raise ShapeError(f"{folder / name} is missing, the index names it: copy the model again")
    return [folder / name for name in names]


def _stored(files: list[Path]) -> int:
    return sum(end - begin for path in files for begin, end in _spans(path))


def _spans(path: Path) -> Iterator[tuple[int, int]]:
    """Where each tensor of a file begins and ends. Raises `ShapeError`, also for a truncated file."""
    again = "copy the file again"
    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if length > min(_MAX_JSON, size - 8):
                raise ShapeError(f"{path} is not a safetensors file, or truncated: {again}")
            header = json.loads(stream.read(length))
    except OSError as error:
        raise ShapeError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ShapeError(f"{path}: its header is not JSON: {again}") from error
    place = 0
    try:
        spans = sorted(tuple(tensor["data_offsets"]) for name, tensor in header.items() if name != "__metadata__")
        for begin, end in spans:
            if begin != place or end < begin:
                raise ValueError("tensors overlap or leave holes")
            place = end
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ShapeError(f"{path}: its header is malformed: {again}") from error
    if not spans:
        raise ShapeError(f"{path} holds no tensors: {again}")
    if 8 + length + place != size:
        raise ShapeError(f"{path} has {size} bytes, but its header says {8 + length + place}: {again}")
    yield from spans


def _json(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as stream:
            found = json.loads(stream.read(_MAX_JSON))
    except OSError as error:
        raise ShapeError(f"{path} cannot be read ({error.strerror}): is this a model's folder?") from error
    except (ValueError, RecursionError) as error:
        raise ShapeError(f"{path} is not JSON: copy it again from the model's own folder") from error
    if not isinstance(found, dict):
        raise ShapeError(f"{path} is not a JSON object: copy it again from the model's own folder")
    return found
