"""The plan of a GPU: the published models' sizes, the shipped configurations, and what vLLM itself counts."""

import copy
import dataclasses
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adytum.inference.core.config import Config, load
from adytum.inference.engine.placement.placement import (
    DEFAULT_LENGTH,
    GB,
    MAX_SEQS,
    MIB,
    Blocks,
    PlacementError,
    Plan,
    memory_of,
    plan,
    plan_command,
)
from adytum.inference.engine.placement.shapes import Shape, ShapeError, from_config, read
from tests.support import ROOT

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "torch_dtype": "float16",
    "tie_word_embeddings": False,
    "quantization_config": {
        "quant_method": "awq",
        "bits": 4,
        "group_size": 128,
        "version": "gemm",
        "zero_point": True,
    },
}
GEMMA: dict[str, Any] = {
    "architectures": ["Gemma3ForConditionalGeneration"],
    "model_type": "gemma3",
    "torch_dtype": "bfloat16",
    # As published: no vocabulary, positions or pattern, which are transformers' defaults.
    "text_config": {
        "model_type": "gemma3_text",
        "hidden_size": 5376,
        "intermediate_size": 21504,
        "num_hidden_layers": 62,
        "num_attention_heads": 32,
        "num_key_value_heads": 16,
        "head_dim": 128,
        "sliding_window": 1024,
    },
    "vision_config": {
        "hidden_size": 1152,
        "image_size": 896,
        "intermediate_size": 4304,
        "num_hidden_layers": 27,
        "patch_size": 14,
    },
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
    "pad_token_id": 1,
    "type_vocab_size": 1,
    "torch_dtype": "float16",
}
H100 = 81_559 * MIB
LLAMA_ID, GEMMA_ID = "meta-llama/Llama-3.3-70B-Instruct", "google/gemma-3-27b-it"
E5_ID = "intfloat/multilingual-e5-large-instruct"


def compressed(bits: int, kind: str, group: int | None) -> dict[str, Any]:
    """Gemma as llm-compressor writes it."""
    weights = {"num_bits": bits, "type": kind, "group_size": group, "symmetric": True}
    found = {"quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": weights}}}
    return {**GEMMA, "quantization_config": found}


INT4, FP8 = compressed(4, "int", 128), compressed(8, "float", None)
GEMMAS = {"h100": INT4, "h100-llama": INT4, "h100-gemma-e5": GEMMA}


def shapes(gemma: dict[str, Any]) -> dict[str, Shape]:
    return {LLAMA_ID: from_config(LLAMA), GEMMA_ID: from_config(gemma), E5_ID: from_config(E5)}


def shipped(name: str) -> Config:
    return load(ROOT / "deploy" / "config" / f"{name}.toml")


def changed(config: Config, place: int, **values: object) -> Config:
    """The configuration with other values for one model, validated again."""
    models = [model.model_dump() for model in config.models]
    models[place] |= values
    return Config(**{**config.model_dump(), "models": models, "sha256": config.sha256})


def planned(name: str, length: int = DEFAULT_LENGTH) -> Plan:
    return plan(shipped(name), shapes(GEMMAS[name]), H100, length)


@pytest.mark.parametrize(
    ("config", "name", "gigabytes"),
    [
        (LLAMA, "AWQ INT4", 39.8),
        (GEMMA, "bf16", 54.9),
        (FP8, "FP8", 29.3),
        (INT4, "INT4", 16.9),
        (compressed(4, "int", 32), "INT4", 18.1),
        (E5, "fp16", 1.12),
    ],
)
def test_weights_of_the_published_models(config: dict[str, Any], name: str, gigabytes: float) -> None:
    shape = from_config(config)
    assert shape.weights == name
    assert shape.estimated
    assert shape.weight_bytes / GB == pytest.approx(gigabytes, rel=0.01)


def test_kv_cache_of_the_published_models() -> None:
    llama, gemma, e5 = (from_config(config) for config in (LLAMA, GEMMA, E5))
    assert (llama.global_layers, llama.sliding_layers, llama.window) == (80, 0, None)
    assert 80 * llama.token_bytes(2) == 320 * 1024
    assert 80 * llama.token_bytes(1) == 160 * 1024
    assert (gemma.global_layers, gemma.sliding_layers, gemma.window) == (10, 52, 1024)
    assert 10 * gemma.token_bytes(2) == 80 * 1024
    assert 52 * 1024 * gemma.token_bytes(2) == 416 * MIB
    assert (gemma.vocabulary, gemma.positions) == (262_208, 131_072)
    assert e5.encoder
    assert e5.token_bytes(2) == 0
    assert e5.positions == 512


