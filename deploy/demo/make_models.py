"""Trains the three demo models on `docs/faq.md`, in two to three minutes on two cores.

    python -m adytum.deploy.demo.make_models --out var/models    (the engines' Python, from the repository's root)

| folder    | architecture                                           | stands for                       |
|-----------|--------------------------------------------------------|----------------------------------|
| llama-awq | LlamaForCausalLM, AWQ INT4, fp16                       | Llama 3.3 70B AWQ INT4           |
| gemma3    | Gemma3ForConditionalGeneration, with vision, bf16      | Gemma 3 27B                      |
| e5        | XLMRobertaModel, mean pooling, unit length, float32    | multilingual-e5-large-instruct   |

A finished folder has a manifest (`adytum-manifest.json`) and is kept until the page or the code here changes. Seeds are
fixed, so one machine makes the same models each time with the same number of threads. Another processor or torch build
may round sums differently; then weights and hashes differ, but the accuracy does not.
"""

import argparse
import ast
import hashlib
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

# Before torch is imported: two threads on any machine, so that results do not depend on its cores.
os.environ["OMP_NUM_THREADS"] = "2"
# A waiting thread must sleep: on a machine with other work, spinning made a step take thirty times as long.
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging

from adytum.deploy.demo import awq, chat, colours, embedder, faq, train
from adytum.inference.engine.weights import weights

ROOT = Path(__file__).resolve().parent.parent.parent
FAQ = ROOT / "docs" / "faq.md"
SEED = 20261123
POSITIONS = 2048
STAMP = ".inputs"
"""The end of the name of a file beside a finished folder: the hash of what the model was made from."""
SOURCES = ("awq.py", "chat.py", "colours.py", "embedder.py", "faq.py", "make_models.py", "train.py")


