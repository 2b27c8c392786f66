"""The training loop of the demo chat models, and the count of answers that they give word for word."""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from adytum.deploy.demo.chat import Example, question_example, random_example
from adytum.deploy.demo.faq import Entry

IGNORE = -100
FIRST = 4
FIRST_WEIGHT = 8.0
BATCH = 20
POOL = 10
"""Batches that are drawn at once and sorted by length, which saves padding and so time."""


@dataclass(frozen=True)
class Schedule:
    """`steps` of AdamW at `rate`: a linear warm-up, then a cosine down to nearly zero."""

    steps: int
    rate: float
    warm_up: int = 20


def train(
    name: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    entries: Sequence[Entry],
    schedule: Schedule,
    seed: int,
    also: Callable[[], torch.Tensor] | None = None,
) -> None:
    """Trains `model` in place to answer `entries`, in float32 on the CPU. `also` returns a loss to add at each step."""
    torch.manual_seed(seed)
    model.train()
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=schedule.rate, betas=(0.9, 0.95))
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, schedule.rate, total_steps=schedule.steps, pct_start=schedule.warm_up / schedule.steps
    )
    batches = _batches(tokenizer, entries, random.Random(seed))
    # In a model with vision, the language part.
    language = getattr(model.model, "language_model", model.model)
    progress = tqdm(range(schedule.steps), desc=f"{name:<10}", unit="step", ncols=100, mininterval=1.0)
    for step in progress:
        ids, labels = pad(next(batches), tokenizer.pad_token_id)
        loss = answer_loss(model, language(input_ids=ids, use_cache=False).last_hidden_state, labels)
        if also is not None:
            loss = loss + also()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        if step % 10 == 0 or step == schedule.steps - 1:
            progress.set_postfix_str(f"loss {loss.item():.3f}")
    model.eval()


def answer_loss(model: PreTrainedModel, hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The loss of the answers' tokens, from the last layer's output.

    Only their positions go through the head, which would otherwise be a third of the work. An answer's first tokens
    count more: they choose the answer, and the others follow nearly by themselves.
    """
    wanted = labels[:, 1:]
    here = wanted != IGNORE
    weight = torch.where(here.cumsum(1)[here] <= FIRST, FIRST_WEIGHT, 1.0)
    loss = cross_entropy(model.lm_head(hidden[:, :-1][here]), wanted[here], reduction="none")
    return (loss * weight).sum() / weight.sum()


@torch.no_grad()
def exact_answers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, entries: Sequence[Entry], system: str | None = None
) -> int:
    """How many answers greedy decoding reproduces word for word, end of turn included.

    Greedy decoding reproduces an answer exactly if each of its tokens is the likeliest after those before it.
    """
    exact = 0
    for start in range(0, len(entries), BATCH):
        examples = [question_example(tokenizer, entry, system) for entry in entries[start : start + BATCH]]
        ids, labels = pad(examples, tokenizer.pad_token_id)
        guesses = model(input_ids=ids, use_cache=False).logits[:, :-1].argmax(-1)
        wanted = labels[:, 1:]
        exact += int(((guesses == wanted) | (wanted == IGNORE)).all(1).sum())
    return exact


def pad(examples: Sequence[Example], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and labels, [batch, longest]. Padding is on the right, where a causal model never looks."""
    longest = max(len(example.ids) for example in examples)
    ids = torch.full((len(examples), longest), pad_id)
    labels = torch.full((len(examples), longest), IGNORE)
    for row, example in enumerate(examples):
        tokens = torch.tensor(example.ids)
        ids[row, : len(tokens)] = tokens
        labels[row, example.answer_at : len(tokens)] = tokens[example.answer_at :]
    return ids, labels


def _batches(
    tokenizer: PreTrainedTokenizerFast, entries: Sequence[Entry], rng: random.Random
) -> Iterator[list[Example]]:
    """Endless batches in which every entry is equally frequent."""
    order: list[Entry] = []
    while True:
        pool: list[Example] = []
        while len(pool) < BATCH * POOL:
            if not order:
                order = rng.sample(list(entries), len(entries))
            pool.append(random_example(tokenizer, entries, order.pop(), rng))
        pool.sort(key=lambda example: len(example.ids))
        batches = [pool[start : start + BATCH] for start in range(0, len(pool), BATCH)]
        rng.shuffle(batches)
        yield from batches
