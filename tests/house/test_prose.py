"""Plain English: phrases that native readers stumble over stay out of comments, docstrings, messages and documents.

CONTRIBUTING.md has the rules in prose; this table has those that a pattern can check without false alarms. Each rule
is fed a sentence that breaks it and one that keeps it.
"""

import ast
import io
import re
import subprocess
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SUFFIXES = (
    *(".py", ".md", ".toml", ".sh", ".yaml", ".cfg", ".conf", ".service", ".tpl"),
    *("Makefile", "Containerfile", "image/init"),
)
SELF = "tests/house/test_prose.py"

# Files that no rule reads, each with its reason. At most five.
IGNORED: dict[str, str] = {
    "docs/contributing/style.md": "lists the phrases",
    "docs/faq.md": "the demo's models are trained on its words, and golden answers quote them",
}


@dataclass(frozen=True)
class Rule:
    """`pattern` is searched in each paragraph, whose line breaks and comment signs became single spaces."""

    pattern: str
    instead: str
    reason: str
    breaks: str
    keeps: str


CONDITION = '"where" is for places'
RULES = (
    Rule(
        r"\b([Rr]aises|[Ff]ails|[Rr]efuses|[Rr]eturns|[Rr]efused|[Ss]kips) (`?[\w.(){}]+`?,? ){0,3}where\b",
        "if",
        CONDITION,
        "Raises `WeightsError` where the folder is missing.",
        "Raises `WeightsError` if the folder is missing.",
    ),
    Rule(
        r"\b(None|True|False|null|empty|nothing|[01]|\d{3})`? where\b",
        "if",
        CONDITION,
        "The host's certificates; None where the host has none.",
        "The host's certificates; None if the host has none.",
    ),
    Rule(
        r"\b([Oo]nly|[Aa]lso|[Ee]ven|[Ee]xcept|[Uu]nless|but not) where\b",
        "only if, also if, even if",
        CONDITION,
        "A request is repeated only where nothing was opened.",
        "A request is repeated only if nothing was opened.",
    ),
    Rule(
        r"(?:^|[.;] )[Ww]here [^?.:;|,(]+, (?!and |or |if |as |what |how |so )",
        'a sentence that begins with "If"',
        CONDITION,
        "Where one is missing, this is noted as not checked.",
        "Where the files come from: `repository` is a hub id, `revision` a commit.",
    ),
    Rule(
        r"(?<!, )(?<!from )(?<!for )(?<!and )(?<!says )(?<!know )\b[Ww]here "
        r"(it|that|they|there|none|nothing|neither|no \w+|one) "
        r"(is|are|was|were|has|have|had|cannot|could not|fails?|failed|does|do|did|differs?)\b"
        # The end of a clause is a place: "rules, where each fires and where it does not".
        r"(?! not? ?[.,;:()])(?![.,;:)?])",
        "if",
        CONDITION,
        "The folder is made where there is none.",
        "The guest is a place where the host's words count for little, so the log says where it is.",
    ),
    Rule(
        r"\b[Ww]here (not )?(given|set|unset|left out|known|unknown|named|asked|absent|missing|omitted|None|empty)\b",
        'if, as in "if omitted"',
        CONDITION,
        "The gateway's process, where known.",
        "The gateway's process, if known.",
    ),
    Rule(
        r"(?:^|[.;] )[Gg]ives\b(?! up| way| back| rise)",
        "returns",
        "a function returns a value; only a person gives",
        "Starts the relay in a process of its own; gives its URL.",
        "Starts the relay in a process of its own and returns its URL.",
    ),
    Rule(
        r"(?<!there )(?<!There )\bis none\b",
        "is invalid, is missing, is not one of",
        '"is none" does not say what is wrong',
        "Raises `MalformedMessage` if the public key is none.",
        "Raises `MalformedMessage` if there is none.",
    ),
    Rule(
        r"(?<![Tt]here )\b(is|are|was|were) no (?!longer|more|less|other|different|reason|need|way|such|matter|doubt)"
        r"(?!fewer|better|worse|slower|faster|larger|smaller|later|earlier|greater|older|newer|higher|lower)[a-z]+",
        "is not a",
        "English negates the verb",
        "The entry is no number.",
        "The entry is not a number, the queue is no longer than ten, and there is no other way.",
    ),
    Rule(
        r"\b(is|are) there twice\b",
        "occurs twice",
        "not English",
        "One path is there twice.",
        "One path occurs twice; the other is there, too.",
    ),
    Rule(
        r"\b[Ww]hoever\b",
        "the actor: the caller, the operator, the host",
        "the reader wants to know who",
        "Whoever reads the metrics sees it.",
        "The operator who reads the metrics sees it.",
    ),
    Rule(
        r"\b([Ff]or|[Tt]o|[Ff]rom|[Ww]ith) who\b|(?:^|[.;:] )Who (has|is|asks|sends|knows|wants)\b[^?.]*[,.]",
        "the actor: a caller who has, a client that sends",
        '"who" needs somebody before it unless it asks',
        "Who has no valid key costs little.",
        "A caller who has no valid key costs little. Who has access to my prompt?",
    ),
    Rule(
        r"\b[Ss]omebody\b(?! else)",
        "the actor, or someone",
        "the reader wants to know who",
        "The release that somebody means to trust.",
        "The release that the relying party means to trust.",
    ),
    Rule(
        r"\b(left|leaves?|leaving) away\b",
        "omit, omitted",
        "not English",
        "Cut bytes at the end left away.",
        "The bytes at the end omitted.",
    ),
    Rule(
        r"\b(can|cannot|could|could not|not|to) be had\b",
        "can be obtained, is available",
        "archaic",
        "The hardware's report cannot be had.",
        "The hardware's report cannot be obtained.",
    ),
    Rule(
        r"\bpeers? (can|may|could) size\b",
        "peer-controlled size",
        '"to size" is to measure',
        "Every quantity that a peer can size has its bound here.",
        "Every peer-controlled size has its bound here.",
    ),
    Rule(
        r"\b[Ff]or want of\b",
        "because ... is missing, without",
        "archaic",
        "Not checked for want of its input.",
        "Not checked, because its input is missing.",
    ),
    Rule(
        r"\b[Ss]ave for\b|\b[Bb]e it\b",
        "except; whether ... or ...",
        "archaic",
        "Nothing is written save for the record.",
        "Nothing is written except the record.",
    ),
    Rule(
        r"\b(is|are|was|were) to be \w+(ed|en)\b",
        "must be",
        "it reads as a plan, not as a duty",
        "The process is to be ended.",
        "The process must be ended.",
    ),
    Rule(
        r"\bof no interest\b|\bat (nobody|no one)'s\b|\b(its|his|their) word for\b",
        "does not matter; say plainly who does what",
        "an idiom where a plain sentence would do",
        "Its complaint is of no interest.",
        "Its complaint does not matter.",
    ),
    Rule(
        r"\b(spaces?|text|bytes?|lines?|padding|content|stands?|comes?|came|read|sent|JSON) behind\b",
        "after",
        '"behind" is a place, not an order',
        "JSON takes spaces behind it.",
        "JSON allows spaces after it; a load balancer stands in front.",
    ),
)


