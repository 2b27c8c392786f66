"""Receipts: a signed receipt is read, nothing else is accepted, and a length reveals no count."""

import base64
import json
from dataclasses import replace

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from adytum.inference.channel.errors import ChannelError, MalformedMessage, OpenFailed
from adytum.inference.channel.receipts import TRAILER, Receipt, Spent, digest

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
PUBLIC = KEY.public_key().public_bytes_raw()
SPENT = Spent("demo/llama", b"\x05" * 32, 12, 4, 345, True)
RECEIPT = Receipt(b"\x01" * 32, b"\x02" * 32, b"\x03" * 32, b"\x04" * 32, 200, 1_800_000_000, SPENT)


@pytest.mark.parametrize("receipt", [RECEIPT, replace(RECEIPT, spent=None, status=429)])
def test_what_was_signed_is_read(receipt: Receipt) -> None:
    assert Receipt.verify(receipt.sign(KEY), PUBLIC) == receipt


def test_it_is_a_compact_jws_that_says_what_it_is() -> None:
    """Checked without our own code: RFC 7515, 3.1 and 5.2; RFC 8037, 3.1."""
    head, payload, signature = RECEIPT.sign(KEY).split(b".")
    KEY.public_key().verify(_raw(signature), head + b"." + payload)
    assert json.loads(_raw(head)) == {"alg": "EdDSA", "typ": "adytum-receipt+jws"}
    assert json.loads(_raw(payload)) == {
        "v": 1,
        "enc": _text(1),
        "request": _text(2),
        "response": _text(3),
        "keys": _text(4),
        "status": 200,
        "iat": 1_800_000_000,
        "model": "demo/llama",
        "weights": _text(5),
        "usage": {"prompt_tokens": 12, "cached_tokens": 4, "completion_tokens": 345, "exact": True},
    }


def test_an_independent_jose_library_accepts_it() -> None:
    payload = jwt.decode(RECEIPT.sign(KEY), KEY.public_key(), algorithms=["EdDSA"], options={"verify_iat": False})
    assert (payload["model"], payload["usage"]["completion_tokens"]) == ("demo/llama", 345)
    with pytest.raises(jwt.InvalidSignatureError):
        jwt.decode(RECEIPT.sign(Ed25519PrivateKey.generate()), KEY.public_key(), algorithms=["EdDSA"])


@given(st.tuples(*[st.integers(0, 10**10 - 1)] * 3), st.booleans())
def test_its_length_tells_nothing_of_the_counts(counts: tuple[int, int, int], exact: bool) -> None:
    other = replace(RECEIPT, spent=Spent(SPENT.model, SPENT.weights, *counts, exact))
    assert len(other.sign(KEY)) == len(RECEIPT.sign(KEY))


@pytest.mark.parametrize("exact", [True, False])
def test_its_length_tells_nothing_wherever_the_step_falls(exact: bool) -> None:
    """The padding's steps are 256 bytes, so every length of the rest is tried, with the shortest and longest counts."""
    lengths = set()
    for size in range(256):
        name = "m" * size
        shortest, longest = (
            len(replace(RECEIPT, spent=Spent(name, SPENT.weights, *[count] * 3, flag)).sign(KEY))
            for count, flag in ((0, True), (10**10 - 1, exact))
        )
        assert shortest == longest
        lengths.add(shortest)
    assert len(lengths) == 2


