"""Signs the receipts. The key is made at start and kept in memory only; its public half is in the evidence."""

from collections.abc import Callable, Mapping

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from adytum.inference.channel.bhttp import Fields
from adytum.inference.channel.exchange import Closing, Exchange
from adytum.inference.channel.receipts import TRAILER, Receipt, Spent, digest
from adytum.inference.gateway.accounting.usage import Usage


class Notary:
    """`weights`: by model id, the root hash that the evidence names. `clock`: Unix seconds."""

    def __init__(self, weights: Mapping[str, bytes], clock: Callable[[], float]) -> None:
        self._weights = weights
        self._clock = clock
        self._key = Ed25519PrivateKey.generate()
        self.public_key = self._key.public_key().public_bytes_raw()
        """32 bytes (RFC 8032)."""

    def closing(self, exchange: Exchange, status: int, model: str | None = None, usage: Usage | None = None) -> Closing:
        """The function that makes this answer's trailers. `model` is omitted if no engine was asked."""

        def close(content: bytes) -> Fields:
            receipt = Receipt(
                enc=digest(exchange.enc),
                request=digest(exchange.message),
                response=content,
                keys=digest(exchange.key_configuration),
                status=status,
                issued_at=int(self._clock()),
                spent=self._spent(model, usage),
            )
            return ((TRAILER, receipt.sign(self._key)),)

        return close

    def _spent(self, model: str | None, usage: Usage | None) -> Spent | None:
        if model is None:
            return None
        used = usage if usage is not None else Usage(0, 0, 0)
        return Spent(model, self._weights[model], used.prompt, used.cached, used.completion, used.exact)

    def __repr__(self) -> str:
        return f"Notary({self.public_key.hex()[:12]})"
