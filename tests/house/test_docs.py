"""The documents: links and anchors lead somewhere, generated pages are current, the former name is gone."""

import ast
import importlib
import re
import runpy
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest

from adytum.attestation.document.evidence import Evidence
from tests.support import ROOT
from tests.unit.attestation.support import NONCE, document, with_claims

_FENCE = re.compile(r"(?ms)^ *(```|~~~).*?^ *\1 *$")
_LINK = re.compile(r"(?<!\\)\]\(\s*<?([^)\s>]+)>?(?:\s+\"[^\"]*\")?\s*\)")
_HEADING = re.compile(r"(?m)^#{1,6} +(.+?) *#*$")
_MENTION = re.compile(r"(?<![\w/.-])docs/[\w/-]+\.(?:md|yaml|svg)\b")
_PATH = re.compile(
    r"`((?:attestation|inference|deploy|benchmarks|tests|docs)/[\w./-]+\.(?:py|toml|sh|md|yaml|txt|cfg|mjs))\b"
)
"""A file of the repository that a page names in code style."""
_FORMER = "clois" + "ter"
"""The project's name until 0.1."""
_DATED = ("benchmarks/results/", "deploy/results/", "tests/fuzz/corpus/")
"""Records of measurements and runs: they stay as they were written."""


@cache
def files() -> tuple[str, ...]:
    """The repository's files. Links into the same tree (adytum/) are not among them."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return tuple(path for path in listed.splitlines() if not (ROOT / path).is_symlink() and (ROOT / path).is_file())


def slug(heading: str) -> str:
    """A heading's anchor, as GitHub and MkDocs make it."""
    plain = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").lower()
    return re.sub(r"\s", "-", re.sub(r"[^\w\s-]", "", plain).strip())


@cache
def anchors(path: str) -> frozenset[str]:
    """Of a Markdown file; a heading that occurs twice is numbered."""
    text, seen, found = _FENCE.sub("", (ROOT / path).read_text()), {}, set()
    for heading in _HEADING.findall(text):
        name = slug(heading)
        count = seen.get(name, 0)
        seen[name] = count + 1
        found.add(name if not count else f"{name}-{count}")
    return frozenset(found) | frozenset(re.findall(r'(?:id|name)="([^"]+)"', text))


def faults(path: str, text: str) -> list[str]:
    """Every relative link of a Markdown text at `path` that leads nowhere."""
    found = []
    for target in _LINK.findall(_FENCE.sub("", text)):
        if re.match(r"[a-z][a-z0-9+.-]*:", target):
            continue
        name, _, anchor = unquote(target).partition("#")
        file = (ROOT / path).parent / name if name else ROOT / path
        if not file.is_file():
            found.append(f"{target}: no such file")
        elif anchor and anchor not in anchors(str(file.resolve().relative_to(ROOT))):
            found.append(f"{target}: no such heading")
    return found


MARKDOWN = [path for path in files() if path.endswith(".md")]


def test_there_are_documents() -> None:
    assert len(MARKDOWN) > 30


@pytest.mark.parametrize("path", MARKDOWN)
def test_links_lead_somewhere(path: str) -> None:
    assert faults(path, (ROOT / path).read_text()) == []


@pytest.mark.parametrize(
    "text",
    [
        "[a](nowhere.md)",
        "[a](README.md#no-such-heading)",
        "[a](#no-such-heading)",
        "[a](docs)",
        '[a](nowhere.md "title")',
    ],
)
def test_a_broken_link_is_seen(text: str) -> None:
    assert len(faults("README.md", text)) == 1


def test_a_link_in_a_code_block_is_text() -> None:
    assert faults("README.md", "```text\n[a](nowhere.md)\n```\n") == []


def test_a_document_that_the_code_names_is_there() -> None:
    missing = []
    for path in files():
        if path.startswith(_DATED) or path == "tests/house/test_docs.py":
            continue
        try:
            text = (ROOT / path).read_text()
        except UnicodeDecodeError:
            continue
        missing += [f"{path}: {name}" for name in _MENTION.findall(text) if not (ROOT / name).is_file()]
    assert missing == []


@pytest.mark.parametrize("path", MARKDOWN)
def test_a_file_that_a_page_names_is_there(path: str) -> None:
    named = _PATH.findall((ROOT / path).read_text())
    assert [name for name in named if not (ROOT / name).is_file()] == []


def test_what_a_page_imports_is_there() -> None:
    """Each `from adytum... import ...` in a page's blocks of Python."""
    found = []
    for path in MARKDOWN:
        for block in re.findall(r"(?ms)^```python\n(.*?)^```$", (ROOT / path).read_text()):
            for node in ast.walk(ast.parse(block)):
                if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("adytum"):
                    found += [(path, node.module, alias.name) for alias in node.names]
    assert len(found) > 3
    missing = [each for each in found if not hasattr(importlib.import_module(str(each[1])), each[2])]
    assert missing == []


def test_the_binding_is_as_the_tutorial_computes_it(tmp_path: Path) -> None:
    """The block of Python in docs/tutorial.md, on a document made here, and on one with other claims."""
    (block,) = re.findall(r"(?ms)^```python\n(.*?)^```$", (ROOT / "docs/tutorial.md").read_text())
    good = Evidence.parse(document(nonces=(NONCE,)))
    other = replace(good, claims=with_claims(replica="another").encode())
    (tmp_path / "nonce.txt").write_text(NONCE.hex())

    def run(evidence: Evidence) -> subprocess.CompletedProcess[str]:
        (tmp_path / "evidence.json").write_bytes(evidence.encode())
        command = [sys.executable, "-c", block]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)

    assert "key_configurations = " in run(good).stdout
    assert "AssertionError" in run(other).stderr


@cache
def reference() -> dict[str, Any]:
    """The names in docs/tools/reference.py, run as a program runs it but for `main`."""
    return runpy.run_path(str(ROOT / "docs/tools/reference.py"))


@pytest.mark.parametrize("path", ["limits", "configuration", "commands"])
def test_a_generated_page_is_current(path: str) -> None:
    page = f"docs/reference/{path}.md"
    assert (ROOT / page).read_text() == reference()["PAGES"][page](), "run: python docs/tools/reference.py"


@pytest.mark.slow
def test_every_limit_has_a_test() -> None:
    named = list(reference()["limits"].tests())
    assert len(named) > 50
    for test in named:
        file, _, function = test.partition("::")
        functions = {
            node.name
            for node in ast.walk(ast.parse((ROOT / file).read_text()))
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        }
        assert function in functions, test


def test_the_former_name_stands_in_one_line_of_the_changelog() -> None:
    found = []
    for path in files():
        if path.startswith(_DATED):
            continue
        text = Path(ROOT / path).read_bytes().decode(errors="replace")
        found += [path for line in text.splitlines() if _FORMER in line.lower()]
    assert found == ["CHANGELOG.md"]
