"""Does an engine still answer as it did when its weights were locked? Checked before it takes traffic.

Under confidential computing a wrong setting can return garbage with status 200 (vllm#57224), and so can a damaged
weight or a driver fault; no health check sees that. So the engine continues three fixed prompts greedily, or embeds one
fixed text, and the result is compared with golden answers: those that `adytum models canary` recorded on a machine, and
with weights, that the operator trusted.

Greedy text is not the same bit for bit on every machine: sums are taken in another order, and if two tokens are almost
equally likely, the other one may win. So tokens must be equal up to the first place where the golden answer itself was
nearly undecided, and their log-probabilities must be as close as the same engine's are from run to run
(docs/explanation/canary.md has the measurements).
"""

import asyncio
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import aiohttp

PROMPTS = (
    "What is remote attestation?",
    "What is confidential inference?",
    "Count from 1 to 30, with commas between the numbers and nothing else.",
)
"""Questions that any chat model can answer, the demo's (`docs/faq.md`) too, and a text with no choice of words."""
TEXT = "query: How can a client know that nobody else reads what it sends?"
TOKENS = 32
"""Generated for each prompt."""
UNDECIDED = 0.3
"""Nats. If the golden token leads the runner-up by less, either may be chosen."""
LEAST, MOST = 0.03, 0.15
"""Nats: bounds of the margin, the largest accepted distance between the log-probabilities of equal tokens, on average
over a prompt. Between the bounds the margin is `_TIMES` the distance between the engine's own answers when the golden
ones were made; an engine that differs by more than that gets no golden answers."""
LEAST_TURN, MOST_TURN = 3e-4, 1e-2
"""The same bounds for embeddings: 1 - cosine."""
_TIMES = 5
_RUNS, _AT_ONCE = 3, 4
COMPARED = 12
"""Tokens that must be comparable, over all prompts; fewer prove nothing."""
FORMAT = "adytum canary v1"
_IMPOSSIBLE = -9999.0
"""vLLM's own stand-in for minus infinity."""
_LIMIT = 4 * 1024 * 1024

Task = Literal["generate", "embed"]


class CanaryFailed(Exception):
    """The engine's answers are not the golden ones, or there are none. The message says what differs and what to do.

    It may quote answers: the prompts are the ones above, never a client's.
    """


@dataclass(frozen=True)
class Token:
    """One generated token: its id, its log-probability in nats, and the same of the most likely other token."""

    id: int
    logprob: float
    other: int | None
    other_logprob: float


@dataclass(frozen=True)
class Answers:
    """What an engine answered: `tokens` for each prompt, or the `embedding`."""

    tokens: tuple[tuple[Token, ...], ...] = ()
    embedding: tuple[float, ...] = ()


@dataclass(frozen=True)
class Golden:
    """Golden answers. `weights_root`: the manifest's root, 32 bytes. `device`: "cpu" or "cuda". `margin`: the largest
    accepted distance: nats on average for tokens, 1 - cosine for an embedding."""

    task: Task
    weights_root: bytes
    device: str
    margin: float
    answers: Answers

    def save(self, path: Path) -> None:
        """Writes the file, all of it or nothing."""
        document = {
            "format": FORMAT,
            "task": self.task,
            "weights_root": self.weights_root.hex(),
            "device": self.device,
            "margin": self.margin,
            "prompts": list(PROMPTS) if self.task == "generate" else [TEXT],
            "tokens": [[[t.id, t.logprob, t.other, t.other_logprob] for t in one] for one in self.answers.tokens],
            "embedding": list(self.answers.embedding),
        }
        partial = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            partial.write_text(json.dumps(document) + "\n")
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: Path, weights_root: bytes) -> "Golden":
        """Reads what `save` wrote, for these weights and these prompts. Raises `CanaryFailed` for anything else."""
        try:
            document = json.loads(path.read_bytes()[:_LIMIT])
            answers = Answers(
                tuple(tuple(Token(*_token(item)) for item in one) for one in document["tokens"]),
                tuple(_number(item) for item in document["embedding"]),
            )
            task, root = document["task"], bytes.fromhex(document["weights_root"])
            found = cls(task, root, document["device"], _number(document["margin"]), answers)
            wanted = list(PROMPTS) if found.task == "generate" else [TEXT]
            if document["format"] != FORMAT or document["prompts"] != wanted:
                raise CanaryFailed(f"{path} was made by another version; make the golden answers again")
        except OSError as error:
            raise CanaryFailed(f"no golden answers: {path}: {error.strerror}") from error
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise CanaryFailed(f"{path} is not a file of golden answers ({type(error).__name__})") from error
        if found.weights_root != weights_root:
            raise CanaryFailed(f"{path} belongs to other weights (root {found.weights_root.hex()})")
        _usable(found)
        return found


