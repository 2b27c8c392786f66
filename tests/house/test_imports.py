"""Who may import whom (design, "Layout"): every file's syntax tree is walked, whatever would be imported or when.

A rule says for which files it holds and which imports it takes. Each is also fed sources that break it.
"""

import ast
import functools
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("attestation", "inference", "deploy", "benchmarks", "tests")
OURS = ("adytum", "tests")
LAUNCHER = "inference/engine/run/launcher.py"
# Scripts for the engines' Python, which the benchmarks start as processes: vLLM's load generator, and torch's copies.
GENERATOR, TRANSFERS = "benchmarks/load/vllm_generator.py", "benchmarks/cc/transfer_device.py"
ENGINE_LIBRARIES = ("vllm", "torch", "transformers", "tokenizers", "safetensors")
# pyproject.toml's list for a client, and what two of them bring along and use in their own interfaces.
CLIENT_LIBRARIES = ("cryptography", "lxml", "httpx2", "aiohttp", "click", "anyio", "yarl")
# Two extras, which say so if they are missing, and a library that is only there if the caller's program uses it.
OPTIONAL_LIBRARIES = ("dcap_qvl", "sevsnpmeasure", "httpx")
# Parts of the standard library that Windows lacks.
UNIX_ONLY = ("fcntl", "grp", "posix", "pty", "pwd", "readline", "resource", "syslog", "termios", "tty")
DEVICE_LIBRARIES = ("pynvml", "cuda", "cupy", "amdsmi", "nv_attestation_sdk")


def under(target: str, *packages: str) -> bool:
    """Whether the dotted name lies in one of the packages."""
    return any(target == package or target.startswith(package + ".") for package in packages)


@functools.cache
def imports(path: str, source: str) -> tuple[str, ...]:
    """`_imports`, which many rules ask about the same files."""
    return tuple(_imports(path, source))


