"""A real, small run against the running backend with real vLLM: every kind of arm, and vLLM's own load generator."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from adytum.benchmarks.runfile import runfile
from adytum.benchmarks.runs.serve import KEY_VARIABLE
from tests.conftest import ROOT, RunningBackend
from tests.system.test_answers import ask_engine

ARMS = ("direct", "own-direct", "ohttp", "own-ehbp", "own-shape-constant")


def serve(backend: RunningBackend, *options: str, key: str | None = None) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "-m",
        "adytum.benchmarks",
        "serve",
        "--quick",
        "--config",
        str(backend.config_path),
        *options,
    ]
    environment = {**os.environ, KEY_VARIABLE: backend.api_key if key is None else key}
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900, env=environment)


def prefix_hits(backend: RunningBackend) -> float:
    """Tokens that the engine found in its cache of prefixes, by its own counter."""
    page = ask_engine(backend.sockets[backend.llama], "GET", "/metrics").decode()
    return sum(float(value) for value in re.findall(r"(?m)^vllm:prefix_cache_hits_total\{.*\} (\S+)$", page))


def test_a_run_through_all_kinds_of_arms(backend: RunningBackend, tmp_path: Path) -> None:
    out = tmp_path / "run.json"
    hits = prefix_hits(backend)
    done = serve(
        backend,
        "--arms",
        *ARMS,
        "--output-tokens",
        "12",
        "--prompt-tokens",
        "160",
        "--ttft-ms",
        "5000",
        "--out",
        str(out),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    run = runfile.load(out)
    assert run.arms == list(ARMS)
    assert run.head["engine_flags"]["value"], "the engine's flags, from its own process"
    assert run.head["models"][0]["lock_sha256"]["value"]
    for arm in ARMS:
        for level in run.levels:
            cell = run.cell(arm, level)
            assert [item.index for item in cell] == [0, 1, 2]
            for item in cell:
                assert {request.tokens for request in item.requests} == {12}
            # Nearly each token is an event (a late engine joins some), padded or not: unmended, vLLM's generator loses
            # those behind padding, and one or two are left of twelve.
            gaps = [len(request.gaps_s) for item in cell for request in item.requests]
            assert sum(gaps) / len(gaps) > 8, arm
    assert prefix_hits(backend) == hits, "an arm found the prompts of one before it in the engine's cache"
    # The same words in every arm.
    prompts = {tuple(sorted(r.prompt_tokens for r in item.requests)) for item in run.repetitions if item.index == 0}
    assert len(prompts) <= 2 * len(run.levels)
    assert backend.api_key not in out.read_text()


def test_embeddings(backend: RunningBackend, tmp_path: Path) -> None:
    out = tmp_path / "run.json"
    arms = ["direct", "ohttp", "own-ohttp"]
    done = serve(backend, "--task", "embeddings", "--prompt-tokens", "16", "--arms", *arms, "--out", str(out))
    assert done.returncode == 0, done.stdout + done.stderr
    run = runfile.load(out)
    assert all(not request.error and request.e2e_s > 0 for item in run.repetitions for request in item.requests)


@pytest.mark.parametrize("client", ["own-ohttp"])
def test_failed_requests_are_no_success(backend: RunningBackend, tmp_path: Path, client: str) -> None:
    done = serve(backend, "--arms", client, "--out", str(tmp_path / "run.json"), key="sk-wrong")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "requests failed" in done.stderr
    assert "401" in done.stderr
