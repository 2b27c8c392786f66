"""Who may import whom (design, "Layout"): every file's syntax tree is walked, whatever would be imported or when.

A rule says for which files it holds and which imports it takes. Each is also fed sources that break it.
"""

import ast
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).resolve().parents[1]
OURS = ("attestation", "inference", "deploy", "benchmarks", "tests")
LAUNCHER = "inference/engine/launcher.py"
# Scripts for the engines' Python, which the benchmarks start as processes: vLLM's load generator, and torch's copies.
GENERATOR, TRANSFERS = "benchmarks/vllm_generator.py", "benchmarks/transfer_device.py"
ENGINE_LIBRARIES = ("vllm", "torch", "transformers", "tokenizers", "safetensors")
DEVICE_LIBRARIES = ("pynvml", "cuda", "cupy", "amdsmi", "nv_attestation_sdk")


def under(target: str, *packages: str) -> bool:
    """Whether the dotted name lies in one of the packages."""
    return any(target == package or target.startswith(package + ".") for package in packages)


def imports(path: str, source: str) -> Iterator[str]:
    """The dotted names that a file imports: `from a import b` gives `a.b`, which may be a module or a name in one."""
    package = PurePosixPath(path).parent.parts
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
        under(target, "attestation") and bool({"device", "devices"} & set(target.split(".")))
    )


