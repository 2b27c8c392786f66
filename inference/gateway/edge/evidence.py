"""Evidence on a nonce. Nonces that arrive while a report is being made share the next one.

A hardware report takes milliseconds to seconds, and firmware limits their rate. So at most one round of collection runs
at a time, at most one starts per interval, and one report serves every client that asked meanwhile: their nonces are
the leaves of one Merkle tree. What a flood of clients can take is bounded: the nonces in a round, the clients being
answered, and the time that each may read. All documents of a round share their bytes except the proof.
"""

import asyncio
import logging
import re
from collections.abc import Callable

from starlette.types import Receive, Scope, Send

from adytum.attestation.collect.rounds import Collector, Round
from adytum.attestation.core.errors import AttestationError, NotThereYet
from adytum.attestation.core.limits import LIMITS
from adytum.attestation.document.evidence import Claims
from adytum.inference.gateway import failures

_log = logging.getLogger("adytum.evidence")
_TOGETHER = 8
_QUERY = re.compile(rb"nonce=([0-9a-f]{64})")


class EvidenceUnavailable(Exception):
    """A device failed. `soon`: only a vendor's certificates are still being fetched."""

    def __init__(self, message: str = "", *, soon: bool = False) -> None:
        super().__init__(message)
        self.soon = soon


class EvidenceBusy(EvidenceUnavailable):
    """Too many clients are waiting."""


class EvidenceService:
    """Collects rounds. `claims` returns the backend's current claims.

    `interval`: seconds between the starts of two rounds. `round_nonces`: different nonces in one round. `clients`:
    clients that wait or are being answered. One more of either is refused. `send_seconds`: how long a client may take
    to read its document. `refusal_seconds`: how long a refusal is held back.
    """

    def __init__(
        self,
        collector: Collector,
        claims: Callable[[], Claims],
        *,
        interval: float = 0.0,
        round_nonces: int = LIMITS.round,
        clients: int = LIMITS.round,
        send_seconds: float = 30.0,
        refusal_seconds: float = 1.0,
    ) -> None:
        self._collector = collector
        self._claims = claims
        self._interval = interval
        self._round_nonces = min(round_nonces, LIMITS.round)
        self._clients = clients
        self._send_seconds = send_seconds
        self._refusal_seconds = refusal_seconds
        self._waiting: dict[bytes, asyncio.Future[Round]] = {}
        self._worker: asyncio.Task[None] | None = None
        self._next_start = 0.0
        self._answering = 0
        self.rounds = 0
        self.failures = 0

    async def collected(self, nonce: bytes) -> Round:
        """The round with this 32-byte nonce. Raises `EvidenceUnavailable`, `EvidenceBusy`."""
        waiting = self._waiting.get(nonce)
        if waiting is None:
            if len(self._waiting) >= self._round_nonces:
                raise EvidenceBusy
            waiting = self._waiting[nonce] = asyncio.get_running_loop().create_future()
        if self._worker is None or self._worker.done():
            self._worker = asyncio.create_task(self._rounds())
        # Shielded: a client that leaves must not cancel the answer of another client with the same nonce.
        return await asyncio.shield(waiting)

    async def document(self, nonce: bytes) -> bytes:
        """The evidence document for a 32-byte nonce. Raises `EvidenceUnavailable`."""
        return (await self.collected(nonce)).document(nonce)

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers `GET /.well-known/attestation?nonce=<64 hex digits>` (plain ASGI)."""
        found = _QUERY.fullmatch(scope["query_string"])
        if found is None:
            await failures.BAD_NONCE(scope, receive, send)
            return
        if self._answering >= self._clients:
            await self._refuse(scope, receive, send)
            return
        self._answering += 1
        try:
            nonce = bytes.fromhex(found[1].decode())
            pieces = (await self.collected(nonce)).pieces(nonce)
            async with asyncio.timeout(self._send_seconds):
                await _send(pieces, send)
        except EvidenceBusy:
            await self._refuse(scope, receive, send)
        except EvidenceUnavailable:
            await failures.NO_EVIDENCE(scope, receive, send)
        finally:
            self._answering -= 1

    async def _refuse(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuses after a pause: clients that retry at once would take all of the gateway's time."""
        await asyncio.sleep(self._refusal_seconds)
        await failures.EVIDENCE_BUSY(scope, receive, send)

    async def _rounds(self) -> None:
        loop = asyncio.get_running_loop()
        while self._waiting:
            await asyncio.sleep(max(0.0, self._next_start - loop.time()))
            self._next_start = loop.time() + self._interval
            asked, self._waiting = self._waiting, {}
            try:
                collected = await asyncio.to_thread(self._collector.collect, self._claims(), list(asked))
            except AttestationError as error:
                self.failures += 1
                # The message is about devices and vendors and contains nothing of a client. Clients get a fixed text.
                _log.error("collecting evidence failed: %(reason)s", {"reason": error})
                for future in asked.values():
                    future.set_exception(EvidenceUnavailable(str(error), soon=isinstance(error, NotThereYet)))
                    future.exception()  # Marked as retrieved: the client may have left.
            else:
                self.rounds += 1
                for place, future in enumerate(asked.values()):
                    future.set_result(collected)
                    # A round may have thousands of clients, and each answer takes the loop's time: let inference run.
                    if place % _TOGETHER == _TOGETHER - 1:
                        await asyncio.sleep(0)


async def _send(pieces: tuple[bytes, ...], send: Send) -> None:
    headers = [
        (b"content-type", b"application/json"),
        (b"cache-control", b"no-store"),
        (b"content-length", b"%d" % sum(map(len, pieces))),
    ]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    for piece in pieces:
        await send({"type": "http.response.body", "body": piece, "more_body": True})
    await send({"type": "http.response.body", "body": b"", "more_body": False})