def _imports(path: str, source: str) -> Iterator[str]:
    """The dotted names that a file imports: `from a import b` gives `a.b`, which may be a module or a name in one."""
    package = PurePosixPath(path).parent.parts
    package = package if package[0] == "tests" else ("adytum", *package)
    for node in ast.walk(ast.parse(source, path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(filter(None, (start, node.module)))
            yield from (f"{module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            # import_module("a") and __import__("a"), however they are reached.
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if name in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                yield node.args[0].value


@dataclass(frozen=True)
class Rule:
    """For files that `covers`, no import that `refuses`. `broken` are (path, source) that break the rule."""

    says: str
    covers: Callable[[str], bool]
    refuses: Callable[[str], bool]
    broken: tuple[tuple[str, str], ...]
    kept: tuple[tuple[str, str], ...]


def inside(*folders: str) -> Callable[[str], bool]:
    return lambda path: any(path.startswith(folder + "/") for folder in folders)


def outside(*folders: str) -> Callable[[str], bool]:
    return lambda path: not inside(*folders)(path)


def is_device(target: str) -> bool:
    """Code that talks to a device: libraries for it, and our modules named so (`attestation/*/device.py`)."""
    return under(target, *DEVICE_LIBRARIES) or (
        under(target, "adytum.attestation") and bool({"device", "devices"} & set(target.split(".")))
    )


RULES = (
    Rule(
        # Under their old names the same modules would be loaded a second time: other classes, other module state.
        "the folders are imported as parts of adytum",
        lambda path: True,
        lambda target: under(target, "attestation", "inference", "deploy", "benchmarks"),
        (
            ("inference/backend/start.py", "from inference.core import config"),
            ("tests/unit/channel/support.py", "import attestation.verify"),
        ),
        (("inference/backend/start.py", "from adytum.inference.core import config"),),
    ),
    Rule(
        "inference never imports deploy",
        inside("inference"),
        lambda target: under(target, "adytum.deploy"),
        (("inference/cli/measure.py", "def f():\n    from adytum.deploy.launch import qemu"),),
        (("inference/cli/measure.py", "from adytum.attestation.reference import launch"),),
    ),
    Rule(
        "attestation stands alone",
        inside("attestation"),
        lambda target: under(target, *OURS) and not under(target, "adytum.attestation"),
        (
            ("attestation/verifier/document.py", "import adytum.inference"),
            ("attestation/verifier/document.py", "from adytum.inference.channel import hpke"),
            ("attestation/snp/report.py", "def f():\n    import adytum.inference.gateway.keys"),
            (
                "attestation/verifier/document.py",
                "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from tests import x",
            ),
            ("attestation/snp/report.py", "from ...inference import keys"),
        ),
        (
            ("attestation/verifier/document.py", "import hashlib\nfrom adytum.attestation.snp import report"),
            ("attestation/snp/report.py", "from . import chain\nfrom ..errors import EvidenceError"),
        ),
    ),
    Rule(
        # Style, 3. The command line and the devices themselves are where they come in.
        "verification imports no device",
        lambda path: inside("attestation")(path) and not path.endswith(("/device.py", "/devices.py", "/cli/main.py")),
        is_device,
        (
            ("attestation/verifier/document.py", "from adytum.attestation.snp.device import report"),
            ("attestation/verifier/document.py", "from adytum.attestation.snp import device"),
            ("attestation/snp/report.py", "from . import device"),
            ("attestation/nvidia/report.py", "import pynvml"),
            ("attestation/collect/rounds.py", "from adytum.attestation.nvidia.device import Gpus"),
        ),
        (
            ("attestation/nvidia/device.py", "import pynvml"),
            ("attestation/cli/main.py", "from adytum.attestation.snp import device"),
            ("attestation/verifier/document.py", "from adytum.attestation.snp import report"),
        ),
    ),
    Rule(
        "the channel imports the standard library, cryptography and itself",
        inside("inference/channel"),
        lambda target: (
            not under(target, "cryptography", "adytum.inference.channel")
            and target.split(".")[0] not in sys.stdlib_module_names
        ),
        (
            ("inference/channel/ohttp.py", "import httpx2"),
            ("inference/channel/ohttp.py", "from adytum.inference import keys"),
            ("inference/channel/ohttp.py", "from adytum.inference.gateway.keys import KeyRing"),
            ("inference/channel/ohttp.py", "from .. import keys"),
            ("inference/channel/ohttp.py", "import adytum.attestation.document.binding"),
            ("inference/channel/ohttp.py", "from importlib import import_module\nimport_module('pyhpke')"),
            ("inference/channel/ohttp.py", "try:\n    import cryptography_vectors\nexcept ImportError:\n    pass"),
        ),
        (
            (
                "inference/channel/ohttp.py",
                "import os\nfrom cryptography.hazmat.primitives import hpke\n"
                "from adytum.inference.channel import varint\nfrom adytum.inference import channel\n"
                "from . import limits\nfrom .errors import ChannelError",
            ),
        ),
    ),
    Rule(
        # Style, 1: no socket, clock, logger or async. `http.HTTPStatus` is a table of names.
        "the channel does no IO",
        inside("inference/channel"),
        lambda target: under(
            target,
            "asyncio",
            "datetime",
            "http.client",
            "http.cookiejar",
            "http.server",
            "logging",
            "selectors",
            "socket",
            "ssl",
            "subprocess",
            "threading",
            "time",
            "urllib",
        ),
        (
            ("inference/channel/ohttp.py", "import time"),
            ("inference/channel/ohttp.py", "from logging import getLogger"),
            ("inference/channel/ohttp.py", "import asyncio.streams"),
        ),
        (("inference/channel/ohttp.py", "import hmac, os, re\nfrom http import HTTPStatus"),),
    ),
    Rule(
        "the gateway imports no engine and no device",
        inside("inference/gateway"),
        lambda target: under(target, *ENGINE_LIBRARIES, "adytum.inference.engine.run.launcher") or is_device(target),
        (
            ("inference/gateway/edge/app.py", "import vllm"),
            ("inference/gateway/edge/app.py", "from torch import cuda"),
            ("inference/gateway/edge/app.py", "import pynvml"),
            ("inference/gateway/edge/app.py", "from adytum.attestation.snp import device"),
            ("inference/gateway/edge/app.py", "from adytum.attestation.nvidia.device import Gpu"),
            ("inference/gateway/edge/app.py", "__import__('vllm.entrypoints')"),
            ("inference/gateway/edge/app.py", "from adytum.inference.engine.run import launcher"),
        ),
        (
            (
                "inference/gateway/edge/app.py",
                "import fastapi\nfrom adytum.attestation import binding\nfrom adytum.inference.channel import ohttp",
            ),
        ),
    ),
    Rule(
        "the client takes channel, attestation and itself",
        inside("inference/client"),
        lambda target: (
            under(target, *OURS)
            and not under(target, "adytum.inference.channel", "adytum.attestation", "adytum.inference.client")
        ),
        (
            ("inference/client/proxy.py", "from adytum.inference import config"),
            ("inference/client/proxy.py", "from adytum.inference.gateway.failures import x"),
            ("inference/client/proxy.py", "from ..keys import KeyRing"),
            ("inference/client/proxy.py", "import adytum.inference.backend.start"),
            ("inference/client/proxy.py", "import adytum.deploy.demo"),
        ),
        (
            (
                "inference/client/proxy.py",
                "import httpx2\nfrom adytum.attestation.verifier.document import verify\n"
                "from adytum.inference.channel import ohttp\nfrom . import errors\nfrom ..channel import bhttp",
            ),
        ),
    ),
    Rule(
        # What `pip install adytum` installs is enough, on Windows too. A device's own module runs in the backend.
        "a client needs its few dependencies and no Unix",
        lambda path: (
            inside("inference/client", "inference/channel", "attestation")(path)
            and not path.endswith(("/device.py", "/devices.py"))
        ),
        lambda target: (
            under(target, *UNIX_ONLY)
            or not (
                under(target, "adytum", *CLIENT_LIBRARIES, *OPTIONAL_LIBRARIES)
                or target.split(".")[0] in sys.stdlib_module_names
            )
        ),
        (
            ("inference/client/workspace.py", "import fcntl"),
            ("inference/client/proxy/run.py", "import uvicorn"),
            ("inference/client/proxy/app.py", "from starlette.applications import Starlette"),
            ("inference/client/proxy/app.py", "def f():\n    import uvloop"),
            ("inference/channel/ohttp.py", "from pydantic import BaseModel"),
            ("attestation/policy/policy.py", "try:\n    import resource\nexcept ImportError:\n    pass"),
            ("attestation/verifier/document.py", "import fastapi"),
        ),
        (
            ("inference/client/proxy/app.py", "import asyncio\nfrom aiohttp import web\nimport yarl"),
            ("attestation/tdx/collateral.py", "import dcap_qvl"),
            ("attestation/snp/device.py", "import fcntl"),
            ("inference/gateway/edge/app.py", "import fastapi"),
        ),
    ),
    Rule(
        "nothing outside tests imports tests",
        outside("tests"),
        lambda target: under(target, "tests"),
        (
            ("benchmarks/load/load.py", "from tests.support import backend"),
            ("inference/backend/start.py", "import tests"),
            ("deploy/demo/run.py", "from tests.unit.channel import support"),
        ),
        (("inference/backend/start.py", "import testing"),),
    ),
    Rule(
        # The tests of the benchmarks are the exception: they test its arithmetic.
        "nothing outside benchmarks imports benchmarks",
        outside("benchmarks", "tests"),
        lambda target: under(target, "adytum.benchmarks"),
        (
            ("inference/backend/start.py", "from adytum.benchmarks import stats"),
            ("deploy/demo/run.py", "import adytum.benchmarks.load.load"),
            ("attestation/verifier/document.py", "from adytum.benchmarks.runfile.stats import x"),
        ),
        (("inference/backend/start.py", "import statistics"),),
    ),
    Rule(
        "one file imports vllm, and one its load generator",
        lambda path: path not in (LAUNCHER, GENERATOR),
        lambda target: under(target, "vllm"),
        (
            ("inference/engine/weights/weights.py", "import vllm"),
            ("inference/backend/start.py", "from vllm.entrypoints.openai import api_server"),
            ("deploy/demo/run.py", "import vllm"),
            ("benchmarks/runs/serve.py", "from vllm import LLM"),
            ("tests/engine/test_launcher.py", "import vllm"),
            ("attestation/verifier/document.py", "import importlib\nimportlib.import_module('vllm')"),
        ),
        (
            (LAUNCHER, "import vllm"),
            (GENERATOR, "from vllm.benchmarks.serve import main_async"),
            ("inference/backend/start.py", "import vllm_like"),
        ),
    ),
    Rule(
        "torch and transformers are for the demonstration's models, the engine's process and the measured copies",
        lambda path: path not in (LAUNCHER, TRANSFERS) and outside("deploy/demo", "deploy/engine_plugin")(path),
        lambda target: under(target, "torch", "transformers"),
        (
            ("inference/engine/weights/weights.py", "import torch"),
            ("benchmarks/load/load.py", "from transformers import AutoTokenizer"),
            ("deploy/image.py", "import torch.nn"),
        ),
        (
            (TRANSFERS, "import torch"),
            ("deploy/demo/train.py", "import torch\nfrom transformers import Trainer"),
        ),
    ),
)
LAYERS = {
    "attestation": (
        *("core", "document", "tsm", "simulated", "snp", "vtpm", "tdx", "nvidia"),
        *("reference", "policy", "verifier", "collect", "cli", "__main__"),
    ),
    "inference": ("channel", "core", "gateway", "engine", "client", "preflight", "backend", "cli", "__main__"),
    "inference/gateway": ("limits", "keys", "failures", "callers", "admission", "accounting", "exchange", "edge"),
    "inference/client": ("errors", "origin", "answers", "reader", "session", "workspace", "transport", "proxy"),
    "inference/engine": ("run", "weights", "placement", "supervise"),
    "benchmarks": (
        *("errors", "processes", "runfile", "report", "load", "channel"),
        *("parts", "runs", "leakage", "cc", "gpu", "__main__"),
    ),
    "deploy": ("engine_plugin", "launch", "weights", "demo"),
}
"""By folder, its rooms from the lowest up: a room imports itself and those before it, so there is no circle."""
NAMES = [rule.says for rule in RULES]


def sources() -> dict[str, str]:
    return {
        path.relative_to(ROOT).as_posix(): path.read_text("utf-8")
        for folder in FOLDERS
        for path in sorted((ROOT / folder).rglob("*.py"))
        if "node_modules" not in path.parts
    }


def violations(rule: Rule, files: dict[str, str]) -> list[str]:
    return [
        f"{path} imports {target}"
        for path, source in files.items()
        if rule.covers(path)
        for target in imports(path, source)
        if rule.refuses(target)
    ]


@pytest.fixture(scope="module")
def files() -> dict[str, str]:
    found = sources()
    assert {"inference/channel/hpke.py", "inference/backend/start.py", "tests/house/test_imports.py"} <= set(found)
    return found


@pytest.mark.parametrize("rule", RULES, ids=NAMES)
def test_rule(rule: Rule, files: dict[str, str]) -> None:
    assert any(rule.covers(path) for path in files)
    assert violations(rule, files) == []


@pytest.mark.parametrize("rule", RULES, ids=NAMES)
def test_the_rule_can_fail(rule: Rule) -> None:
    assert rule.broken
    for path, source in rule.broken:
        assert violations(rule, {path: source}), f"{path}: {source}"
    for path, source in rule.kept:
        assert violations(rule, {path: source}) == []


def upward(folder: str, files: dict[str, str]) -> list[str]:
    """The imports in the folder that lead from a room to one above it."""
    order = {room: at for at, room in enumerate(LAYERS[folder])}
    prefix = f"adytum.{folder.replace('/', '.')}."
    found = []
    for path, source in files.items():
        if not path.startswith(f"{folder}/") or path == f"{folder}/__init__.py":
            continue
        room = order[path.removeprefix(f"{folder}/").split("/")[0].removesuffix(".py")]
        for target in imports(path, source):
            if target.startswith(prefix) and order[target.removeprefix(prefix).split(".")[0]] > room:
                found.append(f"{path} imports {target}")
    return found


@pytest.mark.parametrize("folder", LAYERS)
def test_no_import_leads_to_a_higher_room(folder: str, files: dict[str, str]) -> None:
    assert upward(folder, files) == []
    lowest, highest = LAYERS[folder][0], LAYERS[folder][-1]
    above = f"from adytum.{folder.replace('/', '.')}.{highest} import x"
    assert upward(folder, {f"{folder}/{lowest}/module.py": above})


@pytest.mark.parametrize("folder", FOLDERS)
def test_rooms_are_small_and_say_what_they_are_for(folder: str, files: dict[str, str]) -> None:
    rooms = {str(PurePosixPath(path).parent) for path in files if path.startswith(f"{folder}/")}
    for room in rooms:
        modules = [path for path in files if str(PurePosixPath(path).parent) == room and "__" not in path]
        modules = [path for path in modules if not path.endswith(("/support.py", "/conftest.py"))]
        assert len(modules) <= 13, room
        if folder != "tests" and f"{room}/__init__.py" in files:
            assert ast.get_docstring(ast.parse(files[f"{room}/__init__.py"])), room


def test_names_of_imports() -> None:
    source = """
import a, b.c as d
from e import f, g
from . import h
from ..i import j
from k import *
def inner():
    import l
    importlib.import_module("m.n")
    __import__("o")
    import_module(name)
    print("p")
"""
    assert list(imports("tests/y/z.py", source)) == [
        "a", "b.c", "e.f", "e.g", "tests.y.h", "tests.i.j", "k.*", "l", "m.n", "o",
    ]  # fmt: skip
