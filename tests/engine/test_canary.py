"""The canary: what it compares, what it lets pass, and that an engine with one damaged tensor does not."""

import asyncio
import json
import math
import shutil
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from adytum.inference.engine.run.process import Engine, EngineSpec
from adytum.inference.engine.supervise import canary
from adytum.inference.engine.supervise.canary import PROMPTS, TOKENS, Answers, CanaryFailed, Golden, Token, compare
from adytum.inference.engine.weights.weights import Manifest

Make = Callable[..., EngineSpec]
ROOT = bytes(range(32))


def _answer(seed: int, gap: float = 3.0) -> tuple[Token, ...]:
    return tuple(Token(seed * 100 + i, -0.05, seed * 100 + i + 50, -0.05 - gap) for i in range(TOKENS))


ANSWERS = Answers(tuple(_answer(seed) for seed in range(len(PROMPTS))))
GOLDEN = Golden("generate", ROOT, "cpu", 0.1, ANSWERS)
VECTOR = tuple(math.sin(i) / math.sqrt(64) for i in range(128))
EMBEDDING = Golden("embed", ROOT, "cpu", 1e-3, Answers(embedding=VECTOR))


def changed(prompt: int, place: int, token: Token) -> Answers:
    tokens = [list(one) for one in ANSWERS.tokens]
    tokens[prompt][place] = token
    return Answers(tuple(tuple(one) for one in tokens))


def test_the_same_answers_pass() -> None:
    compare(GOLDEN, ANSWERS)
    compare(EMBEDDING, Answers(embedding=VECTOR))


@pytest.mark.parametrize("place", [0, 5, TOKENS - 1])
def test_another_token_fails_where_the_golden_one_was_decided(place: int) -> None:
    golden = ANSWERS.tokens[1][place]
    for other in (golden.other, 7777):
        with pytest.raises(CanaryFailed, match=f"token {place + 1} after"):
            compare(GOLDEN, changed(1, place, Token(other or 0, -0.1, golden.id, -0.2)))


def test_the_runner_up_passes_where_the_golden_one_was_undecided_and_no_other_does() -> None:
    near = list(ANSWERS.tokens[1])
    near[6] = replace(near[6], other_logprob=near[6].logprob - 0.1)
    golden = replace(GOLDEN, answers=Answers((ANSWERS.tokens[0], tuple(near), ANSWERS.tokens[2])))
    runner_up = Token(near[6].other or 0, -0.1, near[6].id, -0.2)
    # What follows another choice is another text.
    compare(golden, Answers((ANSWERS.tokens[0], (*near[:6], runner_up, *_answer(9)[7:]), ANSWERS.tokens[2])))
    with pytest.raises(CanaryFailed, match="token 7 after"):
        compare(golden, Answers((ANSWERS.tokens[0], (*near[:6], _answer(9)[6], *near[7:]), ANSWERS.tokens[2])))


def test_log_probabilities_that_are_far_off_fail_though_the_tokens_are_equal() -> None:
    off = tuple(replace(token, logprob=token.logprob - 0.2) for token in ANSWERS.tokens[2])
    with pytest.raises(CanaryFailed, match="nats from the golden ones"):
        compare(GOLDEN, Answers((*ANSWERS.tokens[:2], off)))
    near = tuple(replace(token, logprob=token.logprob - 0.05) for token in ANSWERS.tokens[2])
    compare(GOLDEN, Answers((*ANSWERS.tokens[:2], near)))


@pytest.mark.parametrize(
    "answers",
    [
        Answers(),
        Answers(ANSWERS.tokens[:2]),
        Answers((*ANSWERS.tokens[:2], ())),
        Answers((*ANSWERS.tokens[:2], ANSWERS.tokens[2][:-1])),
        Answers(embedding=VECTOR),
    ],
)
def test_what_is_missing_is_no_success(answers: Answers) -> None:
    with pytest.raises(CanaryFailed):
        compare(GOLDEN, answers)


@pytest.mark.parametrize(
    "vector",
    [
        (),
        VECTOR[:-1],
        tuple(-x for x in VECTOR),
        tuple(1.05 * x for x in VECTOR),
        (0.0,) * len(VECTOR),
        tuple(x + 0.01 * math.cos(5 * i) for i, x in enumerate(VECTOR)),
    ],
)
def test_another_embedding_fails(vector: tuple[float, ...]) -> None:
    with pytest.raises(CanaryFailed):
        compare(EMBEDDING, Answers(embedding=vector))


