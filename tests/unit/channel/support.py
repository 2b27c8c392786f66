"""What the tests of the channel share: vectors, keys, ways to cut bytes, and a reference reader of event streams."""

import json
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import cryptography_vectors
import pytest
from hypothesis import settings
from hypothesis import strategies as st

from adytum.inference.channel import hpke, ohttp
from adytum.inference.channel.errors import ChannelError, UnknownKey
from adytum.inference.channel.hpke import AeadId, KdfId, KemId
from adytum.inference.channel.keyconfig import KeyConfiguration

# No deadline: the first example of a run pays for imports, and a shared runner stalls.
FUZZ = settings(deadline=None, max_examples=150)
SLOW_FUZZ = settings(deadline=None, max_examples=60)

KEMS = (KemId.X25519, KemId.MLKEM768_X25519)
MEDIA = (ohttp.WHOLE, ohttp.CHUNKED)
# The offered one first.
ALL_PAIRS = tuple(
    (KdfId.HKDF_SHA256, aead) for aead in (AeadId.AES_256_GCM, AeadId.AES_128_GCM, AeadId.CHACHA20_POLY1305)
)


def unhex(text: str) -> bytes:
    return bytes.fromhex(text)


def wire_vector(name: str) -> dict[str, Any]:
    """A vector that is kept beside the repository. Without it the test is skipped, and the reason names the file."""
    path = Path(__file__).resolve().parents[4] / "shared" / "vectors" / "wire" / name
    if not path.exists():
        pytest.skip(f"the wire vectors are not here: ../shared/vectors/wire/{name}")
    vector: dict[str, Any] = json.loads(path.read_text())
    return vector


def hpke_vectors(name: str) -> list[dict[str, Any]]:
    """Vectors that come with the package `cryptography-vectors`."""
    path = Path(cryptography_vectors.__file__).parent / "HPKE" / name
    vectors: list[dict[str, Any]] = json.loads(path.read_text())
    return vectors


@cache
def recipient(kem: KemId) -> hpke.PrivateKey:
    """One key for each KEM, the same in every run."""
    secret = bytes(range(32))
    return hpke.X25519Key.from_bytes(secret) if kem is KemId.X25519 else hpke.XWingKey.from_bytes(secret)


def configuration(kem: KemId, key_id: int = 7) -> KeyConfiguration:
    return KeyConfiguration(key_id, kem, recipient(kem).public_bytes, ALL_PAIRS)


def held(*configurations: KeyConfiguration) -> ohttp.Keys:
    """A gateway's lookup of keys by identifier, which refuses unknown ones."""

    def keys(key_id: int) -> tuple[KeyConfiguration, hpke.PrivateKey]:
        for item in configurations:
            if item.key_id == key_id:
                return item, recipient(item.kem)
        raise UnknownKey("no such key")

    return keys


def pieces(data: bytes, cuts: Iterable[int]) -> Iterator[bytes]:
    """`data` cut at the given offsets, which may be out of order, out of range or equal."""
    at = 0
    for cut in sorted(min(max(cut, 0), len(data)) for cut in cuts):
        yield data[at:cut]
        at = cut
    yield data[at:]


def one_by_one(data: bytes) -> list[bytes]:
    return [bytes((byte,)) for byte in data]


def cuts(most: int = 400) -> st.SearchStrategy[list[int]]:
    return st.lists(st.integers(0, most), max_size=8)


def mutations() -> st.SearchStrategy[list[tuple[str, float, int]]]:
    """Edits of a valid message: (kind, place as a fraction of the length, a byte)."""
    what = st.sampled_from(("set", "flip", "insert", "delete", "cut", "repeat"))
    return st.lists(st.tuples(what, st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=4)


def mutate(data: bytes, edits: list[tuple[str, float, int]]) -> bytes:
    out = bytearray(data)
    for what, where, byte in edits:
        at = int(where * len(out))
        if what == "insert":
            out.insert(at, byte)
        elif what == "cut":
            del out[at:]
        elif what == "repeat":
            out[at:at] = out[at : at + byte]
        elif not out:
            continue
        elif what == "set":
            out[at] = byte
        elif what == "flip":
            out[at] ^= 1 << byte % 8
        elif what == "delete":
            del out[at]
    return bytes(out)


def flips(data: bytes) -> Iterator[tuple[int, bytes]]:
    """(offset of the byte, copy of `data`) for every bit of `data`, with that bit changed in the copy."""
    for bit in range(len(data) * 8):
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        yield bit // 8, bytes(changed)


def refused(call: Any, *arguments: Any) -> ChannelError:
    """The `ChannelError` that `call` raises. Fails if `call` returns."""
    with pytest.raises(ChannelError) as caught:
        call(*arguments)
    return caught.value


def server_sent_events(stream: bytes) -> list[tuple[str, str, str]]:
    """(event, data, last id) of each dispatched event, line by line as in WHATWG HTML, 9.2.6.

    It shares no code with the padding that it checks.
    """
    text = stream.decode("utf-8").removeprefix("\ufeff")
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    events: list[tuple[str, str, str]] = []
    event, identifier = "", ""
    data: list[str] = []
    # The last element has no line end and is discarded, and so is an event that no blank line ended.
    for line in lines[:-1]:
        if not line:
            if data:
                events.append((event or "message", "\n".join(data), identifier))
            event, data = "", []
            continue
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if name == "event":
            event = value
        elif name == "data":
            data.append(value)
        elif name == "id" and "\0" not in value:
            identifier = value
    return events
