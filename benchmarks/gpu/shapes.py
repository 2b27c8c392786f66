"""Model folders of the published shapes without weights: `config.json` and a tokenizer of the right vocabulary.

vLLM fills them with random numbers (`--load-format dummy`): speed and memory are the real models', the text is noise.
The tokenizers have one word for each token, so that a prompt of random tokens keeps its length if its text is tokenized
again. Values: the models' published `config.json`. `small` has the same architectures in a size for a CPU. Standard
library only.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SPECIALS = ("<unk>", "<bos>", "<eos>", "<pad>", "<mask>")
_IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}
_TEMPLATE = "{{ bos_token }} {% for m in messages %}{{ m['content'] }} {% endfor %}"

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "quantization_config": {
        "quant_method": "awq",
        "bits": 4,
        "group_size": 128,
        "version": "gemm",
        "zero_point": True,
    },
    **_IDS,
}
# Only the language model: the vision tower has 0.42 of 27.4 billion parameters, and text does not pass through it.
GEMMA: dict[str, Any] = {
    "architectures": ["Gemma3ForCausalLM"],
    "model_type": "gemma3_text",
    "hidden_size": 5376,
    "intermediate_size": 21504,
    "num_hidden_layers": 62,
    "num_attention_heads": 32,
    "num_key_value_heads": 16,
    "head_dim": 128,
    "vocab_size": 262208,
    "max_position_embeddings": 131072,
    "sliding_window": 1024,
    "sliding_window_pattern": 6,
    "query_pre_attn_scalar": 168,
    "rope_theta": 1000000.0,
    "rope_local_base_freq": 10000.0,
    "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    "rms_norm_eps": 1e-6,
    "hidden_activation": "gelu_pytorch_tanh",
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    **_IDS,
}
E5: dict[str, Any] = {
    "architectures": ["XLMRobertaModel"],
    "model_type": "xlm-roberta",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "vocab_size": 250002,
    "max_position_embeddings": 514,
    "type_vocab_size": 1,
    "layer_norm_eps": 1e-5,
    "hidden_act": "gelu",
    "position_embedding_type": "absolute",
    "torch_dtype": "float16",
    **_IDS,
    # RoBERTa's positions start after it.
    "pad_token_id": 1,
    "bos_token_id": 0,
}
_SMALL = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 2048,
    "sliding_window": 64,
    "query_pre_attn_scalar": 64,
}


@dataclass(frozen=True)
class Model:
    """One model of the run. `arguments`: vLLM's, in addition to the backend's."""

    name: str
    task: str
    config: dict[str, Any]
    arguments: tuple[str, ...] = ()

    @property
    def id(self) -> str:
        """The id that the backend serves; the prefix keeps it apart from the real model's."""
        return f"random/{self.name}"

    def small(self) -> "Model":
        """The same architecture in a size for a CPU."""
        config = {name: _SMALL.get(name, value) for name, value in self.config.items()}
        if self.config["model_type"] == "xlm-roberta":
            config |= {"num_attention_heads": 4, "max_position_embeddings": 514}
        config.pop("rope_scaling", None)
        if config["max_position_embeddings"] > 2048:
            config["max_position_embeddings"] = 2048
        return Model(self.name, self.task, config, self.arguments)


MODELS = (
    Model("llama-3.3-70b-awq", "generate", LLAMA),
    Model("gemma-3-27b", "generate", GEMMA),
    Model("e5", "embed", E5),
)


def write(model: Model, folder: Path) -> None:
    """Writes a folder that vLLM and `adytum models plan` accept as the model's."""
    folder.mkdir(parents=True, exist_ok=True)
    _save(folder / "config.json", model.config)
    _save(folder / "tokenizer.json", tokenizer(model.config["vocab_size"]))
    names = dict(zip(("unk_token", "bos_token", "eos_token", "pad_token", "mask_token"), SPECIALS, strict=True))
    longest = model.config["max_position_embeddings"] - (2 if model.task == "embed" else 0)
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": longest, **names}
    _save(folder / "tokenizer_config.json", about | ({"chat_template": _TEMPLATE} if model.task == "generate" else {}))
    if model.task == "embed":
        # These files make it an embedding model, as sentence-transformers saves one.
        parts = ("Transformer", "Pooling", "Normalize")
        folders = ("", "1_Pooling", "2_Normalize")
        modules = [
            {"idx": place, "name": str(place), "path": path, "type": f"sentence_transformers.models.{part}"}
            for place, (part, path) in enumerate(zip(parts, folders, strict=True))
        ]
        _save(folder / "modules.json", modules)
        (folder / "1_Pooling").mkdir(exist_ok=True)
        size = model.config["hidden_size"]
        _save(
            folder / "1_Pooling" / "config.json", {"word_embedding_dimension": size, "pooling_mode_mean_tokens": True}
        )


def tokenizer(size: int) -> dict[str, Any]:
    """A `tokenizer.json` of `size` words, separated by white space: the special ones, then "w5", "w6", ..."""
    words = [*SPECIALS, *(f"w{number}" for number in range(len(SPECIALS), size))]
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": number, "content": word, **special} for number, word in enumerate(SPECIALS)],
        "normalizer": None,
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": None,
        "decoder": None,
        "model": {
            "type": "WordLevel",
            "vocab": {word: number for number, word in enumerate(words)},
            "unk_token": "<unk>",
        },
    }


def _save(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value) + "\n")
