"""Reads `docs/faq.md`, the text that the demo models are trained on. Standard library only, so that tests can use it.

The page is Markdown for people. Everything below the first `### ` heading must keep this shape, one entry after
another, with `## ` headings between groups of entries:

    ### A question?

    The answer, one paragraph.

    Also asked: Another wording?; And one more?
"""

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

ALSO = "Also asked: "
MAX_ANSWER_WORDS = 45
"""The chat models learn answers word for word; longer ones would cost training time."""


class FaqError(ValueError):
    """The page does not have the shape described in this module's docstring."""


@dataclass(frozen=True)
class Entry:
    """One question, its answer (one line of plain text) and other wordings of the question."""

    question: str
    answer: str
    paraphrases: tuple[str, ...]


def parse(text: str) -> list[Entry]:
    """All entries of the page in order. Raises `FaqError`, naming the entry, for anything malformed."""
    _, *sections = re.split(r"^### ", text, flags=re.MULTILINE)
    if not sections:
        raise FaqError("no entries: a question is a line that starts with '### '")
    entries = [_entry(section) for section in sections]
    seen: set[str] = set()
    for entry in entries:
        for question in (entry.question, *entry.paraphrases):
            if question.casefold() in seen:
                raise FaqError(f"asked twice: {question}")
            seen.add(question.casefold())
    return entries


def load(path: Path) -> list[Entry]:
    """`parse` of a UTF-8 file. Raises `FaqError` or `OSError`."""
    return parse(path.read_text(encoding="utf-8"))


def digest(path: Path) -> str:
    """SHA-256 of the file, 64 hex digits."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _entry(section: str) -> Entry:
    heading, _, body = section.partition("\n")
    question = heading.strip()
    if not question.endswith("?"):
        raise FaqError(f"not a question: {question!r}")
    body = re.split(r"^## ", body, flags=re.MULTILINE)[0]
    paragraphs = [" ".join(part.split()) for part in re.split(r"\n\s*\n", body.strip())]
    if len(paragraphs) != 2 or not paragraphs[0]:
        raise FaqError(f"needs an answer and an '{ALSO.strip()}' line, nothing else: {question}")
    answer, also = paragraphs
    if answer.startswith(ALSO) or not also.startswith(ALSO):
        raise FaqError(f"the answer comes first, then the '{ALSO.strip()}' line: {question}")
    if len(answer.split()) > MAX_ANSWER_WORDS:
        raise FaqError(f"answer of more than {MAX_ANSWER_WORDS} words: {question}")
    paraphrases = tuple(part.strip() for part in also.removeprefix(ALSO).split(";"))
    if not all(re.fullmatch(r".+[?.]", part) for part in paraphrases):
        raise FaqError(f"a paraphrase is empty or does not end in '?' or '.': {question}")
    return Entry(question, answer, paraphrases)
