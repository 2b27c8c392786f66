"""What the tests of independent clients share: Node's packages, running a client, what a stream looks like."""

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).resolve().parent


def node(script: str, given: dict[str, Any]) -> dict[str, Any]:
    """What a client beside this file prints for `given`. The API key goes by stdin, not by the command line."""
    done = subprocess.run(
        ["node", "--no-warnings", str(FOLDER / script)],
        input=json.dumps(given),
        capture_output=True,
        text=True,
        cwd=FOLDER,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def install() -> None:
    """`npm ci` where the lock file is newer than what is installed."""
    if not (shutil.which("node") and shutil.which("npm")):
        reason = "node and npm are not installed: the clients written in JavaScript cannot run"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    installed = FOLDER / "node_modules" / ".package-lock.json"
    if installed.exists() and installed.stat().st_mtime >= (FOLDER / "package-lock.json").stat().st_mtime:
        return
    done = subprocess.run(
        ["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund"],
        cwd=FOLDER,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]


def chat(model: str, **more: Any) -> dict[str, Any]:
    """A chat request whose answer has one length whatever the model says."""
    return {
        "model": model,
        "messages": [{"role": "user", "content": "Which documents do I need to open an account?"}],
        "temperature": 0,
        "max_tokens": 16,
        **more,
    }


def stream(model: str, tokens: int = 600) -> dict[str, Any]:
    """A streamed chat of exactly `tokens` tokens, a second or more long: an engine on a busy machine can pause."""
    return chat(model, stream=True, max_tokens=tokens, min_tokens=tokens, ignore_eos=True)


def events(body: str) -> list[dict[str, Any]]:
    """The events of a chat stream, which ends with `[DONE]`; comments are not events."""
    blocks = [block for block in body.split("\n\n") if block and not block.startswith(":")]
    assert all(block.startswith("data: ") for block in blocks), blocks
    assert blocks[-1] == "data: [DONE]"
    return [json.loads(block.removeprefix("data: ")) for block in blocks[:-1]]


def said(chunks: list[dict[str, Any]]) -> str:
    return "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks if chunk["choices"])


def check_arrivals(arrivals: list[dict[str, float]], ended: float) -> None:
    """Plaintext came while the model was still writing: in many pieces, the first long before the last.

    What is held back until the end and sent then comes in many pieces too, all of them at the end.
    """
    at = [arrival["at"] for arrival in arrivals]
    assert at == sorted(at)
    # Events that are ready together leave together, so a busy machine makes fewer of them.
    assert len(at) >= 8, arrivals
    assert at[0] < 0.75 * ended, (at[0], ended)
    assert sum(moment > 0.95 * ended for moment in at) < 0.75 * len(at), (at, ended)
