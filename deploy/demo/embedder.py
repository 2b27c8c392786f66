"""The demo's embedding model: an XLM-RoBERTa encoder, mean pooling, unit length, as multilingual-e5-large-instruct is.

Trained by contrast (InfoNCE): in a batch with every entry of the page once, a question must be nearer to its own answer
than to the other entries' answers. It also finds answers to wordings that it never saw, because no two training queries
are the same: words are dropped, swapped and surrounded by phrases that carry no meaning.
"""

import json
import random
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch.nn.functional import cross_entropy, normalize
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast, XLMRobertaConfig, XLMRobertaModel

from adytum.deploy.demo.faq import Entry

VOCABULARY = 1536
POSITIONS = 514
"""As in the real model: 512 tokens, and position ids that start after the padding id, 1."""
DIMENSIONS = 192
TEMPERATURE = 0.05
INSTRUCTED = 0.4
"""Share of the training queries with the instruction."""
SPLIT_DROPOUT = 0.15
"""Share of BPE merges omitted in training."""
INSTRUCTION = "Instruct: Given a question, retrieve the passage that answers it\nQuery: "
"""The real model's prefix for queries; passages have none. The demo model is trained with and without it."""

# Words that people use for one another when they ask about this page's subjects.
_SYNONYMS = (
    "picture image photo", "url link address", "prompt question message text request", "log record protocol",
    "store save keep", "rotate change replace renew", "laptop computer machine pc",
    "slow slower speed performance overhead", "verify check validate confirm",
    "operator administrator provider owner", "backend server service", "read see view look", "use employ run",
    "supported available possible allowed", "disable deactivate off", "vulnerability hole bug flaw",
    "error failure problem fault", "answer response reply", "models llms", "separate isolated apart",
    "explain describe", "model weights files", "attacker adversary eavesdropper", "vector embedding",
    "tools functions", "cut truncated broken", "start launch boot", "balancer proxy", "accept allow permit",
    "refuse reject deny", "long large big", "private secret", "send submit post", "stream streaming",
    "talk communicate connect", "protect secure defend",
)  # fmt: skip
_ALIKE = {word: group.split() for group in _SYNONYMS for word in group.split()}

_BEFORE = (
    "Please tell me:", "Could you tell me", "I would like to know", "Hello!", "One question:", "I am wondering", "Hi,",
    "Can you explain", "Do you know", "In short,", "Sorry to ask,", "Quick question:", "Please explain", "Tell me",
)  # fmt: skip
_AFTER = (
    "please",
    "thanks",
    "exactly",
    "in short",
    "in this system",
    "here",
    "in detail",
    "by the way",
    "with adytum",
)


def make_tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """A lower-casing BPE tokenizer with XLM-RoBERTa's special tokens (<s> 0, <pad> 1, </s> 2, <unk> 3)."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.ByteLevel(add_prefix_space=True), pre_tokenizers.Digits()]
    )
    tokenizer.decoder = decoders.ByteLevel()
    specials = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=specials,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*texts, INSTRUCTION], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        cls_token="<s>",
        eos_token="</s>",
        sep_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        mask_token="<mask>",
        model_max_length=POSITIONS - 2,
    )


def make_model() -> XLMRobertaModel:
    return XLMRobertaModel(
        XLMRobertaConfig(
            vocab_size=VOCABULARY,
            hidden_size=DIMENSIONS,
            intermediate_size=2 * DIMENSIONS,
            num_hidden_layers=1,
            num_attention_heads=4,
            max_position_embeddings=POSITIONS,
            type_vocab_size=1,
            pad_token_id=1,
            bos_token_id=0,
            eos_token_id=2,
            layer_norm_eps=1e-5,
            hidden_dropout_prob=0.1,
            attention_probs_dropout_prob=0.1,
        ),
        add_pooling_layer=False,
    )


def embed(model: XLMRobertaModel, tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> torch.Tensor:
    """[texts, DIMENSIONS], unit length: the mean over all tokens of a text, special ones included, as in vLLM."""
    batch = tokenizer(list(texts), padding=True, truncation=True, return_tensors="pt")
    states = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
    mask = batch["attention_mask"].unsqueeze(-1)
    return normalize((states * mask).sum(1) / mask.sum(1), dim=-1)


def train(
    model: XLMRobertaModel,
    tokenizer: PreTrainedTokenizerFast,
    entries: Sequence[Entry],
    seed: int,
    steps: int = 300,
    rate: float = 1e-3,
) -> None:
    """Trains `model` in place. Each step sees every entry once: one query and its answer."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    model.train()
    # Words are split differently each time, so that unseen wordings share pieces with seen ones.
    splitter = tokenizer.backend_tokenizer.model
    splitter.dropout = SPLIT_DROPOUT
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.05)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.1)
    target = torch.arange(len(entries))
    progress = tqdm(range(steps), desc=f"{'e5':<10}", unit="step", ncols=100, mininterval=1.0)
    for step in progress:
        queries = embed(model, tokenizer, [_query(entry, rng) for entry in entries])
        answers = embed(model, tokenizer, [_thin(entry.answer, 0.15, rng) for entry in entries])
        scores = queries @ answers.t() / TEMPERATURE
        loss = (cross_entropy(scores, target) + cross_entropy(scores.t(), target)) / 2
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        if step % 10 == 0 or step == steps - 1:
            progress.set_postfix_str(f"loss {loss.item():.3f}")
    splitter.dropout = None
    model.eval()


