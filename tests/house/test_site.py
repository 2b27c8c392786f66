"""The documents as a site: it builds strictly, and a reader's browser asks no other host for anything."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import ROOT

pytestmark = pytest.mark.slow

pytest.importorskip("material", reason="needs MkDocs: pip install -e '.[docs]'")

_LOADED = re.compile(r"<(?:script|img|iframe|source|video|audio|embed)\b[^>]*\bsrc=[\"']?([^\"' >]+)")
_LINKED = re.compile(r"<link\b[^>]*>")
_STYLED = re.compile(r"url\([\"']?((?:https?:)?//[^)\"']+)")


def foreign(text: str) -> list[str]:
    """What a page or a style sheet would load from another host."""
    links = [re.search(r"href=[\"']?([^\"' >]+)", link) for link in _LINKED.findall(text) if "canonical" not in link]
    loaded = _LOADED.findall(text) + [found[1] for found in links if found] + _STYLED.findall(text)
    return [address for address in loaded if re.match(r"(?:https?:)?//", address)]


@pytest.mark.parametrize(
    "text",
    [
        '<script src="https://cdn.example/x.js"></script>',
        "<link href=//fonts.example/css rel=stylesheet>",
        "@font-face { src: url(https://fonts.example/x.woff2) }",
    ],
)
def test_a_foreign_address_is_seen(text: str) -> None:
    assert len(foreign(text)) == 1


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git, which lists the pages")
def test_the_site(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    pages = list((tmp_path / "site").rglob("*.html"))
    assert len(pages) > 30
    sheets = list((tmp_path / "site").rglob("*.css"))
    assert {
        str(file.relative_to(tmp_path)): foreign(file.read_text())
        for file in pages + sheets
        if foreign(file.read_text())
    } == {}