RULES = (
    Rule(
        "attestation stands alone",
        inside("attestation"),
        lambda target: under(target, *OURS) and not under(target, "attestation"),
        (
            ("attestation/verify.py", "import inference"),
            ("attestation/verify.py", "from inference.channel import hpke"),
            ("attestation/snp/report.py", "def f():\n    import inference.keys"),
            ("attestation/verify.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from tests import x"),
            ("attestation/snp/report.py", "from ...inference import keys"),
        ),
        (
            ("attestation/verify.py", "import hashlib\nfrom attestation.snp import report"),
            ("attestation/snp/report.py", "from . import chain\nfrom ..errors import EvidenceError"),
        ),
    ),
    Rule(
        # Style, 3. The command line and the devices themselves are where they come in.
        "verification imports no device",
        lambda path: inside("attestation")(path) and not path.endswith(("/device.py", "/devices.py", "/__main__.py")),
        is_device,
        (
            ("attestation/verify.py", "from attestation.snp.device import report"),
            ("attestation/verify.py", "from attestation.snp import device"),
            ("attestation/snp/report.py", "from . import device"),
            ("attestation/nvidia/report.py", "import pynvml"),
            ("attestation/collect.py", "from attestation.nvidia.device import Gpus"),
        ),
        (
            ("attestation/nvidia/device.py", "import pynvml"),
            ("attestation/__main__.py", "from attestation.snp import device"),
            ("attestation/verify.py", "from attestation.snp import report"),
        ),
    ),
    Rule(
        "the channel imports the standard library, cryptography and itself",
        inside("inference/channel"),
        lambda target: (
            not under(target, "cryptography", "inference.channel")
            and target.split(".")[0] not in sys.stdlib_module_names
        ),
        (
            ("inference/channel/ohttp.py", "import httpx2"),
            ("inference/channel/ohttp.py", "from inference import keys"),
            ("inference/channel/ohttp.py", "from inference.keys import KeyRing"),
            ("inference/channel/ohttp.py", "from .. import keys"),
            ("inference/channel/ohttp.py", "import attestation.binding"),
            ("inference/channel/ohttp.py", "from importlib import import_module\nimport_module('pyhpke')"),
            ("inference/channel/ohttp.py", "try:\n    import cryptography_vectors\nexcept ImportError:\n    pass"),
        ),
        (
            (
                "inference/channel/ohttp.py",
                "import os\nfrom cryptography.hazmat.primitives import hpke\nfrom inference.channel import varint\n"
                "from inference import channel\nfrom . import limits\nfrom .errors import ChannelError",
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
        lambda target: under(target, *ENGINE_LIBRARIES, "inference.engine.launcher") or is_device(target),
        (
            ("inference/gateway/app.py", "import vllm"),
            ("inference/gateway/app.py", "from torch import cuda"),
            ("inference/gateway/app.py", "import pynvml"),
            ("inference/gateway/app.py", "from attestation.snp import device"),
            ("inference/gateway/app.py", "from attestation.nvidia.device import Gpu"),
            ("inference/gateway/app.py", "__import__('vllm.entrypoints')"),
            ("inference/gateway/app.py", "from inference.engine import launcher"),
        ),
        (
            (
                "inference/gateway/app.py",
                "import fastapi\nfrom attestation import binding\nfrom inference.channel import ohttp",
            ),
        ),
    ),
    Rule(
        "the client takes channel, attestation and itself",
        inside("inference/client"),
        lambda target: (
            under(target, *OURS) and not under(target, "inference.channel", "attestation", "inference.client")
        ),
        (
            ("inference/client/proxy.py", "from inference import config"),
            ("inference/client/proxy.py", "from inference.gateway.failures import x"),
            ("inference/client/proxy.py", "from ..keys import KeyRing"),
            ("inference/client/proxy.py", "import inference.app"),
            ("inference/client/proxy.py", "import deploy.demo"),
        ),
        (
            (
                "inference/client/proxy.py",
                "import httpx2\nfrom attestation.verify import verify\nfrom inference.channel import ohttp\n"
                "from . import errors\nfrom ..channel import bhttp",
            ),
        ),
    ),
    Rule(
        "nothing outside tests imports tests",
        outside("tests"),
        lambda target: under(target, "tests"),
        (
            ("benchmarks/load.py", "from tests.support import backend"),
            ("inference/app.py", "import tests"),
            ("deploy/demo/run.py", "from tests.channel import support"),
        ),
        (("inference/app.py", "import testing"),),
    ),
    Rule(
        # The tests of the benchmarks are the exception: they test its arithmetic.
        "nothing outside benchmarks imports benchmarks",
        outside("benchmarks", "tests"),
        lambda target: under(target, "benchmarks"),
        (
            ("inference/app.py", "from benchmarks import stats"),
            ("deploy/demo/run.py", "import benchmarks.load"),
            ("attestation/verify.py", "from benchmarks.stats import x"),
        ),
        (("inference/app.py", "import statistics"),),
    ),
    Rule(
        "one file imports vllm, and one its load generator",
        lambda path: path not in (LAUNCHER, GENERATOR),
        lambda target: under(target, "vllm"),
        (
            ("inference/engine/weights.py", "import vllm"),
            ("inference/app.py", "from vllm.entrypoints.openai import api_server"),
            ("deploy/demo/run.py", "import vllm"),
            ("benchmarks/serve.py", "from vllm import LLM"),
            ("tests/engine/test_launcher.py", "import vllm"),
            ("attestation/verify.py", "import importlib\nimportlib.import_module('vllm')"),
        ),
        (
            (LAUNCHER, "import vllm"),
            (GENERATOR, "from vllm.benchmarks.serve import main_async"),
            ("inference/app.py", "import vllm_like"),
        ),
    ),
    Rule(
        "torch and transformers are for the demonstration's models, the engine's process and the measured copies",
        lambda path: path not in (LAUNCHER, TRANSFERS) and outside("deploy/demo", "deploy/engine_plugin")(path),
        lambda target: under(target, "torch", "transformers"),
        (
            ("inference/engine/weights.py", "import torch"),
            ("benchmarks/load.py", "from transformers import AutoTokenizer"),
            ("deploy/image.py", "import torch.nn"),
        ),
        (
            (TRANSFERS, "import torch"),
            ("deploy/demo/train.py", "import torch\nfrom transformers import Trainer"),
        ),
    ),
)
NAMES = [rule.says for rule in RULES]


def sources() -> dict[str, str]:
    return {
        path.relative_to(ROOT).as_posix(): path.read_text("utf-8")
        for folder in OURS
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
    assert {"inference/channel/hpke.py", "inference/app.py", "tests/test_imports.py"} <= set(found)
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
    assert list(imports("x/y/z.py", source)) == [
        "a", "b.c", "e.f", "e.g", "x.y.h", "x.i.j", "k.*", "l", "m.n", "o",
    ]  # fmt: skip