@pytest.mark.parametrize(
    ("values", "sliding"), [({}, 80), ({"use_sliding_window": False}, 0), ({"sliding_window": None}, 0)]
)
def test_windows_that_are_switched_off(values: dict[str, Any], sliding: int) -> None:
    assert from_config({**LLAMA, "sliding_window": 4096, **values}).sliding_layers == sliding


def test_layer_types_count_like_the_pattern() -> None:
    types = ["full_attention" if (layer + 1) % 6 == 0 else "sliding_attention" for layer in range(62)]
    listed = copy.deepcopy(GEMMA)
    listed["text_config"]["layer_types"] = types
    assert from_config(listed) == from_config(GEMMA)
    listed["text_config"]["layer_types"] = ["full_attention"] * 62
    assert from_config(listed).sliding_layers == 0


@pytest.mark.parametrize("model", ["llama-awq", "gemma3"])
def test_the_estimate_is_what_the_files_hold(models: Path, model: str) -> None:
    stored = read(models / model)
    assert not stored.estimated
    assert stored.weight_bytes < (models / model / "model.safetensors").stat().st_size
    config = json.loads((models / model / "config.json").read_text())
    assert dataclasses.replace(from_config(config), estimated=False) == stored


def test_the_demo_embedder_lacks_the_pooler_only(models: Path) -> None:
    config = json.loads((models / "e5" / "config.json").read_text())
    hidden = config["hidden_size"]
    assert from_config(config).weight_bytes - read(models / "e5").weight_bytes == 4 * (hidden * hidden + hidden)


def safetensors(path: Path, *sizes: int) -> None:
    """A file with one tensor of each size."""
    place, header = 0, {}
    for number, size in enumerate(sizes):
        header[f"t{number}"] = {"dtype": "U8", "shape": [size], "data_offsets": [place, place + size]}
        place += size
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(place))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model of two shards, with a third file that its index does not name."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(LLAMA))
    safetensors(folder / "a.safetensors", 100, 20)
    safetensors(folder / "b.safetensors", 3)
    safetensors(folder / "other.safetensors", 1000)
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"x": "a.safetensors", "y": "a.safetensors", "z": "b.safetensors"}})
    )
    return folder


def test_shards_are_added_up(folder: Path) -> None:
    assert read(folder).weight_bytes == 123
    (folder / "model.safetensors.index.json").unlink()
    assert read(folder).weight_bytes == 1123
    # The same weights in another layout, which vLLM does not load.
    safetensors(folder / "consolidated.00.safetensors", 1123)
    assert read(folder).weight_bytes == 1123
    for name in ("a", "b", "other"):
        (folder / f"{name}.safetensors").unlink()
    assert read(folder).estimated


def rewrite(name: str, **values: object) -> Callable[[Path], object]:
    """Replaces values of a JSON file; None removes one."""

    def change(folder: Path) -> None:
        found = {**json.loads((folder / name).read_text()), **values}
        (folder / name).write_text(json.dumps({key: value for key, value in found.items() if value is not None}))

    return change


def cut(path: Path, length: int) -> None:
    path.write_bytes(path.read_bytes()[:length])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda f: (f / "config.json").unlink(), r"config.json cannot be read \(No such file.*model's folder"),
        (lambda f: (f / "config.json").write_text("{"), "config.json is not JSON: copy it again"),
        (lambda f: (f / "config.json").write_text("[]"), "config.json is not a JSON object"),
        (rewrite("config.json", num_hidden_layers=None), "config.json: num_hidden_layers is missing; take"),
        (rewrite("config.json", num_hidden_layers="many"), "config.json: a value is invalid"),
        (rewrite("config.json", num_hidden_layers=0), "config.json: a size is zero or negative"),
        (rewrite("config.json", quantization_config={"quant_method": "gguf"}), "quantisation gguf is not supported"),
        (
            rewrite("config.json", quantization_config={"quant_method": "compressed-tensors", "config_groups": {}}),
            "has no config_groups",
        ),
        (rewrite("config.json", layer_types=["mamba"] * 80), "layers of type mamba are not supported"),
        (rewrite("config.json", layer_types=["full_attention"] * 79), "79 layer_types for 80 layers"),
        (rewrite("config.json", kv_lora_rank=512), "latent attention"),
        (lambda f: (f / "b.safetensors").unlink(), "b.safetensors is missing, the index names it: copy the model"),
        (rewrite("model.safetensors.index.json", weight_map={"x": "../a.safetensors"}), "not a file of this folder"),
        (rewrite("model.safetensors.index.json", weight_map=None), "index.json: no weight_map"),
        (lambda f: cut(f / "a.safetensors", 5), "a.safetensors is not a safetensors file"),
        (lambda f: cut(f / "a.safetensors", 60), "a.safetensors is not a safetensors file, or truncated"),
        (lambda f: cut(f / "a.safetensors", -1), "a.safetensors has .* bytes, but its header says .*: copy"),
        (lambda f: (f / "a.safetensors").write_bytes(b"\2" + bytes(7) + b"xx"), "its header is not JSON"),
        (lambda f: (f / "a.safetensors").write_bytes(b"\2" + bytes(7) + b"[]"), "its header is malformed"),
        (lambda f: safetensors(f / "a.safetensors", 5, -2), "its header is malformed"),
        (lambda f: safetensors(f / "a.safetensors"), "a.safetensors holds no tensors"),
    ],
)
def test_a_folder_that_cannot_be_read(folder: Path, change: Callable[[Path], object], reason: str) -> None:
    change(folder)
    with pytest.raises(ShapeError, match=reason):
        read(folder)


