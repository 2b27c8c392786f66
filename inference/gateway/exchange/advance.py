"""A coroutine's first step without a task: most writes to a client never have to wait."""

import types
from collections.abc import Awaitable, Coroutine, Generator
from typing import Any


def advance(awaitable: Awaitable[None]) -> Awaitable[None] | None:
    """Runs a coroutine until it first waits. Returns `None` if it has ended, else an awaitable for the rest of it.

    Raises what the coroutine raises. This is an eager task (Python 3.12) without the task. An awaitable that is not a
    coroutine is returned as it is.
    """
    if not isinstance(awaitable, Coroutine):
        return awaitable
    try:
        waits_for = awaitable.send(None)
    except StopIteration:
        return None
    return _rest(awaitable, waits_for)


@types.coroutine
def _rest(coroutine: Coroutine[Any, Any, None], waits_for: Any) -> Generator[Any, Any, None]:
    # What `yield from` does (PEP 380), entered after the first yield.
    try:
        while True:
            try:
                value = yield waits_for
            except GeneratorExit:
                coroutine.close()
                raise
            except BaseException as error:
                waits_for = coroutine.throw(error)
            else:
                waits_for = coroutine.send(value)
    except StopIteration:
        return
