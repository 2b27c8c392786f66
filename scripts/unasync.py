"""Writes the synchronous twins of asynchronous modules: `python scripts/unasync.py`; `--check` only compares.

As in httpcore, the asynchronous source is written by hand and its twin is derived from it line by line.
tests/house/test_twins.py fails if the committed twin differs.
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TWINS = {"inference/client/transport/_async.py": "inference/client/transport/_sync.py"}
"""Sources and the files that are generated from them."""
# Applied in this order: the exception to the rule about `Async` comes first.
REPLACEMENTS = (
    (r"\bAsyncByteStream\b", "SyncByteStream"),
    (r"\basync (?=def|with|for)", ""),
    (r"(?<![A-Za-z0-9])Async(?=[A-Z])", ""),
    (r"\bawait ", ""),
    (r"\bhandle_async_request\b", "handle_request"),
    (r"\b__aiter__\b", "__iter__"),
    (r"\baiter\(", "iter("),
    (r"\banext\(", "next("),
    (r"\baread\(", "read("),
    (r"\baclose\(", "close("),
    (r"\basynchronous\b", "synchronous"),
)
HEADER = "# Generated from {source} by scripts/unasync.py. Change that file, then run the script.\n"


def twin(source: str) -> str:
    """The text of the twin. Raises `ValueError` if a replacement matched nothing, because that row is dead."""
    text = (ROOT / source).read_text("utf-8")
    for pattern, replacement in REPLACEMENTS:
        text, count = re.subn(pattern, replacement, text)
        if not count:
            raise ValueError(f"{source} has no match for {pattern}")
    return HEADER.format(source=source) + text


def differing() -> list[str]:
    """The twins that are missing or differ from what their source generates."""
    return [
        target
        for source, target in TWINS.items()
        if not (ROOT / target).is_file() or (ROOT / target).read_text("utf-8") != twin(source)
    ]


def main() -> None:
    stale = differing()
    if "--check" in sys.argv[1:]:
        sys.exit(f"run scripts/unasync.py: {', '.join(stale)} would change" if stale else 0)
    for source, target in TWINS.items():
        (ROOT / target).write_text(twin(source), "utf-8")


if __name__ == "__main__":
    main()
