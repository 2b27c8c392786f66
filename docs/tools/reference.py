"""Writes the reference pages that the code itself states: limits, configuration keys and command lines.

    python docs/tools/reference.py          # writes the pages; tests/house/test_docs.py compares them with the code

A number, a default or an option that changes without its page fails that test.
"""

import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# This checkout's code, whatever is installed.
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

import commands  # noqa: E402 - beside this file, which is not a package
import configuration  # noqa: E402
import limits  # noqa: E402

PAGES: dict[str, Callable[[], str]] = {
    "docs/reference/limits.md": limits.page,
    "docs/reference/configuration.md": configuration.page,
    "docs/reference/commands.md": commands.page,
}


def main() -> None:
    """Writes every page."""
    for path, page in PAGES.items():
        (ROOT / path).write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
