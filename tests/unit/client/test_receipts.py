"""The client accepts no answer without a receipt that matches it."""

from collections.abc import Callable
from dataclasses import replace

import httpx2
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from adytum.attestation.policy.policy import Policy
from adytum.inference.channel.exchange import Closing, Exchange
from adytum.inference.channel.receipts import TRAILER, Receipt, Spent, digest
from adytum.inference.client.transport import AdytumTransport
from adytum.inference.gateway.accounting.usage import Usage
from adytum.inference.gateway.exchange.notary import Notary
from tests.unit.client.support import Fake, chat, running_fake

FORGED = b"\xee" * 32


class Forger(Notary):
    """Signs, with the attested key or another one, an honest receipt that `forge` changed."""

    def __init__(self, forge: Callable[[Receipt], Receipt | None], key: Ed25519PrivateKey | None = None) -> None:
        self._signing = Ed25519PrivateKey.generate()
        self._forge = forge
        self._other = key
        self.public_key = self._signing.public_key().public_bytes_raw()

    def closing(self, exchange: Exchange, status: int, model: str | None = None, usage: Usage | None = None) -> Closing:
        def close(content: bytes) -> tuple[tuple[bytes, bytes], ...]:
            spent = Spent(model, bytes(32), 1, 0, 1, True) if model is not None else None
            honest = Receipt(
                digest(exchange.enc),
                digest(exchange.message),
                content,
                digest(exchange.key_configuration),
                status,
                1,
                spent,
            )
            receipt = self._forge(honest)
            return ((TRAILER, receipt.sign(self._other or self._signing)),) if receipt is not None else ()

        return close


def ask(fake: Fake, *, stream: bool) -> httpx2.Response:
    transport = AdytumTransport(fake.url, Policy.accept_simulated())
    with httpx2.Client(transport=transport, base_url=fake.url, timeout=20) as client:
        return client.post("/v1/chat/completions", json=chat(stream=stream))


def with_spent(**changes: object) -> Callable[[Receipt], Receipt]:
    def forge(receipt: Receipt) -> Receipt:
        spent = receipt.spent or Spent("fake/chat", bytes(32), 0, 0, 0, True)
        return replace(receipt, spent=replace(spent, **changes))  # type: ignore[arg-type]

    return forge


@pytest.mark.parametrize("stream", [False, True])
def test_an_honest_receipt_is_offered(stream: bool) -> None:
    with running_fake() as fake:
        fake.notary = Forger(lambda receipt: receipt)
        receipt = ask(fake, stream=stream).extensions["adytum"].receipt
        assert receipt.status == 200


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "forge",
    [
        lambda receipt: None,
        lambda receipt: replace(receipt, enc=FORGED),
        lambda receipt: replace(receipt, request=FORGED),
        lambda receipt: replace(receipt, response=FORGED),
        lambda receipt: replace(receipt, keys=FORGED),
        lambda receipt: replace(receipt, status=201),
        with_spent(weights=FORGED),
        with_spent(model="another"),
    ],
)
def test_a_receipt_that_does_not_fit_fails_the_answer(stream: bool, forge: Callable[[Receipt], Receipt | None]) -> None:
    with running_fake() as fake:
        fake.notary = Forger(forge)
        with pytest.raises(httpx2.RemoteProtocolError, match="receipt"):
            ask(fake, stream=stream)


def test_a_receipt_by_another_key_fails_the_answer() -> None:
    with running_fake() as fake:
        fake.notary = Forger(lambda receipt: receipt, Ed25519PrivateKey.generate())
        with pytest.raises(httpx2.RemoteProtocolError, match="attested key"):
            ask(fake, stream=False)
