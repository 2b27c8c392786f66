"""The cost of each request to an engine, reported once to its caller's limits, the records and the metrics."""

import time
from collections.abc import Callable

from adytum.inference.gateway.accounting.metering import Charge, Outcome, Records
from adytum.inference.gateway.accounting.telemetry import Telemetry
from adytum.inference.gateway.accounting.usage import StreamUsage, Usage
from adytum.inference.gateway.admission.admission import EngineCall


class Account:
    """One request's account. Call `settle` before the client gets the answer's end, and `close` in every case."""

    def __init__(self, call: EngineCall, records: Records | None, telemetry: Telemetry | None) -> None:
        self._call = call
        self._records = records
        self._telemetry = telemetry
        self._settled = False
        self._opened_at = time.monotonic()
        self.stream = StreamUsage(len(call.body), hidden=call.hide_usage)
        """Counts the answer if it is a stream."""

    async def settle(self, outcome: Outcome, usage: Usage) -> None:
        """Reports the cost. Returns once the record is on the disk. Raises `MeteringFailed`."""
        self._tell(outcome, usage)
        if self._records is not None:
            await self._records.write(self._charge(outcome, usage))

    def void(self) -> None:
        """Nothing is reported: the engine did not take the request."""
        self._settled = True

    def close(self) -> None:
        """Reports an account that was not settled: the client left before the end, and the engine had worked."""
        if self._settled:
            return
        usage = self.stream.usage
        self._tell("client_gone", usage)
        if self._records is not None:
            self._records.note(self._charge("client_gone", usage))

    def _tell(self, outcome: Outcome, usage: Usage) -> None:
        call, stream, telemetry = self._call, self.stream, self._telemetry
        self._settled = True
        if call.hold is not None:
            call.hold.used = usage.total
        if telemetry is None:
            return
        telemetry.request(call.model.id, call.path, outcome)
        telemetry.tokens(call.model.id, call.caller, usage.prompt, usage.cached, usage.completion)
        if stream.events:
            gap = (time.monotonic() - stream.first_at) / (stream.events - 1) if stream.events > 1 else None
            telemetry.times(call.model.id, stream.first_at - self._opened_at, gap)

    def _charge(self, outcome: Outcome, usage: Usage) -> Charge:
        call = self._call
        return Charge(call.caller, call.model.id, call.path, outcome, usage.prompt, usage.cached, usage.completion)


Ledger = Callable[[EngineCall], Account]
"""Opens a request's account."""


def ledger(records: Records | None, telemetry: Telemetry | None = None) -> Ledger:
    """A ledger that writes to `records`, unless they are `None`."""
    return lambda call: Account(call, records, telemetry)
