"""MkDocs hook: the site holds every Markdown file of the repository, at its place in the tree.

1. A page's source path is its path in the repository, so a relative link works on the site as it does in a checkout.
2. A page under docs/ has its URL without `docs/`; the front page is docs/index.md.
3. A file of another kind that a page links to (a configuration, a test, a picture) is copied, and so is docs/assets.
   Text is served as `.txt`, so that a browser shows it.
"""

import re
import subprocess
from pathlib import Path, PurePosixPath

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[2]
_LINK = re.compile(r"\]\(\s*([^)\s#]+)")
_SHOWN_AS_THEY_ARE = {".css", ".svg", ".png", ".gz", ".json", ".yaml"}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Replaces the files of `docs_dir` by those of the repository; the theme's own stay."""
    found = Files([file for file in files if Path(file.src_dir or "") != Path(config.docs_dir)])
    tracked = _tracked()
    pages = [path for path in tracked if path.endswith(".md")]
    for path in pages:
        found.append(_file(path, _page_url(path), config))
    assets = {path for path in tracked if path.startswith("docs/assets/")}
    for path in sorted(assets.union(*map(_targets, pages)) - set(pages)):
        shown = PurePosixPath(path).suffix in _SHOWN_AS_THEY_ARE
        found.append(_file(path, path if shown else f"{path}.txt", config))
    return found


def _tracked() -> list[str]:
    command = ["git", "ls-files", "-co", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)  # noqa: S603 - our own words
    if listed.returncode:
        raise SystemExit(f"the site is built from a git checkout: {listed.stderr}")
    return [path for path in listed.stdout.splitlines() if not (ROOT / path).is_symlink()]


def _page_url(path: str) -> str:
    """Where a page lies in the site: `docs/how-to/image.md` at `how-to/image/`, `deploy/README.md` at `deploy/`."""
    place = PurePosixPath(path)
    if path == "docs/index.md":
        return "index.html"
    if place.parts[0] == "docs":
        place = place.relative_to("docs")
    folder = place.parent if place.name == "README.md" and len(place.parts) > 1 else place.with_suffix("")
    return f"{str(folder).lower()}/index.html"


def _targets(page: str) -> set[str]:
    """The repository's files that a page links to."""
    at = (ROOT / page).parent
    links = (link for link in _LINK.findall((ROOT / page).read_text()) if ":" not in link)
    files = ((at / link).resolve() for link in links)
    return {str(file.relative_to(ROOT)) for file in files if file.is_file() and file.is_relative_to(ROOT)}


def _file(path: str, url: str, config: MkDocsConfig) -> File:
    return File(path, str(ROOT), config.site_dir, config.use_directory_urls, dest_uri=url)
