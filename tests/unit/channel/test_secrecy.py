"""Neither a repr nor an error's text contains a key or a part of a message."""

import re
import traceback
from collections.abc import Callable

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from adytum.inference.channel import bhttp, ehbp, hpke, ohttp
from adytum.inference.channel.bhttp import RequestHead, ResponseHead
from adytum.inference.channel.exchange import InnerRequest
from adytum.inference.channel.hpke import AeadId, KdfId, KemId, Suite
from adytum.inference.channel.openings import EhbpOpening, OhttpOpening
from adytum.inference.channel.padding import EventPadder, Padding
from tests.unit.channel.support import MEDIA, configuration, held, recipient, refused

CANARY = "canary-6c1f"
SECRET = bytes(range(32))
# A class name with "(...)", with a state's name in parentheses, or with the object's address.
NAMES_ONLY = re.compile(r"[A-Za-z_0-9]+\((\.\.\.|[A-Z]+)\)|<[A-Za-z_0-9.]+ object at 0x[0-9a-f]+>")


def objects() -> list[object]:
    """One object of every type that holds a key or content of a user or a model."""
    found: list[object] = [
        hpke.X25519Key(X25519PrivateKey.from_private_bytes(SECRET)),
        hpke.XWingKey.from_bytes(SECRET),
        hpke.Sequence(hpke.new_aead(AeadId.AES_256_GCM, SECRET), bytes(12)),
        hpke.Context(Suite(KemId.X25519, KdfId.HKDF_SHA256, AeadId.AES_256_GCM), SECRET, b""),
        RequestHead("POST", "https", "", f"/{CANARY}", ((b"authorization", CANARY.encode()),)),
        ResponseHead(200, ((b"x", CANARY.encode()),)),
        bhttp.Content(CANARY.encode()),
        bhttp.Trailers(((b"x", CANARY.encode()),)),
        InnerRequest("POST", f"/{CANARY}", ((b"authorization", CANARY.encode()),), CANARY.encode()),
        ehbp.ResponseSealer(SECRET, SECRET),
    ]
    decoder = bhttp.Decoder("request")
    decoder.feed(bhttp.encode(RequestHead("POST", "https", "", "/"), CANARY.encode()))
    padder = EventPadder(Padding.PAD)
    padder.feed(CANARY.encode())
    found += [decoder, padder]
    for media in MEDIA:
        offered = configuration(KemId.X25519)
        sealer = ohttp.RequestSealer(media, offered)
        message = bhttp.encode(RequestHead("POST", "https", "", "/"), CANARY.encode())
        request = sealer.start() + sealer.final(message) if media.chunked else sealer.whole(message)
        opener = ohttp.RequestOpener(media, held(offered))
        opener.feed(request)
        _, response = opener.finish()
        opening = OhttpOpening(media, held(offered), Padding.PAD)
        opening.feed(request)
        answer = sealer.response()
        answer.feed(response.start())
        found += [sealer, opener, opener._response, opener._body, response, answer, answer._reader]
        found += [opening, opening.open()]
    enc, context = hpke.setup_sender(ehbp.SUITE, recipient(KemId.X25519).public_bytes, b"ehbp request")
    sealed = context.seal(CANARY.encode())
    closed = EhbpOpening("POST", "/", (), enc.hex(), (recipient(KemId.X25519),), Padding.PAD)
    closed.feed(len(sealed).to_bytes(4, "big") + sealed)
    return [*found, closed, closed._opener, closed.open()]


@pytest.mark.parametrize("item", [item for item in objects() if not isinstance(item, bytearray | None)], ids=type)
def test_a_repr_shows_names_only(item: object) -> None:
    for text in (repr(item), str(item), f"{item}", repr([item])[1:-1]):
        assert NAMES_ONLY.fullmatch(text), text
        assert type(item).__name__ in text


def test_the_pattern_can_fail() -> None:
    for text in (f"Content(data=b'{CANARY}')", "X25519Key(00ff)", "Sequence(b'..')"):
        assert not NAMES_ONLY.fullmatch(text)


def raw_request(*parts: bytes) -> bytes:
    return b"\x00" + b"".join(bytes((len(part),)) + part for part in parts)


C = CANARY.encode()
LINE = bytes((len(C),)) + C
FAILURES: dict[str, Callable[[], object]] = {
    "method": lambda: bhttp.Decoder("request").feed(raw_request(C + b" ", b"", b"", b"/") + b"\x00"),
    "path": lambda: bhttp.Decoder("request").feed(raw_request(b"GET", b"", b"", C) + b"\x00"),
    "not ASCII": lambda: bhttp.Decoder("request").feed(raw_request(b"GET", b"", b"", b"/" + C + b"\xff") + b"\x00"),
    "name": lambda: bhttp.Decoder("response").feed(b"\x03\x40\xc8" + bytes((len(C) + 1,)) + b"A" + C + LINE),
    "value": lambda: bhttp.Decoder("response").feed(b"\x03\x40\xc8\x01a" + bytes((len(C) + 1,)) + C + b"\n"),
    "padding": lambda: bhttp.Decoder("response").feed(b"\x01\x40\xc8\x00\x00\x00" + C),
    "sent line": lambda: bhttp.encode_head(ResponseHead(200, ((b"a", C + b"\n"),))),
    "sent control data": lambda: bhttp.encode(RequestHead("GET", "", "", f"/{CANARY}ä")),
    "key identifier": lambda: ohttp.RequestOpener(ohttp.CHUNKED, held()).feed(C * 9),
    "EHBP header": lambda: ehbp.RequestOpener(CANARY, (recipient(KemId.X25519),)),
    "secret key": lambda: hpke.X25519Key.from_bytes(C),
    "public key": lambda: hpke.encapsulate(KemId.X25519, C),
    "ciphertext": lambda: hpke.Sequence(hpke.new_aead(AeadId.AES_256_GCM, SECRET), bytes(12)).open(C * 3),
}


@pytest.mark.parametrize("name", FAILURES)
def test_an_error_shows_nothing_of_what_it_is_about(name: str) -> None:
    error = refused(FAILURES[name])
    shown: list[str] = []
    cause: BaseException | None = error
    while cause is not None:
        # As a traceback prints it.
        shown += traceback.format_exception_only(cause)
        cause = cause.__cause__ or cause.__context__
    assert shown
    assert CANARY not in "".join(shown)