@pytest.mark.parametrize("spent", [None, SPENT])
def test_its_padding_is_the_least_that_hides_the_counts(spent: Spent | None) -> None:
    """Room for three counts of ten digits and a `false` in any receipt, and not one step more."""
    for size in range(256):
        receipt = replace(RECEIPT, spent=replace(spent, model="m" * size) if spent else None, status=10**size)
        payload = _raw(receipt.sign(KEY).split(b".")[1])
        text = payload.rstrip(b" ")
        hidden = len("12" + "4" + "345" + "true") if spent else 0
        needed = len(text) - hidden + len("9999999999") * 3 + len("false")
        assert len(payload) == -(-needed // 256) * 256


def test_counts_of_nothing_and_numbers_of_any_size_are_read() -> None:
    for count in (0, 1, 10**10 - 1, 10**10, 10**30):
        receipt = replace(RECEIPT, status=count, issued_at=count, spent=replace(SPENT, prompt_tokens=count))
        assert Receipt.verify(receipt.sign(KEY), PUBLIC) == receipt


def test_the_trailers_name() -> None:
    assert TRAILER == b"adytum-receipt"


def test_the_digest() -> None:
    # FIPS 180-2, B.1.
    assert digest(b"abc").hex() == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def sign(payload: bytes, head: bytes = RECEIPT.sign(KEY).split(b".")[0]) -> bytes:
    """A JWS over any payload."""
    signed = head + b"." + base64.urlsafe_b64encode(payload).rstrip(b"=")
    return signed + b"." + base64.urlsafe_b64encode(KEY.sign(signed)).rstrip(b"=")


def test_the_longest_receipt_that_is_read() -> None:
    payload = _raw(RECEIPT.sign(KEY).split(b".")[1])
    longest = sign(payload.ljust(6036))
    assert len(longest) == 8192
    assert Receipt.verify(longest, PUBLIC) == RECEIPT
    for longer in (sign(payload.ljust(6037)), longest + b".", sign(payload.ljust(100_000))):
        with pytest.raises(MalformedMessage, match=r"^the receipt is not a compact JWS$"):
            Receipt.verify(longer, PUBLIC)


def test_every_byte_counts() -> None:
    token = RECEIPT.sign(KEY)
    for place in range(len(token)):
        changed = bytearray(token)
        changed[place] ^= 1
        with pytest.raises(ChannelError):
            Receipt.verify(bytes(changed), PUBLIC)
    for end in range(len(token)):
        with pytest.raises(ChannelError):
            Receipt.verify(token[:end], PUBLIC)


def test_another_key_is_refused() -> None:
    with pytest.raises(OpenFailed):
        Receipt.verify(RECEIPT.sign(Ed25519PrivateKey.generate()), PUBLIC)


@pytest.mark.parametrize(
    "payload",
    [
        "[]",
        "{}",
        '{"v":2}',
        '{"v":1,"enc":null}',
        "[" * 5000,
        json.dumps({"v": 1, "enc": "AA", "request": "AA", "response": "AA", "keys": "AA", "status": 200, "iat": 0}),
    ],
)
def test_what_is_signed_but_no_receipt_is_refused(payload: str) -> None:
    with pytest.raises(MalformedMessage):
        Receipt.verify(sign(payload.encode()), PUBLIC)


@pytest.mark.parametrize(
    "change",
    [
        {"status": True},
        {"iat": -1},
        {"model": 1},
        {"usage": {"prompt_tokens": 1}},
        {"enc": None},
        {"enc": "AQ" * 21 + "\xe4"},
        {"enc": "AQ" * 21 + "\ud800"},
        {"enc": "A" * 42},
        {"enc": "A" * 44},
        {"enc": "A" * 42 + "B"},
        {"enc": "A" * 43 + "="},
        {"enc": "A" * 42 + "?A"},
    ],
    ids=str,
)
def test_a_value_of_another_kind_is_refused(change: dict[str, object]) -> None:
    payload = RECEIPT.sign(KEY).split(b".")[1]
    document = json.dumps({**json.loads(_raw(payload)), **change}).encode()
    with pytest.raises(MalformedMessage):
        Receipt.verify(sign(document), PUBLIC)


def test_another_algorithm_is_refused() -> None:
    payload = _raw(RECEIPT.sign(KEY).split(b".")[1])
    head = base64.urlsafe_b64encode(b'{"alg":"none"}').rstrip(b"=")
    with pytest.raises(MalformedMessage):
        Receipt.verify(sign(payload, head), PUBLIC)


def _raw(part: bytes) -> bytes:
    return base64.urlsafe_b64decode(part + b"=" * (-len(part) % 4))


def _text(number: int) -> str:
    return base64.urlsafe_b64encode(bytes((number,)) * 32).rstrip(b"=").decode()
