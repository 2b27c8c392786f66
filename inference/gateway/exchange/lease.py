"""What one admitted request holds, released once each, however the request ends.

1. A share of its caller's limits, from admission until the answer has left.
2. A share of its engine's load, from `ask` until the answer has left.
3. An account, from `ask`. It is settled before the client has the answer's end; one that is still open when the lease
   ends belongs to a client that left.
4. A connection to the engine, from the head of the engine's answer until all of it has been read. A client may take
   much longer to read its answer, and the engine is free for another request meanwhile.

What was taken last is released first: the account reports the used tokens to the caller's limits, so it closes before
they end. There is no `await` between taking a thing and noting that it is held, so a cancellation cannot come in
between. An error in one release does not keep the others from running.
"""

from contextlib import ExitStack
from types import TracebackType
from typing import Self

from adytum.inference.gateway import failures
from adytum.inference.gateway.accounting.ledger import Account, Ledger
from adytum.inference.gateway.admission.admission import EngineCall
from adytum.inference.gateway.admission.load import Load
from adytum.inference.gateway.exchange.engines import EngineAnswer, Engines, EngineUnavailable
from adytum.inference.gateway.failures import Refused


class Lease:
    """A context manager. It takes over `call.hold` when it is made, and releases everything at its end."""

    def __init__(self, call: EngineCall, load: Load, ledger: Ledger, engines: Engines) -> None:
        self.call = call
        self._load = load
        self._ledger = ledger
        self._engines = engines
        self._answer: EngineAnswer | None = None
        self._held = ExitStack()
        if call.hold is not None:
            self._held.callback(call.hold.end)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._held.close()

    async def ask(self) -> tuple[EngineAnswer, Account]:
        """Sends the request to its engine. Returns the answer, whose head has arrived, and the request's account.

        Raises `Refused` if the engine is at its limit or does not answer.
        """
        self._held.enter_context(self._load.holding(self.call))
        account = self._ledger(self.call)
        self._held.callback(account.close)
        self._held.callback(self.answered)
        try:
            answer = self._answer = await self._engines.send(self.call)
        except EngineUnavailable:
            account.void()
            raise Refused(failures.ENGINE_DOWN) from None
        except Exception:
            # A fault of ours, which the caller does not pay for.
            account.void()
            raise
        return answer, account

    def answered(self) -> None:
        """Releases the engine's connection. The answer that `ask` returned may be another request's from here on."""
        answer, self._answer = self._answer, None
        if answer is not None:
            self._engines.done(self.call, answer)