def prose(path: str, source: str) -> Iterator[tuple[int, str]]:
    """The paragraphs of a file with the line each begins at: of Python, comments and strings of four words and more."""
    if not path.endswith(".py"):
        yield from paragraphs(source, 1)
        return
    comments: list[tuple[int, str]] = []
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            if comments and comments[-1][0] + comments[-1][1].count("\n") == token.start[0] - 1:
                comments[-1] = (comments[-1][0], comments[-1][1] + "\n" + token.string)
            else:
                comments.append((token.start[0], token.string))
    for line, text in comments:
        yield from paragraphs(text, line)
    inner: set[int] = set()
    for node in ast.walk(ast.parse(source, path)):
        if isinstance(node, ast.JoinedStr):
            inner.update(id(part) for part in node.values)
            yield from messages("".join(constant(part) for part in node.values), node.lineno)
        elif isinstance(node, ast.Constant) and id(node) not in inner and isinstance(node.value, str):
            yield from messages(node.value, node.lineno)


def constant(part: ast.expr) -> str:
    """The words of an f-string's part; a value becomes `{}`."""
    return str(part.value) if isinstance(part, ast.Constant) else "{}"


def messages(text: str, line: int) -> Iterator[tuple[int, str]]:
    if text.count(" ") >= 3:
        yield from paragraphs(text, line)


def paragraphs(text: str, line: int) -> Iterator[tuple[int, str]]:
    """Splits at blank lines, list items and table rows, so that a phrase is found across a line break."""
    start, words = line, ""
    for number, raw in enumerate(text.split("\n"), line):
        stripped = re.sub(r"^\s*(#+|//)?\s*", "", raw)
        if not stripped or re.match(r"[-*|]\s|\d+\. ", stripped):
            if words:
                yield start, words
            start, words = number, ""
        if not words:
            start = number
        words = f"{words} {stripped}".strip()
    if words:
        yield start, words


def broken(path: str, source: str) -> list[str]:
    return [
        f"{path}:{line}: {found.group()!r}: {rule.instead} ({rule.reason})"
        for line, text in prose(path, source)
        for rule in RULES
        for found in re.finditer(rule.pattern, text)
    ]


def test_the_tree_keeps_the_rules() -> None:
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    files = [path for path in listed if path.endswith(SUFFIXES) and path != SELF and path not in IGNORED]
    found = [line for path in files for line in broken(path, (ROOT / path).read_text())]
    assert not found, "\n" + "\n".join(found)


def test_few_files_are_ignored() -> None:
    assert len(IGNORED) <= 5


@pytest.mark.parametrize("rule", RULES, ids=[f"rule{number}" for number in range(len(RULES))])
def test_a_rule_finds_its_phrase_and_nothing_else(rule: Rule) -> None:
    assert re.search(rule.pattern, rule.breaks)
    assert not [other for other in RULES if re.search(other.pattern, rule.keeps)]


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("a.py", "# Raises\n# nothing: for want\n# of it.\nx = 1\n"),
        ("a.py", 'def f():\n    """Reads. Then\n    it writes for want of\n    more."""\n'),
        ("a.py", 'raise ValueError(f"{name} was skipped for want of {what}")\n'),
        ("a.md", "- one item\n- the other, for\n  want of more\n"),
        ("a.sh", "#!/bin/sh\n# for want\n# of\ntrue\n"),
    ],
    ids=["comment", "docstring", "message", "markdown", "script"],
)
def test_a_phrase_is_found_wherever_prose_stands(path: str, source: str) -> None:
    assert broken(path, source)


def test_code_is_no_prose() -> None:
    assert not broken("a.py", 'whoever = "whoever"\nx = [f"{whoever} is empty"]\n')
