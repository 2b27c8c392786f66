"""What may be logged: our own fixed lines, with named values from an allow-list.

A library's error message can quote the content that it failed on, and so can a traceback. So of any other logger's line
only the place and the level are kept, and of an exception only the type. A line of ours is a constant text with named
values, `_log.info("%(model)s is live", {"model": ...})`. All their names are in `FIELDS`; a test
(`tests/unit/core/test_logs.py`) reads the calls.
"""

import asyncio
import json
import logging
import time
from collections.abc import Mapping
from typing import Any, Literal

Form = Literal["text", "json"]
OURS = "adytum"
FIELDS = frozenset(("model", "step", "reason", "storage", "kind", "file", "callers", "progress"))
"""The names of all values that may be logged. None of these values comes from a request."""

_log = logging.getLogger("adytum.gateway")
# uvicorn logs tracebacks, asyncio logs exceptions with their messages.
_SILENCED = ("uvicorn", "uvicorn.error", "uvicorn.access", "asyncio")


def configure(form: Form) -> None:
    """Makes this process log to stderr in this form."""
    handler = logging.StreamHandler()
    handler.setFormatter(Text() if form == "text" else Json())
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger(OURS).setLevel(logging.INFO)


class Text(logging.Formatter):
    """One line each: `2026-11-23T15:00:00+0000 INFO adytum ...`."""

    def format(self, record: logging.LogRecord) -> str:
        when = time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(record.created))
        # A reason of several lines must not look like several log lines.
        return f"{when} {record.levelname} {record.name} {_message(record)}".replace("\n", "\n  ")


class Json(logging.Formatter):
    """JSON lines: `time` (RFC 3339), `level`, `logger`, `message`; for ours `event`, the text without values, and the
    values by name.
    """

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{record.msecs:03.0f}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": _message(record),
        }
        if _is_ours(record):
            line["event"] = str(record.msg)
            if isinstance(record.args, Mapping):
                line.update((name, str(value)) for name, value in record.args.items() if name in FIELDS)
        return json.dumps(line, ensure_ascii=False)


def _is_ours(record: logging.LogRecord) -> bool:
    return record.name == OURS or record.name.startswith(OURS + ".")


def _message(record: logging.LogRecord) -> str:
    raised = record.exc_info[0] if record.exc_info else None
    kind = f" {raised.__name__}" if raised is not None else ""
    if not _is_ours(record):
        return f"[{record.filename}:{record.lineno}]{kind} (text withheld)"
    return record.getMessage() + kind


def names_only(loop: asyncio.AbstractEventLoop) -> None:
    """Makes unexpected exceptions, in `loop` or under uvicorn, leave only their type in the log."""
    for name in _SILENCED:
        logging.getLogger(name).setLevel(logging.CRITICAL + 1)
    loop.set_exception_handler(_name)


def _name(_loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    error = context.get("exception")
    kind = type(error).__name__ if error is not None else "no exception"
    _log.error("unexpected: %(kind)s", {"kind": kind})