@pytest.mark.parametrize("end", range(0, 200, 7))
def test_a_truncated_file_is_never_read(folder: Path, end: int) -> None:
    cut(folder / "a.safetensors", end)
    with pytest.raises(ShapeError, match=r"a\.safetensors"):
        read(folder)


def test_weights_that_cannot_be_computed() -> None:
    unknown = {**LLAMA, "model_type": "new"}
    with pytest.raises(ShapeError, match="model_type new cannot be computed: put its safetensors files"):
        from_config(unknown)
    assert from_config(unknown, 5).weight_bytes == 5


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 2**70) | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    max_leaves=5,
)


def places(value: dict[str, Any], before: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Where the values of a nested object are."""
    inner = [places(item, (*before, key)) for key, item in value.items() if isinstance(item, dict)]
    return [*((*before, key) for key in value), *(place for group in inner for place in group)]


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_only_our_error_escapes(data: st.DataObject) -> None:
    """Whatever a value of config.json is replaced with, there is a shape of positive sizes or a `ShapeError`."""
    config = copy.deepcopy(data.draw(st.sampled_from([LLAMA, INT4, FP8, E5])))
    *path, last = data.draw(st.sampled_from(places(config)))
    inner = config
    for key in path:
        inner = inner[key]
    inner[last] = data.draw(JSON)
    try:
        shape = from_config(config)
    except ShapeError:
        return
    assert min(shape.weight_bytes, shape.positions, shape.kv_heads, shape.head_dim, shape.window or 1) > 0
    assert min(shape.global_layers, shape.sliding_layers) >= 0


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=60), st.integers(0, 60))
def test_only_our_error_escapes_from_a_header(header: bytes, length: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "config.json").write_text(json.dumps(LLAMA))
        (folder / "a.safetensors").write_bytes(length.to_bytes(8, "little") + header)
        with pytest.raises(ShapeError, match=r"a\.safetensors"):
            read(folder)


def test_gemmas_groups() -> None:
    """10 global and 52 sliding layers: one and six groups of 10, the last one with 8 layers that do not exist."""
    blocks = Blocks.of(from_config(GEMMA), 2, 4096)
    assert (blocks.global_groups, blocks.sliding_groups) == (1, 6)
    assert blocks.block_bytes == 16 * 10 * 8192
    assert blocks.sequence(8192) == 512 + 6 * 65
    assert blocks.first(8192) == 512 + 6 * (-(-(1023 + 4096) // 16) + 1)
    assert blocks.first(1024) == blocks.sequence(1024) == 64 + 6 * 65


def test_blocks_of_one_kind_of_layer_and_of_nearly_equal_kinds() -> None:
    llama = Blocks.of(from_config(LLAMA), 1, 4096)
    assert (llama.global_groups, llama.sliding_groups, llama.sequence(4096)) == (1, 0, 256)
    assert llama.block_bytes == 16 * 160 * 1024
    equal = dataclasses.replace(from_config(GEMMA), global_layers=13, sliding_layers=12)
    assert Blocks.of(equal, 2, 4096).block_bytes == 16 * 13 * 8192


def test_counts_that_vllm_printed() -> None:
    """`Maximum concurrency for 2,048 tokens` of the demo's engines with 512 MiB; its CPU blocks have 128 tokens."""
    llama = Shape("", 1, False, "", 3, 0, None, 2, 64, 2048, 2048, 256, False)
    gemma = dataclasses.replace(llama, global_layers=1, sliding_layers=2, window=64)
    for shape, printed in ((llama, 170.62), (gemma, 163.84)):
        blocks = Blocks.of(shape, 2, 2048, tokens=128)
        assert 2**29 // blocks.block_bytes / blocks.first(2048) == pytest.approx(printed, abs=0.005)


@pytest.mark.parametrize("name", ["h100", "h100-llama", "h100-gemma-e5"])
@pytest.mark.parametrize("length", [1024, 4096, 8192])
def test_shipped_configurations_fit(name: str, length: int) -> None:
    found = planned(name, length)
    assert 0 <= found.left < 0.05 * GB
    assert sum(engine.utilization for engine in found.engines) < 1
    for engine in found.engines:
        if engine.sequences is None:
            assert engine.kv_cache_bytes == 0
            assert engine.max_model_len == 512
            continue
        blocks = Blocks.of(engine.shape, 2, 2 * engine.max_num_batched_tokens)
        assert blocks.needed(1, engine.max_model_len) <= engine.kv_cache_bytes
        assert engine.max_model_len >= length
        assert engine.max_num_seqs == min(MAX_SEQS, int(engine.sequences)) >= 1
        assert blocks.needed(engine.max_num_seqs, length) <= engine.kv_cache_bytes


def test_the_shipped_files_are_all_planned() -> None:
    files = {path.stem for path in (ROOT / "deploy" / "config").glob("*.toml") if "policy" not in path.stem}
    assert {name for name in files if name.startswith("h100")} == set(GEMMAS)
    for name in files:
        assert load(ROOT / "deploy" / "config" / f"{name}.toml").models


def test_three_models_on_one_gpu() -> None:
    """The facts' sum: Llama AWQ, Gemma INT4 and e5 leave about 19 GB of KV cache."""
    found = planned("h100")
    assert sum(engine.kv_cache_bytes for engine in found.engines) / GB == pytest.approx(19, abs=0.6)
    llama, gemma, _ = found.engines
    assert llama.sequences == pytest.approx(gemma.sequences, abs=0.02)


@pytest.mark.parametrize(("gemma", "gigabytes"), [(GEMMA, 28.5), (FP8, 2.9)])
def test_what_does_not_fit_is_refused_by_how_much(gemma: dict[str, Any], gigabytes: float) -> None:
    with pytest.raises(PlacementError, match=f"does not fit by {gigabytes} GB") as refused:
        plan(shipped("h100"), shapes(gemma), H100)
    missing = refused.value.missing
    assert missing / GB == pytest.approx(gigabytes, abs=0.05)
    assert plan(shipped("h100"), shapes(gemma), H100 + missing).left == 0
    with pytest.raises(PlacementError, match=r"does not fit by 0\.0 GB"):
        plan(shipped("h100"), shapes(gemma), H100 + missing - 1)


def test_fp8_holds_twice_as_much() -> None:
    config = shipped("h100-llama")
    plain = plan(config, shapes(GEMMA), H100).engines[0]
    halved = plan(changed(config, 0, kv_cache_dtype="fp8"), shapes(GEMMA), H100).engines[0]
    assert halved.sequences == pytest.approx(2 * (plain.sequences or 0), rel=0.01)
    assert halved.max_model_len == 131_072 > plain.max_model_len
    assert halved.flags[2:4] == ("--kv-cache-dtype", "fp8")


def test_the_configurations_own_values_win() -> None:
    config = changed(shipped("h100"), 0, kv_cache_bytes=12 * GB, max_model_len=10_000, max_num_seqs=3)
    llama, gemma, e5 = plan(config, shapes(INT4), H100).engines
    assert llama.flags[:6] == (
        *("--kv-cache-memory-bytes", str(12 * GB), "--kv-cache-dtype", "auto", "--max-model-len", "10000"),
    )
    assert llama.max_num_seqs == 3
    everything = planned("h100")
    assert gemma.kv_cache_bytes < everything.engines[1].kv_cache_bytes
    assert e5.flags[:2] == ("--max-model-len", "512")


def test_a_model_that_is_allowed_fewer_leaves_the_rest_to_the_others() -> None:
    equal = planned("h100", 1024).engines
    llama, gemma, _ = plan(changed(shipped("h100"), 1, max_num_seqs=2), shapes(INT4), H100, 1024).engines
    assert gemma.max_num_seqs == 2
    assert gemma.kv_cache_bytes < equal[1].kv_cache_bytes
    assert llama.kv_cache_bytes > equal[0].kv_cache_bytes
    assert llama.sequences is not None
    assert llama.sequences > 1.1 * (equal[0].sequences or 0)


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"max_model_len": 131_073}, "max_model_len = 131073, but the model knows 131072 positions"),
        ({"kv_cache_bytes": 5 * GB}, r"kv_cache_bytes is 0\.37 GB less than one sequence of 16384 tokens"),
        ({"arguments": ("--max-model-len", "5")}, "the plan decides --max-model-len; set max_model_len instead"),
        ({"arguments": ("--kv_cache_mem=5",)}, "--kv-cache-memory-bytes; set kv_cache_bytes instead"),
        ({"arguments": ("--gpu-memory-utilization=0.5",)}, "the plan decides --gpu-memory-utilization; remove it"),
        ({"arguments": ("-tp", "2")}, "does not count what -tp needs"),
        ({"arguments": ("--max-num-batched-tokens", "4k")}, "as a plain number"),
    ],
)
def test_what_cannot_be_planned(values: dict[str, object], reason: str) -> None:
    with pytest.raises(PlacementError, match=reason):
        plan(changed(shipped("h100"), 0, **values), shapes(INT4), H100)


