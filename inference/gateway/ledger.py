"""What each request that an engine was asked has cost: told to the records, once."""

from collections.abc import Callable

from inference.gateway.admission import EngineCall
from inference.gateway.usage import StreamUsage, Usage
from inference.metering import Charge, Outcome, Records


class Account:
    """One request's. `settle` before the client has the answer's end; `close` whatever came of it."""

    def __init__(self, call: EngineCall, records: Records | None) -> None:
        self._call = call
        self._records = records
        self._settled = False
        self.stream = StreamUsage(len(call.body), hidden=call.hide_usage)
        """Watches the answer where it is a stream."""

    async def settle(self, outcome: Outcome, usage: Usage) -> None:
        """Returns once the record is on the disk. Raises `MeteringFailed`."""
        self._settled = True
        self._use(usage)
        if self._records is not None:
            await self._records.write(self._charge(outcome, usage))

    def close(self) -> None:
        """Records what was not settled: the client went away before the end, and the engine had worked."""
        if self._settled:
            return
        self._settled = True
        self._use(self.stream.usage)
        if self._records is not None:
            self._records.note(self._charge("client_gone", self.stream.usage))

    def _use(self, usage: Usage) -> None:
        if self._call.hold is not None:
            self._call.hold.used = usage.total

    def _charge(self, outcome: Outcome, usage: Usage) -> Charge:
        call = self._call
        return Charge(call.caller, call.model.id, call.path, outcome, usage.prompt, usage.cached, usage.completion)


Ledger = Callable[[EngineCall], Account]
"""Opens a request's account."""


def ledger(records: Records | None) -> Ledger:
    """`records`: where they are written; `None` where the configuration names no file."""
    return lambda call: Account(call, records)
