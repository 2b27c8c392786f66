"""The maintained load generator, `vllm bench serve`, in the engines' environment: one process for a whole run."""

import contextlib
import json
import os
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adytum.benchmarks.errors import Unusable
from adytum.benchmarks.runfile.runfile import Level, Request

_SCRIPT = Path(__file__).with_name("vllm_generator.py")
_TASKS = {"chat": ("openai-chat", "/v1/chat/completions"), "embeddings": ("openai-embeddings", "/v1/embeddings")}


@dataclass(frozen=True)
class Load:
    """The requests of a load. `tokenizer`: the model's folder or hub id. Lengths are in tokens."""

    task: str
    model: str
    tokenizer: str
    prompt_tokens: int
    output_tokens: int

    def flags(self, level: Level, requests: int, seed: int, url: str = "http://unused", salt: str = "") -> list[str]:
        """The flags of `vllm bench serve`; the run file keeps all of them. `salt`: see `load.body`."""
        backend, endpoint = _TASKS[self.task]
        flags = ["--backend", backend, "--endpoint", endpoint, "--base-url", url]
        flags += ["--model", self.model, "--tokenizer", self.tokenizer]
        flags += ["--dataset-name", "random", "--input-len", str(self.prompt_tokens)]
        flags += ["--output-len", str(self.output_tokens), "--num-prompts", str(requests), "--seed", str(seed)]
        flags += ["--temperature", "0"] if self.task == "chat" else []
        flags += ["--extra-body", json.dumps({"cache_salt": salt})] if self.task == "chat" and salt else []
        flags += ["--max-concurrency", f"{level.value:.0f}"] if level.kind == "closed" else []
        flags += ["--request-rate", f"{level.value:g}"] if level.kind == "poisson" else []
        # The warm-up is a separate load, and a test request would be one more than the other arms get.
        return [*flags, "--num-warmups", "0", "--ready-check-timeout-sec", "0", "--disable-tqdm", "--save-detailed"]


class Generator:
    """A running generator."""

    def __init__(self, process: "subprocess.Popen[str]", folder: Path, log: Path) -> None:
        self._process = process
        self._out = folder / "result.json"
        self._log = log
        self._answer()

    def load(self, flags: list[str]) -> tuple[list[Request], float]:
        """The requests of one load, and its wall time in seconds. Raises `Unusable`."""
        found = self._do("load", flags)
        # Embeddings have no start times and no tokens, because an answer is one piece.
        count = len(found["latencies"])
        starts = found["start_times"] or [None] * count
        first = min((start for start in starts if start is not None), default=0.0)
        requests = [
            Request(
                start_s=None if start is None else start - first,
                ttft_s=None if found["ttfts"] is None else found["ttfts"][place],
                e2e_s=found["latencies"][place],
                gaps_s=tuple(found["itls"][place]) if found["itls"] is not None else (),
                tokens=found["output_lens"][place] if isinstance(found["output_lens"], list) else 0,
                prompt_tokens=found["input_lens"][place],
                error=found["errors"][place].strip().rpartition("\n")[2],
            )
            for place, start in enumerate(starts)
        ]
        return requests, found["duration"]

    def prompts(self, flags: list[str]) -> list[str]:
        """The prompts that a load with these flags would send. Raises `Unusable`."""
        found: list[str] = self._do("prompts", flags)
        return found

    def _do(self, what: str, flags: list[str]) -> Any:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"do": what, "arguments": flags, "out": str(self._out)}) + "\n")
        self._process.stdin.flush()
        self._answer()
        return json.loads(self._out.read_text())

    def _answer(self) -> None:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        error = json.loads(line)["error"] if line else "it ended"
        if error is not None:
            text = "\n".join(self._log.read_text(errors="replace").splitlines()[-8:])
            raise Unusable(f"the load generator (vllm bench serve) failed: {error}; the end of its output:\n{text}")


@contextlib.contextmanager
def running(python: Path, api_key: str = "") -> Iterator[Generator]:
    """A generator under the engines' `python`. Raises `Unusable` if that has no vllm."""
    if not python.exists():
        raise Unusable(f"{python} is missing; `make engine-env` makes the engines' environment")
    quiet = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "PATH": os.environ["PATH"]}
    quiet |= {"OPENAI_API_KEY": api_key} if api_key else {}
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "generator.log"
        with log.open("w") as out:
            process = subprocess.Popen(
                [str(python), "-P", str(_SCRIPT)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=out,
                text=True,
                env={**quiet, "HOME": folder},
            )
        try:
            yield Generator(process, Path(folder), log)
        finally:
            assert process.stdin is not None
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