def test_an_encoder_reads_its_longest_text_in_one_step() -> None:
    long = from_config({**E5, "max_position_embeddings": 8194})
    assert plan(shipped("h100"), {**shapes(INT4), E5_ID: long}, H100).engines[2].max_num_batched_tokens == 8192


def test_longer_steps_cost_windows() -> None:
    config = changed(shipped("h100-gemma-e5"), 0, arguments=("--max-num-batched-tokens", "8192"))
    gemma = plan(config, shapes(GEMMA), H100, 16_384).engines[0]
    assert gemma.max_num_batched_tokens == 8192
    assert (gemma.sequences or 0) < (planned("h100-gemma-e5", 16_384).engines[0].sequences or 0) - 1


def test_a_length_beyond_a_models_own_is_cut() -> None:
    found = plan(shipped("h100"), shapes(INT4), H100, 100_000)
    assert [engine.length for engine in found.engines] == [16_384, 16_384, 512]
    with pytest.raises(PlacementError, match="at least one token"):
        plan(shipped("h100"), shapes(INT4), H100, 0)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("80GB", 81_559 * MIB),
        ("141 GB", 143_771 * MIB),
        ("79GB", 79 * GB),
        ("79.5GiB", 79 * 1024 * MIB + 512 * MIB),
        ("81559MiB", 81_559 * MIB),
    ],
)
def test_memory(text: str, size: int) -> None:
    assert memory_of(text) == size


