"""The page of commands: what `--help` prints for each."""

import argparse
from collections.abc import Iterator
from functools import partial

import click

from adytum.attestation.cli.main import parser
from adytum.inference.cli.main import main

_WIDTH = 100


_HEAD = """\
# Command line

<!-- Written by docs/tools/reference.py from the code. Change the commands, not this page. -->

These are the texts of `--help`. A client's installation runs `proxy`, `policy`, `release` and the verifier; the other
commands need the extra `server`, and `measure` the extra of that name. A command whose extra is missing names it.
`python -m adytum.inference` is the same program as `adytum`; `python -m adytum.attestation` is the verifier
([evidence](../../attestation/README.md)).
"""


def page() -> str:
    """The whole page."""
    return "\n".join(
        [
            _HEAD,
            *_help(main, "adytum"),
            *_verifier(parser(), "python -m adytum.attestation"),
        ]
    )


def _help(command: click.Command, name: str) -> Iterator[str]:
    context = click.Context(command, info_name=name, max_content_width=_WIDTH, terminal_width=_WIDTH)
    yield from (f"## `{name}`", "", "```text", command.get_help(context).rstrip(), "```", "")
    if isinstance(command, click.Group):
        for each in sorted(command.commands):
            yield from _help(command.commands[each], f"{name} {each}")


def _verifier(parser: argparse.ArgumentParser, name: str) -> Iterator[str]:
    parser.prog = name
    # Otherwise the width is that of the terminal.
    parser.formatter_class = partial(parser.formatter_class, width=_WIDTH)
    text = "\n".join(line.rstrip() for line in parser.format_help().splitlines())
    yield from (f"## `{name}`", "", "```text", text, "```", "")
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for each, sub in action.choices.items():
                yield from _verifier(sub, f"{name} {each}")