def test_a_file_of_golden_answers(tmp_path: Path) -> None:
    path = tmp_path / "adytum-canary.json"
    for golden in (GOLDEN, EMBEDDING):
        golden.save(path)
        assert Golden.load(path, ROOT) == golden
    with pytest.raises(CanaryFailed, match="other weights"):
        Golden.load(path, bytes(32))
    with pytest.raises(CanaryFailed, match="no golden answers"):
        Golden.load(tmp_path / "none", ROOT)


@pytest.mark.parametrize(
    "changes",
    [
        {"format": "v0"},
        {"prompts": ["x"]},
        {"tokens": []},
        {"tokens": [[[1, -0.1, 2, -4.0]] * TOKENS] * 2},
        {"tokens": [[[1, -0.1, 2, -4.0]] * 3] * 3},
        {"tokens": [[[i, -0.1, 99, -0.11] for i in range(TOKENS)]] * 3},
        {"tokens": [[[1, 0.0, 2, -9.0]] * TOKENS] * 3},
        {"tokens": [[[1, float("nan"), 2, -4.0]] * TOKENS] * 3},
        {"tokens": [[[1, -(10**400), 2, -4.0]] * TOKENS] * 3},
        {"tokens": [[["1", -0.1, 2, -4.0]] * TOKENS] * 3},
        {"task": "embed"},
        {"margin": 0.5},
        {"margin": 0},
        {"embedding": [0.1]},
        {"weights_root": "zz"},
    ],
)
def test_golden_answers_that_could_not_fail_an_engine_are_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    path = tmp_path / "golden.json"
    GOLDEN.save(path)
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(CanaryFailed):
        Golden.load(path, ROOT)


def _generated(**changes: object) -> dict[str, Any]:
    """One answer in vLLM's shape, with the golden tokens; keyword arguments replace fields of its first token."""
    first, *rest = [
        {
            "token": f"token_id:{token.id}",
            "logprob": token.logprob,
            "top_logprobs": [
                {"token": f"token_id:{token.id}", "logprob": token.logprob},
                {"token": f"token_id:{token.other}", "logprob": token.other_logprob},
            ],
        }
        for token in ANSWERS.tokens[0]
    ]
    return {"choices": [{"logprobs": {"content": [first | changes, *rest]}}]}


def _asked(folder: Path, task: canary.Task, answer: str | bytes, status: int = 200) -> tuple[Answers, list[Any]]:
    """What `ask` makes of an engine that answers this to everything, and the bodies that it sent."""
    bodies: list[Any] = []

    async def serve(request: web.Request) -> web.Response:
        bodies.append(await request.json())
        body = answer.encode() if isinstance(answer, str) else answer
        return web.Response(status=status, body=body, content_type="application/json")

    async def run() -> Answers:
        app = web.Application()
        app.router.add_post("/v1/{path:.*}", serve)
        runner = web.AppRunner(app)
        await runner.setup()
        try:
            await web.UnixSite(runner, str(folder / "s")).start()
            return await canary.ask(folder / "s", "m", task, 5)
        finally:
            await runner.cleanup()

    return asyncio.run(run()), bodies


def test_every_request_is_computed_anew(tmp_path: Path) -> None:
    """Greedy, and with a salt of its own, so that nothing comes out of the prefix cache."""
    found, generated = _asked(tmp_path, "generate", json.dumps(_generated()))
    assert found.tokens == (ANSWERS.tokens[0],) * len(PROMPTS)
    assert [body["messages"][0]["content"] for body in generated] == list(PROMPTS)
    assert all(body["temperature"] == 0 for body in generated)
    found, embedded = _asked(tmp_path, "embed", json.dumps({"data": [{"embedding": VECTOR}]}))
    assert found.embedding == VECTOR
    salts = [body["cache_salt"] for body in generated + embedded]
    assert len(set(salts)) == len(PROMPTS) + 1


