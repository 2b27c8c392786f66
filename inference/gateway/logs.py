"""What may be logged: our own fixed lines. A library's text about an error can quote the content it failed on."""

import asyncio
import logging
from typing import Any

_log = logging.getLogger("cloister.gateway")
# uvicorn logs tracebacks, asyncio logs exceptions with their messages.
_SILENCED = ("uvicorn", "uvicorn.error", "uvicorn.access", "asyncio")


def names_only(loop: asyncio.AbstractEventLoop) -> None:
    """From here on an unexpected exception, in `loop` or under uvicorn, leaves only its type in the log."""
    for name in _SILENCED:
        logging.getLogger(name).setLevel(logging.CRITICAL + 1)
    loop.set_exception_handler(_name)


def _name(_loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    error = context.get("exception")
    _log.error("unexpected: %s", type(error).__name__ if error is not None else "no exception")
