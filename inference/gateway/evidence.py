"""Evidence on a nonce. Nonces that arrive while a report is being made share the next one.

A hardware report takes milliseconds to seconds and firmware limits their rate, so at most one collection runs, and
one report serves every client that asked meanwhile (their nonces are the leaves of one Merkle tree).
"""

import asyncio
import logging
from collections.abc import Callable

from attestation.collect import Collector
from attestation.errors import AttestationError
from attestation.evidence import Claims
from attestation.limits import LIMITS

_log = logging.getLogger("cloister.evidence")


class EvidenceUnavailable(Exception):
    """A device failed, or too many clients wait."""


class EvidenceService:
    """Collects rounds. `claims` gives what the backend claims at this moment."""

    def __init__(self, collector: Collector, claims: Callable[[], Claims]) -> None:
        self._collector = collector
        self._claims = claims
        self._waiting: dict[bytes, asyncio.Future[bytes]] = {}
        self._worker: asyncio.Task[None] | None = None

    async def document(self, nonce: bytes) -> bytes:
        """The evidence document for a 32-byte nonce. Raises `EvidenceUnavailable`."""
        waiting = self._waiting.get(nonce)
        if waiting is None:
            if len(self._waiting) >= LIMITS.round:
                raise EvidenceUnavailable
            waiting = self._waiting[nonce] = asyncio.get_running_loop().create_future()
        if self._worker is None or self._worker.done():
            self._worker = asyncio.create_task(self._rounds())
        # Shielded: a client that goes away must not take the answer of another one with the same nonce along.
        return await asyncio.shield(waiting)

    async def _rounds(self) -> None:
        while self._waiting:
            asked, self._waiting = self._waiting, {}
            try:
                collected = await asyncio.to_thread(self._collector.collect, self._claims(), list(asked))
                for nonce, future in asked.items():
                    future.set_result(collected.document(nonce))
            except AttestationError as error:
                _log.error("collecting evidence failed: %s", type(error).__name__)
                for future in asked.values():
                    if not future.done():
                        future.set_exception(EvidenceUnavailable())
                        future.exception()  # Retrieved: whoever asked may be gone.