async def make(socket: Path, model_id: str, task: Task, weights_root: bytes, device: str, timeout: float) -> Golden:
    """Golden answers of the engine that listens on `socket`, with the margin that it needs. Raises `CanaryFailed`.

    The engine is asked again, alone and several times at once, and must agree with itself.
    """
    first = await ask(socket, model_id, task, timeout)
    least, most = (LEAST_TURN, MOST_TURN) if task == "embed" else (LEAST, MOST)
    widest = Golden(task, weights_root, device, most, first)
    _usable(widest)
    others = [await ask(socket, model_id, task, timeout) for _ in range(_RUNS)]
    others += await asyncio.gather(*(ask(socket, model_id, task, timeout) for _ in range(_AT_ONCE)))
    apart = max(compare(widest, other) for other in others)
    if _TIMES * apart > most:
        raise CanaryFailed(f"the engine's own answers differ by {apart:.4f} from run to run: too much to tell a fault")
    return Golden(task, weights_root, device, max(least, _TIMES * apart), first)


async def check(socket: Path, model_id: str, golden: Golden, timeout: float) -> None:
    """Asks the engine on `socket` and compares. `timeout` in seconds, for each request. Raises `CanaryFailed`."""
    compare(golden, await ask(socket, model_id, golden.task, timeout))


async def ask(socket: Path, model_id: str, task: Task, timeout: float) -> Answers:
    """The engine's answers now, computed anew. Raises `CanaryFailed` if it has none."""
    connector = aiohttp.UnixConnector(str(socket))
    limit = aiohttp.ClientTimeout(total=timeout)
    async with aiohttp.ClientSession(connector=connector, timeout=limit) as session:
        if task == "embed":
            body: dict[str, Any] = {
                "model": model_id,
                "input": TEXT,
                "encoding_format": "float",
                "cache_salt": os.urandom(16).hex(),
            }
            return Answers(embedding=_embedding(await _post(session, "/v1/embeddings", body)))
        found = []
        for prompt in PROMPTS:
            body = {
                "model": model_id,
                "messages": [{"role": "user", "content": prompt}],
                "max_tokens": TOKENS,
                "ignore_eos": True,
                "temperature": 0,
                "logprobs": True,
                "top_logprobs": 2,
                "return_tokens_as_token_ids": True,
                # Nothing of an earlier run may come from the prefix cache.
                "cache_salt": os.urandom(16).hex(),
            }
            found.append(_tokens(await _post(session, "/v1/chat/completions", body)))
        return Answers(tokens=tuple(found))


def compare(golden: Golden, answers: Answers) -> float:
    """The distance of `answers` from the golden ones, in the margin's unit. Raises `CanaryFailed` if too large."""
    if golden.task == "embed":
        return _compare_embeddings(golden, answers.embedding)
    if len(answers.tokens) != len(PROMPTS):
        raise CanaryFailed("not every prompt has an answer")
    compared, farthest = 0, 0.0
    for prompt, wanted, found in zip(PROMPTS, golden.answers.tokens, answers.tokens, strict=True):
        apart = _compare_tokens(prompt, wanted, found)
        compared += len(apart)
        average = sum(apart) / max(len(apart), 1)
        if average > golden.margin:
            raise CanaryFailed(
                f"the log-probabilities after {prompt!r} are {average:.3f} nats from the golden ones on average, and "
                f"{golden.margin:.3f} is the most. {_ADVICE}"
            )
        farthest = max(farthest, average)
    if compared < COMPARED:
        raise CanaryFailed(f"only {compared} tokens could be compared, {COMPARED} are needed")
    return farthest


def _compare_tokens(prompt: str, wanted: tuple[Token, ...], found: tuple[Token, ...]) -> list[float]:
    """The distances between the log-probabilities of the tokens that can be compared, in nats."""
    if len(found) != len(wanted):
        raise CanaryFailed(f"{prompt!r} was continued by {len(found)} tokens instead of {len(wanted)}. {_ADVICE}")
    apart: list[float] = []
    for place, (golden, token) in enumerate(zip(wanted, found, strict=True)):
        if token.id != golden.id:
            undecided = golden.logprob - golden.other_logprob < UNDECIDED
            if not undecided or token.id != golden.other:
                raise CanaryFailed(
                    f"token {place + 1} after {prompt!r} is {token.id} (log-probability {token.logprob:.2f}) and "
                    f"should be {golden.id} ({golden.logprob:.2f}, the next best {golden.other_logprob:.2f}). {_ADVICE}"
                )
            break
        apart.append(abs(token.logprob - golden.logprob))
    return apart


