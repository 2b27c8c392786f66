"""What becomes of a request's JSON: the cache's domain, refused fields, media by address, and everything else kept."""

import base64
import json
from typing import Any

import pytest

from adytum.inference.channel.bhttp import Fields
from adytum.inference.channel.exchange import InnerRequest
from adytum.inference.core.config import parse
from adytum.inference.gateway.admission.admission import Admission, EngineCall
from adytum.inference.gateway.admission.rewrite import REFUSED, CacheSalts, for_engine
from adytum.inference.gateway.failures import Refused
from tests.pictures import data_url, png
from tests.support import ROOT, config_text
from tests.unit.gateway.support import admission_of

KEYS = ("sk-one", "sk-two")
BODY: dict[str, Any] = {"model": "demo/llama-awq", "messages": [{"role": "user", "content": "hello"}]}


@pytest.fixture(scope="module")
def admission() -> Admission:
    return admission_of(parse(config_text(port=0, runtime=ROOT / "var" / "run", api_keys=list(KEYS)).encode()))


def admit(admission: Admission, body: Any, key: str = KEYS[0], domain: bytes | None = None) -> dict[str, Any]:
    fields: Fields = ((b"authorization", b"Bearer " + key.encode()),)
    if domain is not None:
        fields += ((b"x-adytum-cache-domain", domain),)
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    call = admission.admit(InnerRequest("POST", "/v1/chat/completions", fields, data))
    assert isinstance(call, EngineCall)
    found: dict[str, Any] = json.loads(call.body)
    return found


def salt(admission: Admission, body: dict[str, Any] = BODY, key: str = KEYS[0], domain: bytes | None = None) -> str:
    return str(admit(admission, body, key, domain)["cache_salt"])


def test_everything_but_the_salt_is_passed_on(admission: Admission) -> None:
    body = {
        **BODY,
        "n": 2,
        "temperature": 0.1,
        "seed": 2**63,
        "stop": ["\u2028", "\U0001f600"],
        "logit_bias": {"5": -1e-9},
        "response_format": {"type": "json_schema", "json_schema": {"properties": {"image_url": {"type": "string"}}}},
        "tools": [{"type": "function", "function": {"name": "f", "parameters": {"image_url": "https://x/"}}}],
        "unknown": None,
    }
    found = admit(admission, body)
    assert len(found.pop("cache_salt")) == 64
    assert found == body


def test_without_a_domain_each_request_is_alone(admission: Admission) -> None:
    assert salt(admission) != salt(admission)
    assert salt(admission, domain=b"") != salt(admission, domain=b"")


def test_a_domain_is_the_same_for_one_key_and_another_for_the_next(admission: Admission) -> None:
    assert salt(admission, domain=b"a") == salt(admission, domain=b"a")
    assert salt(admission, domain=b"a") != salt(admission, domain=b"b")
    assert salt(admission, domain=b"a") != salt(admission, domain=b"a", key=KEYS[1])
    named = {**BODY, "prompt_cache_key": "a"}
    assert salt(admission, named) == salt(admission, named) != salt(admission, domain=b"a")
    # The header goes before.
    assert salt(admission, named, domain=b"b") == salt(admission, domain=b"b")


def test_a_client_cannot_choose_the_salt(admission: Admission) -> None:
    wanted = salt(admission, domain=b"a")
    assert salt(admission, {**BODY, "cache_salt": wanted}, key=KEYS[1]) != wanted
    twice = b'{"cache_salt":"x",' + json.dumps(BODY).encode()[1:-1] + b',"cache_salt":"y"}'
    assert len(admit(admission, twice)["cache_salt"]) == 64


def test_another_start_has_other_salts_and_parts_are_told_apart() -> None:
    one, other = CacheSalts(), CacheSalts()
    assert one.salt(b"k", b"d") == one.salt(b"k", b"d") != other.salt(b"k", b"d")
    assert one.salt(b"ab", b"c") != one.salt(b"a", b"bc")
    assert "0x" not in repr(one)


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_a_refused_field_is_named_with_its_reason(admission: Admission, name: str) -> None:
    with pytest.raises(Refused) as refused:
        admit(admission, {**BODY, name: "x"})
    assert refused.value.refusal.status == 400
    assert refused.value.refusal.param == name
    assert REFUSED[name] in refused.value.refusal.message
    for unset in (None, False, "", {}, []):
        admit(admission, {**BODY, name: unset})