@pytest.mark.parametrize("text", ["", "80", "80gb", "-80GB", "0GB", "80TB", "1e3GB", "nan GB", "٨GB"])
def test_memory_that_is_none(text: str) -> None:
    with pytest.raises(PlacementError, match="is not a size of GPU memory: write"):
        memory_of(text)


def on_disk(name: str, folder: Path) -> Config:
    """A shipped configuration whose models' folders hold config.json only."""
    config = shipped(name)
    published = {LLAMA_ID: LLAMA, GEMMA_ID: GEMMAS[name], E5_ID: E5}
    for place, model in enumerate(config.models):
        source = folder / Path(model.source).name
        source.mkdir(parents=True)
        (source / "config.json").write_text(json.dumps(published[model.id]))
        config = changed(config, place, source=str(source))
    return config


@pytest.mark.parametrize("name", list(GEMMAS))
def test_the_page_shows_what_the_command_prints(name: str, tmp_path: Path) -> None:
    config = on_disk(name, tmp_path)
    assert config.engines.gpu_memory is not None
    printed = plan_command(config, config.engines.gpu_memory)
    assert f"```\n{printed}\n```" in (ROOT / "docs/how-to/placement.md").read_text()


def test_the_command_says_what_is_missing(tmp_path: Path) -> None:
    config = on_disk("h100-llama", tmp_path)
    (tmp_path / "llama-3.3-70b-awq" / "config.json").write_text("{")
    with pytest.raises(PlacementError, match=rf"^{LLAMA_ID}: .*config\.json is not JSON"):
        plan_command(config, "80GB")
    with pytest.raises(PlacementError, match=r"/models/llama-3\.3-70b-awq is not a folder here: plan on a machine"):
        plan_command(shipped("h100-llama"), "80GB")


def test_the_demos_own_folders(models: Path) -> None:
    config = load(ROOT / "deploy" / "config" / "demo.toml")
    for place, model in enumerate(config.models):
        config = changed(config, place, source=str(models / Path(model.source).name))
    text = plan_command(config, "16GB")
    assert "AWQ INT4" in text
    assert "~" not in text
