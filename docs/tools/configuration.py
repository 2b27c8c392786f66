"""The page of configuration keys: every field of the pydantic model, its type, its default and its text."""

import enum
import re
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import annotated_types
from pydantic import BaseModel, StringConstraints
from pydantic.fields import FieldInfo
from reading import attribute_texts, cell

from adytum.inference.core import config

_WORDS = {str: "text", int: "integer", float: "number", bool: "`true` or `false`", Path: "path"}


_HEAD = """\
# Configuration

<!-- Written by docs/tools/reference.py from the code. Change inference/core/config.py, not this page. -->

One TOML file, read once at start. Its SHA-256 is in the evidence, so every setting is visible to clients. A key without
a default must be written: nothing that decides about secrecy has one. An unknown key stops the start and names the
nearest known one. `adytum serve --config FILE --check` reads the file and starts nothing.
[deploy/config/demo.toml](../../deploy/config/demo.toml) is a commented example.
"""


def page() -> str:
    """The whole page."""
    lines = [_HEAD]
    for name, field in config.Config.model_fields.items():
        section = _section(field.annotation)
        if section is None:
            continue
        header = f"[[{name}]]" if name == "models" else f"[{name}]"
        lines += [f"## `{header}`", "", _one_line(section), "", *_table(section), ""]
    return "\n".join(lines).rstrip() + "\n"


def _section(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    inner = [part for part in typing.get_args(annotation) if isinstance(part, type) and issubclass(part, BaseModel)]
    return inner[0] if inner else None


def _one_line(section: type[BaseModel]) -> str:
    return " ".join((section.__doc__ or "").split())


def _table(section: type[BaseModel]) -> Iterator[str]:
    texts = attribute_texts(section)
    yield "| key | value | default | meaning |"
    yield "|---|---|---|---|"
    for name, field in section.model_fields.items():
        meaning = re.sub(r"docs/([\w/-]+)\.md", r"[\1](../\1.md)", cell(texts[name]))
        yield f"| `{name}` | {_value(field)} | {_default(field)} | {meaning} |"


def _value(field: FieldInfo) -> str:
    words = _type(field.annotation)
    bounds = [bound for item in field.metadata for bound in _bounds(item)]
    return ", ".join([words, *bounds])


def _bounds(item: object) -> Iterator[str]:
    match item:
        case annotated_types.Ge(ge=value):
            yield f"at least {value:,}"
        case annotated_types.Gt(gt=value):
            yield f"more than {value:,}"
        case annotated_types.Le(le=value):
            yield f"at most {value:,}"
        case annotated_types.MinLen(min_length=value):
            yield f"at least {value}"
        case StringConstraints(pattern=str(pattern)):
            yield f"`{cell(pattern)}`"


def _type(annotation: Any) -> str:
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return " or ".join(f'`"{value}"`' for value in inner)
    if origin in (types.UnionType, typing.Union):
        return _type(next(part for part in inner if part is not type(None)))
    if origin is typing.Annotated:
        return ", ".join([_type(inner[0]), *(bound for item in inner[1:] for bound in _bounds(item))])
    if origin in (tuple, frozenset):
        return f"list of {_type(inner[0])}"
    if isinstance(annotation, type) and issubclass(annotation, enum.Enum):
        return " or ".join(f'`"{member.value}"`' for member in annotation)
    return _WORDS[annotation]


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "**required**"
    match field.default:
        case None:
            return "unset"
        case bool() as value:
            return f"`{str(value).lower()}`"
        case str() as value:
            return f'`"{value}"`'
        case int() | float() as value:
            return f"`{value:,}`".replace(",", "_")
        case _:
            return "`[]`"