@pytest.mark.parametrize(
    ("part", "place"),
    [
        ({"type": "image_url", "image_url": {"url": "https://example.org/a.png"}}, "messages[0].content[0].image_url"),
        ({"type": "image_url", "image_url": "http://127.0.0.1/a.png"}, "messages[0].content[0].image_url"),
        ({"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}, "messages[0].content[0].image_url"),
        ({"image_url": {}}, "messages[0].content[0].image_url"),
        ({"type": "image_url", "image_url": ["https://x/"]}, "messages[0].content[0].image_url"),
        ({"type": "video_url", "video_url": {"url": "https://x/"}}, "messages[0].content[0].video_url"),
        ({"type": "image", "source": {"type": "url", "url": "https://x/"}}, "messages[0].content[0].source"),
    ],
)
def test_media_by_address_is_refused(admission: Admission, part: Any, place: str) -> None:
    with pytest.raises(Refused) as refused:
        admit(admission, {**BODY, "messages": [{"role": "user", "content": [part]}]})
    assert refused.value.refusal.param == place
    assert "data:" in refused.value.refusal.message


def test_an_image_is_passed_on_with_the_salt_of_its_request(admission: Admission) -> None:
    content = [
        {"type": "image_url", "image_url": {"url": data_url(png())}},
        {"type": "text", "text": "see https://example.org/a.png"},
        {"type": "tool_use", "id": "1", "name": "f", "input": {"image_url": "https://example.org/a.png"}},
    ]

    def image(**more: Any) -> bytes:
        found = admit(admission, {**BODY, "messages": [{"role": "user", "content": content}]}, **more)
        first, *others = found["messages"][0]["content"]
        assert others == content[1:]
        sent = base64.b64decode(first["image_url"]["url"].removeprefix("data:image/png;base64,"))
        assert sent == png() + found["cache_salt"].encode()
        return sent

    assert image() != image(), "without a domain each request is alone"
    assert image(domain=b"a") == image(domain=b"a") != image(domain=b"a", key=KEYS[1])


@pytest.mark.parametrize(
    "body", [b"", b"[]", b"{", b'{"temperature": NaN}', b'{"a": -Infinity}', b"\xff{}", b"[" * 5000]
)
def test_what_is_no_json_object_is_refused(admission: Admission, body: bytes) -> None:
    with pytest.raises(Refused) as refused:
        admit(admission, body)
    assert refused.value.refusal.code == "invalid_json"


def test_a_body_that_is_nested_too_deeply_is_refused() -> None:
    body: dict[str, Any] = {"messages": []}
    inner = body["messages"]
    for _ in range(100_000):
        inner.append([])
        inner = inner[0]
    with pytest.raises(Refused):
        for_engine(body, "x")


def test_nothing_is_stored(admission: Admission) -> None:
    assert admit(admission, {**BODY, "store": True})["store"] is False


def test_a_part_cannot_name_an_entry_of_the_media_cache(admission: Admission) -> None:
    data = {"url": data_url(png())}
    for more in ({"image_url": data}, {}):
        part = {"type": "image_url", "uuid": "u", **more}
        with pytest.raises(Refused) as refused:
            admit(admission, {**BODY, "messages": [{"role": "user", "content": [part]}]})
        assert refused.value.refusal.param == "messages[0].content[0].uuid"
    call = {"type": "tool_use", "id": "1", "name": "f", "input": {"uuid": "the client's own name"}}
    admit(admission, {**BODY, "messages": [{"role": "assistant", "content": [call]}]})


@pytest.mark.parametrize("number", [b"1e999", b"-1e999"])
def test_a_number_that_reads_as_infinity_is_refused(admission: Admission, number: bytes) -> None:
    with pytest.raises(Refused) as refused:
        admit(admission, json.dumps(BODY).encode()[:-1] + b',"temperature":' + number + b"}")
    assert refused.value.refusal.code == "invalid_json"