@pytest.mark.parametrize(
    ("task", "answer"),
    [
        ("generate", ""),
        ("generate", "null"),
        ("generate", "[]"),
        ("generate", b"\xff"),
        ("generate", "[" * 100_000),
        ("generate", '{"choices": []}'),
        ("generate", '{"choices": [{"logprobs": null}]}'),
        ("generate", json.dumps(_generated(logprob=None))),
        ("generate", json.dumps(_generated(logprob=math.nan))),
        ("generate", json.dumps(_generated(logprob=-math.inf))),
        ("generate", json.dumps(_generated(logprob=10**400))),
        ("generate", json.dumps(_generated(token="!"))),
        ("generate", json.dumps(_generated(token=None))),
        ("embed", '{"data": []}'),
        ("embed", '{"data": [{"embedding": "AAAA"}]}'),
        ("embed", '{"data": [{"embedding": [NaN]}]}'),
        ("embed", '{"data": [{"embedding": [true]}]}'),
        ("embed", json.dumps({"data": [{"embedding": [10**400]}]})),
    ],
)
def test_only_a_failed_canary_comes_of_a_malformed_answer(tmp_path: Path, task: canary.Task, answer: str) -> None:
    with pytest.raises(CanaryFailed):
        _asked(tmp_path, task, answer)


def test_an_error_with_a_good_body_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CanaryFailed, match="500"):
        _asked(tmp_path, "generate", json.dumps(_generated()), status=500)


def _damaged(source: Path, target: Path, tensor: str) -> Path:
    """A copy of a model folder in which the values of one tensor stand in another order."""
    shutil.copytree(source, target)
    file = target / "model.safetensors"
    data = bytearray(file.read_bytes())
    (length,) = struct.unpack_from("<Q", data)
    header = json.loads(data[8 : 8 + length])
    start, end = (8 + length + offset for offset in header[tensor]["data_offsets"])
    # Halves exchanged: every value is one that the model knows, and the file's size is the same.
    middle = start + (end - start) // 2
    data[start:end] = data[middle:end] + data[start:middle]
    file.write_bytes(data)
    return target


def test_real_engines_sound_and_with_one_damaged_tensor(spec: Make, models: Path, tmp_path: Path) -> None:
    """Both damaged ones start, answer with status 200, and fail; the sound ones pass, alone and under load."""
    llama = _damaged(models / "llama-awq", tmp_path / "llama", "model.layers.1.mlp.down_proj.qweight")
    e5 = _damaged(models / "e5", tmp_path / "e5", "encoder.layer.0.attention.self.value.weight")
    sound = spec(socket=tmp_path / "run" / "a.sock")
    bad = spec(model=str(llama), socket=tmp_path / "run" / "b.sock")
    bad_e5 = spec(id="demo/e5", model=str(e5), task="embed", socket=tmp_path / "run" / "c.sock", tool_parser=None)

    async def run() -> None:
        engines = [Engine(item) for item in (sound, bad, bad_e5)]
        try:
            for engine in engines:
                await engine.start()
            await asyncio.gather(*(engine.wait_ready(900) for engine in engines))
            golden = Golden.load(models / "llama-awq" / "adytum-canary.json", _root(models / "llama-awq"))
            await canary.check(sound.socket, sound.id, golden, 60)
            load = [asyncio.create_task(canary.ask(sound.socket, sound.id, "generate", 60)) for _ in range(8)]
            await canary.check(sound.socket, sound.id, golden, 60)
            await asyncio.gather(*load)
            assert (await canary.ask(bad.socket, bad.id, "generate", 60)).tokens, "the damaged engine answers"
            with pytest.raises(CanaryFailed, match=r"should be|nats"):
                await canary.check(bad.socket, bad.id, golden, 60)
            golden_e5 = Golden.load(models / "e5" / "adytum-canary.json", _root(models / "e5"))
            with pytest.raises(CanaryFailed, match="cosine"):
                await canary.check(bad_e5.socket, bad_e5.id, golden_e5, 60)
            with pytest.raises(CanaryFailed, match="no answer"):
                await canary.check(tmp_path / "none.sock", bad.id, golden, 5)
            with pytest.raises(CanaryFailed, match="404"):
                await canary.check(sound.socket, "another", golden, 60)
        finally:
            await asyncio.gather(*(engine.stop() for engine in engines))

    asyncio.run(run())


def _root(folder: Path) -> bytes:
    return Manifest.load(folder / "adytum-manifest.json").root
