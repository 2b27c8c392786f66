"""The script for a GPU machine, as far as none is needed: shapes, pieces, steps that resume."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from adytum.benchmarks.gpu import pieces, shapes, steps
from adytum.benchmarks.gpu.__main__ import main
from adytum.benchmarks.gpu.steps import Options, Step, StepError
from adytum.inference.core.config import parse
from adytum.inference.engine.placement.shapes import read
from tests.support import ROOT

pytestmark = pytest.mark.slow

GB = 1e9


@pytest.fixture
def options(tmp_path: Path) -> Options:
    return Options(
        pieces=tmp_path / "pieces",
        work=tmp_path / "work",
        out=tmp_path / "out",
        device="cpu",
        small=True,
        sandbox="full",
        gateway=Path("python"),
        engine=Path("python"),
        port=1,
    )


# As the models' publishers say: 70.55, 27.01 and 0.56 billion parameters, 4-bit with scales, 16-bit, 16-bit.
@pytest.mark.parametrize(("name", "gigabytes"), [("llama-3.3-70b-awq", 39.8), ("gemma-3-27b", 54.0), ("e5", 1.12)])
def test_the_shapes_are_the_published_models(tmp_path: Path, name: str, gigabytes: float) -> None:
    model = next(model for model in shapes.MODELS if model.name == name)
    shapes.write(model, tmp_path)
    shape = read(tmp_path)
    assert shape.weight_bytes / GB == pytest.approx(gigabytes, rel=0.01)
    assert shape.vocabulary == model.config["vocab_size"]
    vocabulary = json.loads((tmp_path / "tokenizer.json").read_text())["model"]["vocab"]
    assert sorted(vocabulary.values()) == list(range(shape.vocabulary))
    if name == "gemma-3-27b":
        assert (shape.global_layers, shape.sliding_layers, shape.window) == (10, 52, 1024)


@pytest.mark.engine
def test_a_prompt_of_random_tokens_keeps_its_length(tmp_path: Path) -> None:
    """As `vllm bench serve` makes them: random ids, decoded, and tokenized again by the engine."""
    shapes.write(shapes.MODELS[0].small(), tmp_path)
    code = (
        "import sys; from transformers import AutoTokenizer; t = AutoTokenizer.from_pretrained(sys.argv[1]);"
        "ids = list(range(7, 2000, 13)); text = t.decode(ids); assert t(text)['input_ids'] == ids, text[:80];"
        "print(len(t), t.apply_chat_template([{'role': 'user', 'content': 'w7 w8'}], tokenize=True)['input_ids'])"
    )
    python = str(ROOT / ".venv-engine/bin/python")
    found = subprocess.run([python, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr[-2000:]
    assert found.stdout.split("\n")[-2] == "2048 [1, 7, 8]"


def test_pieces_make_the_wheels_again(tmp_path: Path) -> None:
    wheels, carried, there = (tmp_path / name for name in ("wheels", "pieces", "there"))
    wheels.mkdir()
    content = {"a-1-py3-none-any.whl": bytes(range(256)) * 10, "b-1-py3-none-any.whl": b"short"}
    for name, data in content.items():
        (wheels / name).write_bytes(data)
    assert pieces.cut(wheels, carried, size=1000) == 4
    assert max(path.stat().st_size for path in carried.glob("*.whl.*")) == 1000
    assert pieces.join(carried, there) == 2
    assert {path.name: path.read_bytes() for path in there.iterdir()} == content
    last = carried / "a-1-py3-none-any.whl.002"
    data = last.read_bytes()
    last.write_bytes(data[:-1] + b"x")
    (there / "a-1-py3-none-any.whl").unlink()
    with pytest.raises(pieces.PiecesError, match="not what was packed"):
        pieces.join(carried, there)
    assert not (there / "a-1-py3-none-any.whl").exists()
    last.unlink()
    with pytest.raises(pieces.PiecesError, match=r"1 pieces are missing.*002"):
        pieces.join(carried, there)
    (carried / pieces.INDEX).unlink()
    with pytest.raises(pieces.PiecesError, match="copy the index"):
        pieces.join(carried, there)
    with pytest.raises(pieces.PiecesError, match="no wheel"):
        pieces.cut(tmp_path / "nothing", carried)


def test_lists_are_pinned_and_report_to_nobody() -> None:
    for name in ("gateway", "engine"):
        lines = (ROOT / "benchmarks/gpu" / f"{name}.txt").read_text().splitlines()
        pins = [line for line in lines if not line.startswith("#")]
        assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in pins)
        assert not [line for line in pins if re.match("sentry|fastapi-cloud|torch==|nvidia-(?!ml)", line)]
    assert "vllm==0.23.0" in pins


def test_steps_resume_where_they_stopped(options: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[str] = []
    broken = True

    def second(_: Options) -> None:
        if broken:
            raise StepError("no")
        taken.append("second")

    planned = [
        Step("first", 10, lambda _: taken.append("first")),
        Step("second", 10, second),
        Step("long", 500, lambda _: taken.append("long")),
    ]
    monkeypatch.setattr(steps, "steps", lambda _: planned)
    said: list[str] = []
    with pytest.raises(StepError):
        steps.run(options, 100, said.append)
    broken = False
    assert not steps.run(options, 100, said.append)
    assert taken == ["first", "second"], "what is done is not done again, and the long one was not begun"
    assert "500 s and 100 are left" in said[-1]
    assert steps.run(options, 600, said.append)
    assert taken == ["first", "second", "long"]
    assert set(json.loads((options.out / "state.json").read_text())) == {"first", "second", "long"}


def test_every_step_fits_one_call(options: Options) -> None:
    for device in ("cpu", "cuda"):
        planned = steps.steps(replace(options, device=device, gateway=None))
        assert max(step.seconds for step in planned) <= 570
        names = [step.name for step in planned]
        assert len(set(names)) == len(names)
        assert ("transfer" in names) == (device == "cuda")
        assert sum(name.startswith("serve-") for name in names) == 6


def test_the_configuration_that_is_written_is_one(tmp_path: Path) -> None:
    text = steps._CONFIG.format(
        port=8099, python="/p", runtime=tmp_path, sandbox="full", device="cuda", ready=420, id="random/x",
        task="generate", source="/m", arguments='["--load-format", "dummy"]',
    )  # fmt: skip
    config = parse(text.encode())
    assert config.models[0].arguments == ("--load-format", "dummy")


def test_states_asks_commands_that_exist(options: Options) -> None:
    options.out.mkdir()
    steps.states(replace(options, gateway=Path(sys.executable)))
    found = {path.name: path.read_text() for path in options.out.glob("*.txt")}
    assert set(found) == {"preflight.txt", "preflight-cc-on.txt", "collect.txt"}
    assert all("confidential VM" in found[name] for name in ("preflight.txt", "preflight-cc-on.txt"))
    assert "No module named" not in found["collect.txt"]
    assert re.search(r"exit status [12]\n$", found["collect.txt"])


def test_a_step_that_fails_says_what_to_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "pieces").mkdir()
    asked = ["run", "--pieces", str(tmp_path / "pieces"), "--out", str(tmp_path / "out"), "--work", str(tmp_path / "w")]
    assert main(asked) == 1
    assert "copy the index" in capsys.readouterr().out
    assert main([*asked, "--limit-s", "5"]) == 3
