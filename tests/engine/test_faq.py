"""The page that the demo models are trained on, and its parser."""

import json
from pathlib import Path

import pytest

from adytum.deploy.demo.faq import Entry, FaqError, load, parse
from tests.conftest import ROOT

PAGE = """# Title

Some words.

## Group

### What is it?

It is
a thing.

Also asked: What might it be?; Describe it.

## Other group

### Why?

Because.

Also asked: For what reason?
"""


def test_entries() -> None:
    assert parse(PAGE) == [
        Entry("What is it?", "It is a thing.", ("What might it be?", "Describe it.")),
        Entry("Why?", "Because.", ("For what reason?",)),
    ]


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("### ", "## ", "no entries"),
        ("### Why?", "### Because", "not a question"),
        ("Because.\n", "", "needs an answer"),
        ("Also asked: For what reason?", "", "needs an answer"),
        ("Also asked: For", "Also: For", "the answer comes first"),
        ("Because.", "Also asked: x?", "the answer comes first"),
        ("Because.", "Because.\n\nAnd more.", "needs an answer"),
        ("Because.", "word " * 46, "more than 45 words"),
        ("For what reason?", "", "the answer comes first|empty"),
        ("For what reason?", "For what reason?;", "empty"),
        ("For what reason?", "For what reason", "does not end"),
        ("For what reason?", "what is IT?", "asked twice"),
    ],
)
def test_refuses_malformed(old: str, new: str, reason: str) -> None:
    assert old in PAGE
    with pytest.raises(FaqError, match=reason):
        parse(PAGE.replace(old, new))


def test_the_page() -> None:
    entries = load(ROOT / "docs" / "faq.md")
    assert len(entries) >= 60
    assert len({entry.answer for entry in entries}) == len(entries)
    assert all(len(entry.paraphrases) >= 4 for entry in entries)


def test_held_out_paraphrases_are_held_out() -> None:
    entries = load(ROOT / "docs" / "faq.md")
    held_out = json.loads(Path(ROOT, "tests", "data", "faq_paraphrases.json").read_text())
    assert [item["question"] for item in held_out] == [entry.question for entry in entries]
    trained = {text.casefold() for entry in entries for text in (entry.question, *entry.paraphrases)}
    assert not trained & {item["paraphrase"].casefold() for item in held_out}
