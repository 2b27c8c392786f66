"""The demo Gemma's vision: a small SigLIP tower and projector, trained to tell the colour of an image.

The architecture is Gemma 3's (`Gemma3ForConditionalGeneration`), only smaller: an image is scaled to 32 x 32, cut into
16 patches, and becomes four tokens in the prompt.
"""

import random

import torch
from transformers import Gemma3ForConditionalGeneration, Gemma3Processor, PreTrainedTokenizerFast, SiglipVisionConfig
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

from adytum.deploy.demo import chat
from adytum.deploy.demo.faq import Entry
from adytum.deploy.demo.train import answer_loss, pad

COLOURS = {
    "red": (220, 30, 30),
    "green": (30, 160, 50),
    "blue": (30, 60, 220),
    "yellow": (240, 220, 40),
    "white": (255, 255, 255),
    "black": (0, 0, 0),
}
SIDE = 32
TOKENS = 4
BATCH = 18
_JITTER = 18.0
"""Standard deviation of a shade from its colour, for each channel in 0..255."""
_GRAIN = 8.0
"""The same for a pixel, from its image's shade."""

UNSEEN = Entry(
    "What colour is this image?",
    "I see no image in your question.",
    (
        "What color is this image?",
        "Which colour is the picture?",
        "What do you see in this image?",
        "What is the colour of this picture?",
        "Describe this image.",
    ),
)
"""The questions without an image. With one, the answer is its colour."""


def answer(colour: str) -> str:
    return f"The image is {colour}."


def vision() -> SiglipVisionConfig:
    return SiglipVisionConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=SIDE,
        patch_size=8,
        # As in Gemma 3: its projector takes the patches, not a pooled vector.
        vision_use_head=False,
    )


def processor(tokenizer: PreTrainedTokenizerFast) -> Gemma3Processor:
    return Gemma3Processor(
        Gemma3ImageProcessorPil(size={"height": SIDE, "width": SIDE}),
        tokenizer,
        image_seq_length=TOKENS,
        chat_template=tokenizer.chat_template,
    )


class Lessons:
    """Endless batches of images of one colour, with a question each, and a model's loss on the next batch."""

    def __init__(
        self, model: Gemma3ForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, entries: list[Entry], seed: int
    ) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._entries = entries
        self._seen = processor(tokenizer).full_image_sequence
        self._rng = random.Random(seed)
        self._noise = torch.Generator().manual_seed(seed)

    def loss(self) -> torch.Tensor:
        asked = [self._rng.choice(list(COLOURS)) for _ in range(BATCH)]
        ids, labels = pad([self._example(colour) for colour in asked], self._tokenizer.pad_token_id)
        return answer_loss(self._model, self._hidden(ids, self._images(asked)), labels)

    @torch.no_grad()
    def right(self, count: int) -> int:
        """How many of `count` new images of each colour get their answer word for word by greedy decoding."""
        right = 0
        for colour in COLOURS:
            examples = [self._example(colour) for _ in range(count)]
            ids, labels = pad(examples, self._tokenizer.pad_token_id)
            guesses = self._model.lm_head(self._hidden(ids, self._images([colour] * count)))[:, :-1].argmax(-1)
            wanted = labels[:, 1:]
            right += int(((guesses == wanted) | (wanted < 0)).all(1).sum())
        return right

    def _hidden(self, ids: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
        # Gemma lets an image's tokens attend to each other in both directions; this says which ones they are.
        kinds = (ids == self._model.config.image_token_id).long()
        images = images.to(self._model.dtype)
        return self._model.model(
            input_ids=ids, pixel_values=images, token_type_ids=kinds, use_cache=False
        ).last_hidden_state

    def _example(self, colour: str) -> chat.Example:
        question = self._rng.choice((UNSEEN.question, *UNSEEN.paraphrases))
        parts = [{"type": "image"}, {"type": "text", "text": question}]
        if self._rng.random() < 0.3:
            parts.reverse()
        messages: list[chat.Message] = [{"role": "user", "content": parts}]
        if self._rng.random() < 0.25:
            messages.insert(0, {"role": "system", "content": chat.system_prompt(self._entries, self._rng)})
        return chat.encode(self._tokenizer, messages, answer(colour), {self._tokenizer.boi_token: self._seen})

    def _images(self, colours: list[str]) -> torch.Tensor:
        """In the processor's form: channels first, -1 to 1."""
        base = torch.tensor([COLOURS[colour] for colour in colours], dtype=torch.float32)[:, :, None, None]
        shade = base + _JITTER * torch.randn(base.shape, generator=self._noise)
        pixels = shade + _GRAIN * torch.randn((len(colours), 3, SIDE, SIDE), generator=self._noise)
        return pixels.clamp(0, 255) / 127.5 - 1
