"""Parsing: every field required, typed, bounded; one value has one encoding."""

import copy
import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from adytum.attestation.core.errors import EvidenceError
from adytum.attestation.core.limits import LIMITS
from adytum.attestation.document.evidence import Claims, Collateral, Evidence, ModelClaim
from tests.unit.attestation.support import CLAIMS, document, with_claims

OTHER_VALUES = (None, True, False, 0, 1, -1, 2**53, 1.5, "", "x", " ", "ü", [], {}, [None], {"x": 1})
NULLABLE = {("ehbp_key_configuration",), ("tls_spki_sha256",)}


def dump(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in a JSON value, the value itself left out."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in inside:
        yield (*at, key)
        yield from places(item, (*at, key))


def put(value: Any, at: tuple[Any, ...], item: Any) -> Any:
    result = copy.deepcopy(value)
    holder = result
    for key in at[:-1]:
        holder = holder[key]
    holder[at[-1]] = item
    return result


def delete(value: Any, at: tuple[Any, ...]) -> Any:
    result = copy.deepcopy(value)
    holder = result
    for key in at[:-1]:
        holder = holder[key]
    del holder[at[-1]]
    return result


CLAIMS_JSON = json.loads(CLAIMS.encode())
DOCUMENT = document()
DOCUMENT_JSON = json.loads(DOCUMENT)


def test_claims_round_trip() -> None:
    assert Claims.parse(CLAIMS.encode()) == CLAIMS
    bare = with_claims(ehbp_key_configuration=None, tls_spki_sha256=None)
    assert Claims.parse(bare.encode()) == bare
    assert json.loads(bare.encode())["tls_spki_sha256"] is None


def test_claims_encoding_is_fixed() -> None:
    """Spelled out once: what an auditor reads in README.md."""
    claims = Claims(
        b"\x01",
        None,
        b"\xcd" * 32,
        "/g",
        "a",
        None,
        (ModelClaim("m", "embed", ("n",), b"\xab" * 32),),
        bytes(32),
        "off",
        "none",
        "1",
        "on",
        5,
        6,
    )
    assert claims.encode() == (
        b'{"cc_mode":"on","configuration_sha256":"' + b"00" * 32 + b'","ehbp_key_configuration":null,'
        b'"gateway_path":"/g","issued_at":5,"key_configurations":"AQ==","keys_expire_at":6,'
        b'"models":[{"aliases":["n"],"id":"m","task":"embed","weights_root":"' + b"ab" * 32 + b'"}],'
        b'"padding":"off","receipt_key":"'
        + b"cd" * 32
        + b'","replica":"a","sandbox":"none","software_version":"1","tls_spki_sha256":null,"version":1}'
    )


def test_document_round_trip() -> None:
    assert Evidence.parse(DOCUMENT).encode() == DOCUMENT
    assert dump(DOCUMENT_JSON) == DOCUMENT
    collateral = Collateral((b"crl",), (b"rim", b"rim2"), (b"ocsp",), b"{}")
    full = replace(Evidence.parse(DOCUMENT), collateral=collateral)
    assert Evidence.parse(full.encode()) == full
    assert Evidence.parse(full.encode()).collateral == collateral


@pytest.mark.parametrize("at", list(places(CLAIMS_JSON)), ids=str)
def test_claims_need_every_field_with_its_type(at: tuple[Any, ...]) -> None:
    optional_item = at[0] == "models" and (len(at) == 2 or len(at) == 4)
    if not optional_item:
        with pytest.raises(EvidenceError):
            Claims.parse(dump(delete(CLAIMS_JSON, at)))
    kept = CLAIMS_JSON
    for key in at:
        kept = kept[key]
    for value in OTHER_VALUES:
        if type(value) is type(kept) and not (isinstance(value, list) and at == ("models",)):
            continue
        if value is None and at in NULLABLE:
            continue
        with pytest.raises(EvidenceError):
            Claims.parse(dump(put(CLAIMS_JSON, at, value)))


@pytest.mark.parametrize("at", list(places(DOCUMENT_JSON)), ids=str)
def test_document_needs_every_field_with_its_type(at: tuple[Any, ...]) -> None:
    if not isinstance(at[-1], int):  # Leaving out a list's element is the verifier's to refuse.
        with pytest.raises(EvidenceError):
            Evidence.parse(dump(delete(DOCUMENT_JSON, at)))
    kept = DOCUMENT_JSON
    for key in at:
        kept = kept[key]
    for value in OTHER_VALUES:
        if type(value) is not type(kept):  # `collateral.tdx` is null here: every other type but bytes is refused.
            with pytest.raises(EvidenceError):
                Evidence.parse(dump(put(DOCUMENT_JSON, at, value)))


@pytest.mark.parametrize(
    "value",
    [
        put(DOCUMENT_JSON, ("extra",), 1),
        put(DOCUMENT_JSON, ("nonces", "extra"), 1),
        put(DOCUMENT_JSON, ("cpu", "extra"), 1),
        put(DOCUMENT_JSON, ("collateral", "crl"), ""),
        put(DOCUMENT_JSON, ("collateral", "crls"), [""]),
        put(DOCUMENT_JSON, ("collateral", "rims"), ["AA=="] * (LIMITS.rims + 1)),
        put(DOCUMENT_JSON, ("collateral", "ocsp"), ["AA=="] * (LIMITS.ocsp + 1)),
        put(DOCUMENT_JSON, ("version",), 2),
        put(DOCUMENT_JSON, ("version",), 1.0),
        put(DOCUMENT_JSON, ("type",), "evidence"),
        put(DOCUMENT_JSON, ("nonces", "size"), LIMITS.round + 1),
        put(DOCUMENT_JSON, ("nonces", "path"), [DOCUMENT_JSON["nonces"]["root"]] * (LIMITS.path + 1)),
        put(DOCUMENT_JSON, ("nonces", "root"), "AA=="),
        put(DOCUMENT_JSON, ("cpu", "certificates"), ["AA=="] * (LIMITS.certificates + 1)),
        put(DOCUMENT_JSON, ("cpu", "report"), "AAAA" * (LIMITS.report // 3 + 1)),
        put(DOCUMENT_JSON, ("gpu",), "W10"),
        put(DOCUMENT_JSON, ("gpu",), "W11="),
        put(DOCUMENT_JSON, ("gpu",), "W1\n0="),
        put(DOCUMENT_JSON, ("gpu",), "W10=\n"),
        [DOCUMENT_JSON],
        "x",
        None,
    ],
)
def test_document_refused(value: object) -> None:
    with pytest.raises(EvidenceError):
        Evidence.parse(dump(value))


@pytest.mark.parametrize(
    ("at", "value"),
    [
        (("extra",), 1),
        (("models", 0, "extra"), 1),
        (("version",), 2),
        (("models",), []),
        (("models", 1, "id"), "demo/llama"),
        (("models", 1, "id"), "latest"),
        (("models", 1, "aliases"), ["demo/e5"]),
        (("models", 0, "aliases"), ["latest", "latest"]),
        (("models", 0, "task"), "chat"),
        (("models", 0, "id"), "a\x1b[2J"),
        (("models", 0, "id"), 'a"'),
        (("models", 0, "id"), "a" * (LIMITS.text + 1)),
        (("models", 0, "weights_root"), "11" * 31),
        (("models", 0, "weights_root"), "AA" * 32),
        (("models", 0, "weights_root"), "1" * 63 + " "),
        (("models", 0, "aliases"), [f"a{number}" for number in range(LIMITS.aliases + 1)]),
        (("models",), [{**CLAIMS_JSON["models"][1], "id": f"m{number}"} for number in range(LIMITS.models + 1)]),
        (("key_configurations",), ""),
        (("key_configurations",), "AAAA" * (LIMITS.key_configurations // 3 + 1)),
        (("ehbp_key_configuration",), ""),
        (("gateway_path",), "well-known"),
        (("padding",), "on"),
        (("sandbox",), "off"),
        (("cc_mode",), "On"),
        (("issued_at",), -1),
        (("issued_at",), 2**53),
        (("keys_expire_at",), 1e9),
        (("replica",), "a b"),
    ],
)
def test_claims_refused(at: tuple[Any, ...], value: Any) -> None:
    with pytest.raises(EvidenceError):
        Claims.parse(dump(put(CLAIMS_JSON, at, value)))


@pytest.mark.parametrize(
    ("parse", "data"), [(Claims.parse, CLAIMS.encode()), (Evidence.parse, DOCUMENT)], ids=["claims", "document"]
)
class TestBytes:
    def test_truncated_everywhere(self, parse: Any, data: bytes) -> None:
        for length in range(len(data)):
            with pytest.raises(EvidenceError):
                parse(data[:length])

    @pytest.mark.parametrize("trailing", [b" ", b"\n", b"\0", b"{}", b"x"])
    def test_trailing_and_leading(self, parse: Any, data: bytes, trailing: bytes) -> None:
        with pytest.raises(EvidenceError):
            parse(data + trailing)
        with pytest.raises(EvidenceError):
            parse(trailing + data)

    def test_one_encoding_only(self, parse: Any, data: bytes) -> None:
        value = json.loads(data)
        backwards = dict(reversed(value.items()))
        for other in (
            json.dumps(value, sort_keys=True).encode(),
            json.dumps(backwards, separators=(",", ":")).encode(),
            data.replace(b'"version":1', b'"version":1 '),
            data.replace(b'"version":', b'"v\\u0065rsion":'),
            data.decode().encode("utf-16"),
            b"\xef\xbb\xbf" + data,
        ):
            assert other != data
            with pytest.raises(EvidenceError):
                parse(other)

    def test_a_field_twice(self, parse: Any, data: bytes) -> None:
        for other in (
            data.replace(b'"version":1', b'"version":1,"version":1'),
            data.replace(b'"version":1', b'"version":2,"version":1'),
            b'{"version":1,' + data[1:],
        ):
            with pytest.raises(EvidenceError, match="twice"):
                parse(other)

    @pytest.mark.parametrize("number", [b"NaN", b"Infinity", b"-Infinity", b"1.0", b"1e0", b"-0", b"01", b"9" * 5000])
    def test_odd_numbers(self, parse: Any, data: bytes, number: bytes) -> None:
        with pytest.raises(EvidenceError):
            parse(data.replace(b'"version":1', b'"version":' + number))

    def test_deep_nesting(self, parse: Any, data: bytes) -> None:
        with pytest.raises(EvidenceError):
            parse(b"[" * 100_000)

    def test_not_utf_8(self, parse: Any, data: bytes) -> None:
        with pytest.raises(EvidenceError):
            parse(data.replace(b'"version"', b'"versio\xff"'))

    def test_too_large(self, parse: Any, data: bytes) -> None:
        with pytest.raises(EvidenceError, match="more than"):
            parse(b" " * (LIMITS.document + 1))


@pytest.mark.parametrize(
    "changes",
    [
        {"models": ()},
        {"padding": "yes"},
        {"sandbox": "some"},
        {"replica": ""},
        {"issued_at": -1},
        {"configuration_sha256": b"short"},
        {"key_configurations": b""},
        {"cc_mode": "unknown"},
        {"software_version": "0.1 beta"},
        {"gateway_path": "x"},
    ],
    ids=str,
)
def test_a_backend_cannot_issue_claims_that_no_verifier_reads(changes: dict[str, Any]) -> None:
    with pytest.raises(EvidenceError):
        with_claims(**changes).encode()


def test_messages_carry_no_text_of_the_document() -> None:
    """A document comes from a stranger and its refusal is shown on a terminal."""
    with pytest.raises(EvidenceError) as refused:
        Claims.parse(dump(put(CLAIMS_JSON, ("\x1b[2Jcanary",), 1)))
    assert "canary" not in str(refused.value)
    with pytest.raises(EvidenceError) as refused:
        Claims.parse(dump(put(CLAIMS_JSON, ("replica",), "canary \x1b[2J")))
    assert "canary" not in str(refused.value)