@torch.no_grad()
def found(
    model: XLMRobertaModel, tokenizer: PreTrainedTokenizerFast, entries: Sequence[Entry], queries: dict[str, str]
) -> list[str]:
    """The queries (query -> question of the entry) whose nearest answer is the right one."""
    answers = embed(model, tokenizer, [entry.answer for entry in entries])
    nearest = (embed(model, tokenizer, list(queries)) @ answers.t()).argmax(1).tolist()
    return [query for query, row in zip(queries, nearest, strict=True) if entries[row].question == queries[query]]


def save(model: XLMRobertaModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Writes the real model's files, with those of sentence-transformers that name pooling and normalisation."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    # vLLM needs it, and the real model has it, but transformers 5 no longer writes it.
    config["position_embedding_type"] = "absolute"
    _write(path, config)
    steps = (("Transformer", ""), ("Pooling", "1_Pooling"), ("Normalize", "2_Normalize"))
    _write(
        folder / "modules.json",
        [
            {"idx": place, "name": str(place), "path": where, "type": f"sentence_transformers.models.{kind}"}
            for place, (kind, where) in enumerate(steps)
        ],
    )
    (folder / "1_Pooling").mkdir()
    pooling = {"word_embedding_dimension": DIMENSIONS, "pooling_mode_mean_tokens": True}
    _write(folder / "1_Pooling" / "config.json", pooling)
    _write(folder / "sentence_bert_config.json", {"max_seq_length": POSITIONS - 2, "do_lower_case": False})


def _write(path: Path, document: object) -> None:
    path.write_text(json.dumps(document, indent=2) + "\n")


def _query(entry: Entry, rng: random.Random) -> str:
    text = rng.choice((entry.question, *entry.paraphrases))
    text = _thin(_reworded(text, rng), 0.2, rng)
    if rng.random() < 0.15:
        words = text.split()
        text = " ".join(rng.sample(words, len(words)))
    if rng.random() < 0.3:
        text = f"{rng.choice(_BEFORE)} {text[:1].lower()}{text[1:]}"
    if rng.random() < 0.15:
        text = f"{text.rstrip('?.')} {rng.choice(_AFTER)}?"
    return INSTRUCTION + text if rng.random() < INSTRUCTED else text


def _reworded(text: str, rng: random.Random) -> str:
    """`text` with some words replaced by others from the same line of `_SYNONYMS`."""
    words = text.split()
    for place, word in enumerate(words):
        bare = word.rstrip("?.,").lower()
        if bare in _ALIKE and rng.random() < 0.2:
            words[place] = rng.choice(_ALIKE[bare]) + word[len(bare) :]
    return " ".join(words)


def _thin(text: str, rate: float, rng: random.Random) -> str:
    """`text` without about `rate` of its words; sometimes unchanged."""
    if rng.random() < 0.3:
        return text
    return " ".join(word for word in text.split() if rng.random() >= rate) or text