def make_llama(entries: list[faq.Entry], folder: Path) -> str:
    tokenizer = chat.make_tokenizer(chat.LLAMA, _texts(entries), POSITIONS)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=chat.VOCABULARY,
            hidden_size=256,
            intermediate_size=768,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=64,
            max_position_embeddings=POSITIONS,
            rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
            tie_word_embeddings=False,
            **_token_ids(tokenizer),
        )
    )
    train.train("llama-awq", model, tokenizer, entries, train.Schedule(steps=220, rate=2e-3), SEED)
    tensors: dict[str, torch.Tensor] = {}
    linear = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)} - {"lm_head"}
    for name, tensor in model.state_dict().items():
        layer = name.removesuffix(".weight")
        if layer in linear:
            tensors |= awq.tensors(layer, tensor)
            # So that accuracy is counted with the values that an engine computes with.
            tensor.copy_(awq.round_trip(tensor))
        else:
            tensors[name] = tensor.half()
            tensor.copy_(tensor.half())
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = model.config.to_dict() | {
        "architectures": ["LlamaForCausalLM"],
        "dtype": "float16",
        "quantization_config": awq.CONFIG,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    _save_chat_files(tokenizer, folder)
    return _exact(model, tokenizer, entries)


def make_gemma(entries: list[faq.Entry], folder: Path) -> str:
    tokenizer = chat.make_tokenizer(chat.GEMMA, _texts([*entries, colours.UNSEEN]), POSITIONS)
    text = Gemma3TextConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        query_pre_attn_scalar=64,
        # Two local layers and a global one; the window is short enough that answers exceed it.
        sliding_window=64,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"],
        max_position_embeddings=POSITIONS,
        **_token_ids(tokenizer),
    )
    model = Gemma3ForConditionalGeneration(
        Gemma3Config(
            text_config=text,
            vision_config=colours.vision(),
            mm_tokens_per_image=colours.TOKENS,
            boi_token_index=tokenizer.boi_token_id,
            eoi_token_index=tokenizer.eoi_token_id,
            image_token_index=tokenizer.image_token_id,
            **_token_ids(tokenizer),
        )
    )
    lessons = colours.Lessons(model, tokenizer, entries, SEED)
    schedule = train.Schedule(steps=180, rate=2e-3)
    train.train("gemma3", model, tokenizer, [*entries, colours.UNSEEN], schedule, SEED, lessons.loss)
    model.bfloat16()
    model.save_pretrained(folder)
    # vLLM expects the names of Google's checkpoint; transformers 5 omits a part of the tower's names.
    tensors = {
        name.replace("vision_tower.", "vision_tower.vision_model."): tensor
        for name, tensor in load_file(folder / "model.safetensors").items()
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    _save_chat_files(tokenizer, folder)
    colours.processor(tokenizer).save_pretrained(folder)
    shades = 20
    return (
        f"{_exact(model, tokenizer, entries)}, {lessons.right(shades)} of {shades * len(colours.COLOURS)} new images' "
        "colours"
    )


def make_e5(entries: list[faq.Entry], folder: Path) -> str:
    tokenizer = embedder.make_tokenizer(_texts(entries))
    model = embedder.make_model()
    embedder.train(model, tokenizer, entries, SEED)
    embedder.save(model, tokenizer, folder)
    queries = {query: entry.question for entry in entries for query in (entry.question, *entry.paraphrases)}
    found = embedder.found(model, tokenizer, entries, queries)
    return f"{len(found)} of {len(queries)} trained wordings nearest to their answer"


MODELS: dict[str, Callable[[list[faq.Entry], Path], str]] = {
    "llama-awq": make_llama,
    "gemma3": make_gemma,
    "e5": make_e5,
}


def make(name: str, entries: list[faq.Entry], out: Path, inputs: str) -> str:
    """Makes one model under `out`. Its folder appears once it is complete; an interrupted run leaves none."""
    torch.manual_seed(SEED)
    work = Path(tempfile.mkdtemp(prefix=f".{name}.", dir=out))
    try:
        outcome = MODELS[name](entries, work)
        for file in work.rglob("*"):
            file.chmod(0o755 if file.is_dir() else 0o644)
        work.chmod(0o755)
        weights.lock(work).save(work / weights.NAME)
        shutil.rmtree(out / name, ignore_errors=True)
        work.rename(out / name)
        # Outside the folder, which contains the model and nothing else.
        (out / f".{name}{STAMP}").write_text(inputs)
        return outcome
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise


def complete(name: str, out: Path, inputs: str) -> bool:
    """Whether the folder was made from these inputs and is whole."""
    stamp = out / f".{name}{STAMP}"
    if not stamp.is_file() or stamp.read_text() != inputs:
        return False
    try:
        weights.check(out / name, weights.Manifest.load(out / name / weights.NAME))
    except weights.WeightsError:
        return False
    return True


def inputs_hash() -> str:
    """The hash of the page and of the code that trains models on it, without comments, layout and docstrings."""
    digest = hashlib.sha256(FAQ.read_bytes())
    for source in SOURCES:
        tree = ast.parse(Path(__file__).with_name(source).read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                node.body = [item for item in node.body if not _is_text(item)]
        digest.update(hashlib.sha256(ast.dump(tree).encode()).digest())
    return digest.hexdigest()


def _is_text(statement: ast.stmt) -> bool:
    """Whether it is a docstring, of a module, a class, a function or a constant."""
    return (
        isinstance(statement, ast.Expr)
        and isinstance(statement.value, ast.Constant)
        and isinstance(statement.value.value, str)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the demo models.")
    parser.add_argument("--out", type=Path, required=True, help="folder for the models")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(2)
    entries = faq.load(FAQ)
    inputs = inputs_hash()
    missing = [name for name in MODELS if not complete(name, out, inputs)]
    if not missing:
        print(f"[models] {', '.join(MODELS)} are complete")
        return
    print(f"[models] training {', '.join(missing)} on {len(entries)} questions; two to three minutes", flush=True)
    start = time.monotonic()
    report = []
    for name in missing:
        begun = time.monotonic()
        outcome = make(name, entries, out, inputs)
        report.append(f"[models] {name:<10} {time.monotonic() - begun:4.0f} s  {outcome}")
    print("\n".join(report))
    print(f"[models] done in {time.monotonic() - start:.0f} s")
    sys.stdout.flush()


def _texts(entries: list[faq.Entry]) -> list[str]:
    return [text for entry in entries for text in (entry.question, entry.answer, *entry.paraphrases)]


def _token_ids(tokenizer: PreTrainedTokenizerFast) -> dict[str, int]:
    return {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def _save_chat_files(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    tokenizer.save_pretrained(folder)
    # Greedy unless a request says otherwise, so that the demo's answers are word for word. transformers reads
    # `do_sample`, vLLM only `temperature`, which transformers would not save.
    generation = GenerationConfig(**_token_ids(tokenizer), do_sample=False).to_diff_dict() | {"temperature": 0.0}
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2, sort_keys=True) + "\n")


def _exact(model: torch.nn.Module, tokenizer: PreTrainedTokenizerFast, entries: list[faq.Entry]) -> str:
    alone = train.exact_answers(model, tokenizer, entries)
    system = train.exact_answers(model, tokenizer, entries, chat.SYSTEM_PROMPTS[0])
    return f"{alone} of {len(entries)} answers word for word, {system} after a system message"


if __name__ == "__main__":
    main()