def _compare_embeddings(golden: Golden, found: tuple[float, ...]) -> float:
    wanted = golden.answers.embedding
    if len(found) != len(wanted):
        raise CanaryFailed(f"the embedding has {len(found)} numbers instead of {len(wanted)}. {_ADVICE}")
    norms = math.hypot(*wanted), math.hypot(*found)
    if abs(norms[1] - norms[0]) > 0.01 * norms[0]:
        raise CanaryFailed(f"the embedding's length is {norms[1]:.3f} instead of {norms[0]:.3f}. {_ADVICE}")
    cosine = sum(a * b for a, b in zip(wanted, found, strict=True)) / (norms[0] * norms[1])
    if not 1 - cosine <= golden.margin:
        raise CanaryFailed(
            f"the embedding's cosine to the golden one is {cosine:.5f}, below {1 - golden.margin:.5f}. {_ADVICE}"
        )
    return 1 - cosine


_ADVICE = (
    "The engine does not compute what it did when the golden answers were made: look for what changed (driver, vLLM, "
    "settings, GPU) and for memory errors; make new ones (`adytum models canary`) only once you know why"
)


def _usable(golden: Golden) -> None:
    """Golden answers must be able to fail an engine."""
    task, answers = golden.task, golden.answers
    if not 0 < golden.margin <= (MOST_TURN if task == "embed" else MOST):
        raise CanaryFailed("golden answers with a margin that would let anything pass")
    if task == "embed":
        if not answers.embedding or answers.tokens or not math.hypot(*answers.embedding) > 0:
            raise CanaryFailed("golden answers without an embedding")
        return
    if task != "generate" or answers.embedding or len(answers.tokens) != len(PROMPTS):
        raise CanaryFailed("golden answers that do not answer every prompt")
    if any(len(one) != TOKENS for one in answers.tokens):
        raise CanaryFailed(f"golden answers that are not {TOKENS} tokens long")
    for one in answers.tokens:
        if len({token.id for token in one}) == 1 and one[0].logprob > -1e-6:
            raise CanaryFailed("a golden answer repeats one token with certainty: that is what a broken engine does")
    decided = 0
    for one in answers.tokens:
        for token in one:
            if token.logprob - token.other_logprob < UNDECIDED:
                break
            decided += 1
    if decided < COMPARED:
        raise CanaryFailed(f"golden answers with only {decided} decided tokens; {COMPARED} are needed")


async def _post(session: aiohttp.ClientSession, path: str, body: dict[str, Any]) -> Any:
    try:
        async with session.post(f"http://engine{path}", json=body) as answer:
            if answer.status != 200:
                raise CanaryFailed(f"the engine answered {answer.status} to {path}")
            return await answer.json()
    except (aiohttp.ClientError, OSError, TimeoutError, ValueError, RecursionError) as error:
        raise CanaryFailed(f"the engine gave no answer to {path} ({type(error).__name__})") from error


def _tokens(answer: Any) -> tuple[Token, ...]:
    try:
        (choice,) = answer["choices"]
        tokens = []
        for item in choice["logprobs"]["content"]:
            token = _id(item["token"])
            # The likeliest of the others. An impossible one is at minus infinity, which JSON cannot express.
            others = [(_number(top["logprob"]), _id(top["token"])) for top in item["top_logprobs"]]
            logprob, other = max((found for found in others if found[1] != token), default=(_IMPOSSIBLE, None))
            tokens.append(Token(token, _number(item["logprob"]), other, logprob))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CanaryFailed(f"the engine's answer has no log-probabilities ({type(error).__name__}: {error})") from error
    return tuple(tokens)


def _embedding(answer: Any) -> tuple[float, ...]:
    try:
        (item,) = answer["data"]
        return tuple(_number(value) for value in item["embedding"])
    except (KeyError, TypeError, ValueError) as error:
        raise CanaryFailed(f"the engine's answer has no embedding ({type(error).__name__}: {error})") from error


def _id(name: str) -> int:
    prefix, _, number = name.partition(":")
    if prefix != "token_id":
        raise ValueError("tokens are not given by their ids")
    return int(number)


def _token(item: Any) -> tuple[int, float, int | None, float]:
    token, logprob, other, other_logprob = item
    if type(token) is not int or not (other is None or type(other) is int):
        raise ValueError("a token's id is not a number")
    return token, _number(logprob), other, _number(other_logprob)


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError("not a number")
    try:
        number = float(value)
    except OverflowError as error:  # JSON's integers have no bound
        raise ValueError("not a finite number") from error
    if not math.isfinite(number):
        raise ValueError("not a finite number")
    return number
