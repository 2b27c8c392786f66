"""Tokenizers, chat templates and training examples of the two demo chat models.

A training example is exactly what vLLM feeds the model for the same messages: the tokenizer's own chat template renders
it, so the prompt in training and the prompt in serving cannot drift apart.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from adytum.deploy.demo.faq import Entry

VOCABULARY = 2048
Message = dict[str, Any]

# Both templates accept system, user, assistant and tool messages in any order. `tools` is ignored: the models are too
# small to choose a tool by themselves, and with a forced choice vLLM's grammar produces the call. Calls and results of
# earlier turns are rendered, so that such a conversation does not fail.
LLAMA_TEMPLATE = """\
{{- bos_token }}
{%- for message in messages %}
    {%- set role = 'ipython' if message['role'] == 'tool' else message['role'] %}
    {{- '<|start_header_id|>' + role + '<|end_header_id|>\\n\\n' }}
    {%- if message['content'] %}{{- message['content'] | trim }}{%- endif %}
    {%- for call in message['tool_calls'] or [] %}
        {{- '{"name": "' + call['function']['name'] + '", "parameters": ' }}
        {{- call['function']['arguments'] if call['function']['arguments'] is string else
            call['function']['arguments'] | tojson }}
        {{- '}' }}
    {%- endfor %}
    {{- '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}
"""

# Gemma has no system role: its text goes before the next user turn, as in Google's own template. Content is a text or a
# list of parts. An image becomes one token, and the processor replaces it with the image's tokens. The loop over the
# parts is written out here, not in a macro: vLLM looks for it to learn that the template accepts parts.
GEMMA_TEMPLATE = """\
{{- bos_token }}
{%- set held = namespace(system='') %}
{%- for message in messages %}
    {%- set said %}
        {%- if message['content'] is string %}{{- message['content'] | trim }}
        {%- elif message['content'] %}
            {%- for part in message['content'] %}
                {%- if part['type'] == 'image' %}{{- '<start_of_image>' }}
                {%- elif part['type'] == 'text' %}{{- part['text'] | trim }}{%- endif %}
            {%- endfor %}
        {%- endif %}
    {%- endset %}
    {%- if message['role'] in ('system', 'developer') %}
        {%- set held.system = held.system + said + '\\n\\n' %}
    {%- else %}
        {{- '<start_of_turn>' + ('model' if message['role'] == 'assistant' else 'user') + '\\n' }}
        {%- if message['role'] == 'user' %}{{- held.system }}{%- set held.system = '' %}{%- endif %}
        {{- said }}
        {%- for call in message['tool_calls'] or [] %}
            {{- '[' + call['function']['name'] + '(' }}
            {{- call['function']['arguments'] if call['function']['arguments'] is string else
                call['function']['arguments'] | tojson }}
            {{- ')]' }}
        {%- endfor %}
        {{- '<end_of_turn>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<start_of_turn>model\\n' }}{%- endif %}
"""


@dataclass(frozen=True)
class Style:
    """What distinguishes a family's prompts. `end` stops an answer. `specials` get the lowest ids, in order.

    `whole` are texts that are always one token, and `roles` name tokens for the family's processor.
    """

    template: str
    bos: str
    end: str
    pad: str
    specials: tuple[str, ...]
    whole: tuple[str, ...] = ()
    roles: Mapping[str, str] = field(default_factory=dict)


LLAMA = Style(
    template=LLAMA_TEMPLATE,
    bos="<|begin_of_text|>",
    end="<|eot_id|>",
    pad="<|finetune_right_pad_id|>",
    specials=(
        "<|finetune_right_pad_id|>",
        "<|begin_of_text|>",
        "<|end_of_text|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|eot_id|>",
        "<|eom_id|>",
        "<|python_tag|>",
    ),
)
GEMMA = Style(
    template=GEMMA_TEMPLATE,
    bos="<bos>",
    end="<end_of_turn>",
    pad="<pad>",
    specials=(
        *("<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"),
        *("<start_of_image>", "<end_of_image>", "<image_soft_token>"),
    ),
    # As in Gemma's own vocabulary: an image's place is set off by empty lines, and vLLM joins the tokens around it.
    whole=("\n", "\n\n", "\n\n\n", "\n\n\n\n"),
    roles={"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"},
)

SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You are a helpful, honest and concise assistant.",
    "Be brief.",
    "Answer in one or two sentences.",
    "You answer questions about confidential computing.",
    "You are an assistant. Today is Monday.",
    "Be polite and precise. Do not use lists.",
    "Reply in English.",
)


def make_tokenizer(style: Style, texts: Sequence[str], positions: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on `texts`: it encodes any UTF-8 text, at worst byte by byte."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(style.specials),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in style.whole])
    bos = (style.bos, tokenizer.token_to_id(style.bos))
    # As with the real models, for /v1/completions: plain text starts with one bos. Chat prompts contain their own.
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{style.bos} $A", special_tokens=[bos])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=style.bos,
        eos_token=style.end,
        pad_token=style.pad,
        chat_template=style.template,
        model_max_length=positions,
        clean_up_tokenization_spaces=False,
        extra_special_tokens=dict(style.roles),
    )


@dataclass(frozen=True)
class Example:
    """Token ids of one conversation, and where its last answer starts. The answer includes the end-of-turn token."""

    ids: list[int]
    answer_at: int


def encode(
    tokenizer: PreTrainedTokenizerFast,
    messages: list[Message],
    answer: str,
    stand_for: Mapping[str, str] = MappingProxyType({}),
) -> Example:
    """The example of one answer. `stand_for`: texts of the prompt that a processor replaces, and their replacements."""
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    for name, text in stand_for.items():
        prompt = prompt.replace(name, text)
    start = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    end = tokenizer(answer + tokenizer.eos_token, add_special_tokens=False)["input_ids"]
    return Example(start + end, len(start))


def question_example(tokenizer: PreTrainedTokenizerFast, entry: Entry, system: str | None = None) -> Example:
    """The plain case, for which accuracy is counted: one question, and a system message if given."""
    messages: list[Message] = [{"role": "system", "content": system}] if system else []
    return encode(tokenizer, [*messages, {"role": "user", "content": entry.question}], entry.answer)


def random_example(
    tokenizer: PreTrainedTokenizerFast, entries: Sequence[Entry], entry: Entry, rng: random.Random
) -> Example:
    """A training example for `entry`; some have another wording, a system message or an earlier turn."""
    messages: list[Message] = []
    if rng.random() < 0.25:
        messages.append({"role": "system", "content": system_prompt(entries, rng)})
    if rng.random() < 0.15:
        earlier = rng.choice(entries)
        messages.append({"role": "user", "content": earlier.question})
        messages.append({"role": "assistant", "content": earlier.answer})
    question = rng.choice(entry.paraphrases) if rng.random() < 0.35 else entry.question
    messages.append({"role": "user", "content": question})
    return encode(tokenizer, messages, entry.answer)


def system_prompt(entries: Sequence[Entry], rng: random.Random) -> str:
    """A common system message, or random words of the page, so that the model learns to ignore any."""
    if rng.random() < 0.5:
        return rng.choice(SYSTEM_PROMPTS)
    words = rng.choice(entries).answer.split() + rng.choice(entries).answer.split()
    return " ".join(rng.sample(words, min(len(words), rng.randint(3, 20))))
