"""The verified upstream without IO: verification before sealing, what is sealed, and how answers open."""

import time
from dataclasses import replace
from typing import Any

import pytest

from adytum.attestation.collect.rounds import Collector, NoEndorsements, NoGpus
from adytum.attestation.core.trust import TrustRoots
from adytum.attestation.document.evidence import Claims, ModelClaim
from adytum.attestation.policy.policy import Policy
from adytum.attestation.policy.rules import Age
from adytum.attestation.simulated.device import SimulatedCpu
from adytum.inference.channel import bhttp, keyconfig, ohttp
from adytum.inference.channel.bhttp import Fields, ResponseHead
from adytum.inference.channel.exchange import Exchange, InnerRequest
from adytum.inference.channel.hpke import KemId
from adytum.inference.channel.limits import DEFAULT_LIMITS
from adytum.inference.channel.openings import OhttpOpening
from adytum.inference.channel.padding import Padding
from adytum.inference.client.answers import is_sealed, key_is_unknown, refusal
from adytum.inference.client.errors import (
    ClientError,
    NotVerified,
    RequestRefused,
    ResponseCut,
    ResponseForged,
    UpstreamRefused,
)
from adytum.inference.client.origin import Origin
from adytum.inference.client.reader import ResponseReader
from adytum.inference.client.session import EXPIRY_MARGIN_S, Session, Upstream
from adytum.inference.gateway.exchange.notary import Notary
from adytum.inference.gateway.keys import KeyRing

NOW = 1_800_000_000.0
DATE = b"Fri, 15 Jan 2027 08:00:00 GMT"
"""`NOW` in HTTP's format."""
FIELDS: Fields = ((b"authorization", b"Bearer sk-1"), (b"content-type", b"application/json"))


class Backend:
    """Keys and evidence for them."""

    def __init__(self, now: float = NOW) -> None:
        self.now = now
        self.keys = KeyRing(lambda: self.now, 3600, 600)
        self.cpu = SimulatedCpu(clock=lambda: self.now)
        self.notary = Notary({"m": bytes(32)}, lambda: self.now)
        self.changes: dict[str, Any] = {}

    def document(self, nonce: bytes) -> bytes:
        claims = Claims(
            key_configurations=keyconfig.encode_list(self.keys.configurations),
            ehbp_key_configuration=None,
            receipt_key=self.notary.public_key,
            gateway_path="/gateway",
            replica="r",
            tls_spki_sha256=None,
            models=(ModelClaim("m", "generate", (), bytes(32)),),
            configuration_sha256=bytes(32),
            padding="pad",
            sandbox="full",
            software_version="1",
            cc_mode="none",
            issued_at=int(self.now),
            keys_expire_at=int(self.keys.expires_at),
        )
        return (
            Collector(self.cpu, NoGpus(), NoEndorsements())
            .collect(replace(claims, **self.changes), [nonce])
            .document(nonce)
        )

    def upstream(self, policy: Policy | None = None, **options: Any) -> Upstream:
        options = {"policy": policy or Policy.accept_simulated(), "clock": lambda: self.now, **options}
        return Upstream("https://llm.example.org", **options)

    def session(self, upstream: Upstream | None = None) -> Session:
        upstream = upstream or self.upstream()
        challenge = upstream.challenge()
        return upstream.accept(challenge, self.document(challenge.nonce))

    def open(self, data: bytes, padding: Padding = Padding.PAD) -> tuple[InnerRequest, Exchange]:
        opening = OhttpOpening(ohttp.CHUNKED, self.keys.find, padding)
        opening.feed(data)
        exchange = opening.open()
        return exchange.request(), exchange


@pytest.fixture
def backend() -> Backend:
    return Backend()


def test_a_request_opens_at_the_backend_as_it_was(backend: Backend) -> None:
    data, _ = backend.session().seal("POST", "/v1/chat/completions?x=%20y", FIELDS, b'{"a": 1}')
    request, _ = backend.open(data)
    assert (request.method, request.path, request.fields, request.body) == (
        "POST",
        "/v1/chat/completions?x=%20y",
        (*FIELDS, (b"date", DATE)),
        b'{"a": 1}',
    )


def test_only_the_challenges_own_nonce_is_accepted(backend: Backend) -> None:
    upstream = backend.upstream()
    challenge, other = upstream.challenge(), upstream.challenge()
    assert challenge.nonce != other.nonce
    assert len(challenge.nonce) == 32
    assert challenge.target == f"/.well-known/attestation?nonce={challenge.nonce.hex()}"
    with pytest.raises(NotVerified, match=r"step 2 \(nonce\)"):
        upstream.accept(challenge, backend.document(other.nonce))
    assert upstream.session() is None


def test_the_default_policy_refuses_simulated_evidence_and_says_which_claim(backend: Backend) -> None:
    upstream = backend.upstream(Policy.default(frozenset({bytes(48)})))
    with pytest.raises(NotVerified, match=r"step 6 \(policy\), claim cpu: .*Nothing was sent"):
        backend.session(upstream)
    assert upstream.session() is None


def test_a_policy_that_fails_later_ends_the_session_that_was(backend: Backend) -> None:
    upstream = backend.upstream(replace(Policy.accept_simulated(), age=Age(10, 0)))
    backend.session(upstream)
    assert upstream.session() is not None
    challenge = upstream.challenge()
    document = backend.document(challenge.nonce)
    backend.now += 11
    with pytest.raises(NotVerified, match="claim"):
        upstream.accept(challenge, document)
    assert upstream.session() is None


def test_a_pinned_key_other_than_the_backends_is_refused(backend: Backend) -> None:
    with pytest.raises(NotVerified, match="cpu report"):
        backend.session(backend.upstream(trust=TrustRoots(simulated=frozenset({bytes(32)}))))
    backend.session(backend.upstream(trust=TrustRoots(simulated=frozenset({backend.cpu.key_sha256}))))


@pytest.mark.parametrize(("kem", "expected"), [(None, 0x647A), ("mlkem768-x25519", 0x647A), ("x25519", 0x0020)])
def test_the_best_key_is_used_or_the_one_asked_for(backend: Backend, kem: str | None, expected: int) -> None:
    listed = tuple(reversed(backend.keys.configurations))  # The backend's order does not decide.
    backend.changes["key_configurations"] = keyconfig.encode_list(listed)
    data, _ = backend.session(backend.upstream(kem=kem)).seal("GET", "/v1/models", (), b"")
    assert int.from_bytes(data[1:3], "big") == expected
    assert backend.open(data)[0].path == "/v1/models"


def test_without_the_kem_asked_for_nothing_is_sealed(backend: Backend) -> None:
    only = tuple(item for item in backend.keys.configurations if item.kem is KemId.X25519)
    backend.changes["key_configurations"] = keyconfig.encode_list(only)
    with pytest.raises(NotVerified, match="no key for mlkem768-x25519"):
        backend.session(backend.upstream(kem="mlkem768-x25519"))
    assert backend.session().kem == "x25519"


@pytest.mark.parametrize(
    "change", [{"key_configurations": b"\x00\x09junk"}, {"gateway_path": "//evil.example/x"}, {"gateway_path": "/a#b"}]
)
def test_claims_that_cannot_be_used_are_refused(backend: Backend, change: dict[str, Any]) -> None:
    backend.changes.update(change)
    upstream = backend.upstream()
    with pytest.raises(NotVerified, match=r"claims\."):
        backend.session(upstream)
    assert upstream.session() is None


def test_a_session_ends_after_the_recheck_interval(backend: Backend) -> None:
    upstream = backend.upstream(recheck_s=100)
    backend.session(upstream)
    backend.now += 99
    assert upstream.session() is not None
    backend.now += 1
    assert upstream.session() is None


def test_a_session_ends_before_its_keys_do(backend: Backend) -> None:
    upstream = backend.upstream(recheck_s=1e9)
    backend.session(upstream)
    expires = int(backend.keys.expires_at)
    backend.now = expires - EXPIRY_MARGIN_S - 1
    assert upstream.session() is not None
    backend.now = expires - EXPIRY_MARGIN_S
    assert upstream.session() is None


def test_a_clock_that_goes_back_ends_a_session(backend: Backend) -> None:
    upstream = backend.upstream()
    backend.session(upstream)
    backend.now -= 1
    assert upstream.session() is None


def test_an_unwanted_session_is_not_given(backend: Backend) -> None:
    upstream = backend.upstream()
    first = backend.session(upstream)
    assert upstream.session() is first
    assert upstream.session(first) is None
    second = backend.session(upstream)
    assert upstream.session(first) is second


def test_what_is_accepted_is_recorded_before_it_is_used(backend: Backend) -> None:
    def refuse(_: object) -> None:
        raise RequestRefused("no room")

    upstream = backend.upstream(record=refuse)
    with pytest.raises(RequestRefused, match="no room"):
        backend.session(upstream)
    assert upstream.session() is None


def test_fields_of_this_hop_stay_outside(backend: Backend) -> None:
    fields = (
        (b"Host", b"localhost:9876"),
        (b"Connection", b"keep-alive, X-Hop"),
        (b"X-Hop", b"1"),
        (b"Content-Length", b"3"),
        (b"Transfer-Encoding", b"chunked"),
        (b"Accept-Encoding", b"gzip"),
        (b"Cookie", b"a=b"),
        (b"Sec-Fetch-Mode", b"cors"),
        (b"X-Kept", b"yes"),
        *FIELDS,
    )
    data, _ = backend.session().seal("POST", "/v1/embeddings", fields, b"{}")
    assert backend.open(data)[0].fields == ((b"x-kept", b"yes"), *FIELDS, (b"date", DATE))


def test_the_clients_own_key_replaces_the_callers(backend: Backend) -> None:
    fields = (*FIELDS, (b"X-Api-Key", b"sk-2"))
    data, _ = backend.session().seal("POST", "/v1/embeddings", fields, b"{}", api_key="sk-own")
    request, _ = backend.open(data)
    assert request.fields == (
        (b"content-type", b"application/json"),
        (b"authorization", b"Bearer sk-own"),
        (b"date", DATE),
    )


def test_lengths_of_requests_are_padded(backend: Backend) -> None:
    session = backend.session()
    lengths = {len(session.seal("POST", "/v1/chat/completions", FIELDS, b"x" * n)[0]) for n in range(1, 700, 13)}
    assert len(lengths) == 1
    assert len(session.seal("POST", "/v1/chat/completions", FIELDS, b"x" * 1500)[0]) > lengths.pop()


@pytest.mark.parametrize("size", [0, 16_000, 16_384, 40_000, 20 * 1024 * 1024 + 17])
def test_a_request_of_any_size_opens(backend: Backend, size: int) -> None:
    body = b"y" * size
    data, _ = backend.session().seal("POST", "/v1/chat/completions", FIELDS, body)
    assert backend.open(data)[0].body == body


def test_a_request_that_a_backend_would_not_take_is_refused_here(backend: Backend) -> None:
    with pytest.raises(RequestRefused, match="32 MiB") as caught:
        backend.session().seal("POST", "/v1/x", (), bytes(DEFAULT_LIMITS.message))
    assert caught.value.status == 413


@pytest.mark.parametrize("fields", [((b"x", b"a\r\nb"),), ((b"a b", b"c"),)])
def test_a_field_that_is_not_http_is_refused(backend: Backend, fields: Fields) -> None:
    with pytest.raises(RequestRefused):
        backend.session().seal("GET", "/v1/models", fields, b"")


def stream_of(backend: Backend, exchange: Exchange) -> list[bytes]:
    """The writes of a streamed answer."""
    _, start = exchange.begin(200, ((b"content-type", b"text/event-stream"),))
    return [
        start,
        *(exchange.data(b"data: word%d\n\n" % i) for i in range(4)),
        exchange.end(backend.notary.closing(exchange, 200)),
    ]


def streamed(backend: Backend) -> tuple[list[bytes], ResponseReader]:
    data, reader = backend.session().seal("POST", "/v1/chat/completions", FIELDS, b"{}")
    return stream_of(backend, backend.open(data, Padding.OFF)[1]), reader


def read(reader: ResponseReader, data: bytes, step: int) -> bytes:
    content = b"".join(reader.feed(data[at : at + step]) for at in range(0, len(data), step))
    return content + reader.finish()


@pytest.mark.parametrize("step", [1, 7, 100, 10_000])
def test_an_answer_opens_however_it_is_cut_into_reads(backend: Backend, step: int) -> None:
    writes, reader = streamed(backend)
    assert read(reader, b"".join(writes), step) == b"".join(b"data: word%d\n\n" % i for i in range(4))
    assert reader.head is not None
    assert reader.head.status == 200
    assert reader.ended


def test_content_is_given_with_the_write_that_brought_it(backend: Backend) -> None:
    writes, reader = streamed(backend)
    assert reader.feed(writes[0]) == b""
    assert isinstance(reader.head, ResponseHead)
    for i in range(4):
        assert reader.feed(writes[i + 1]) == b"data: word%d\n\n" % i
        assert not reader.ended


def test_an_answer_cut_at_any_byte_is_an_error(backend: Backend) -> None:
    data, _ = backend.session().seal("POST", "/v1/chat/completions", FIELDS, b"{}")
    whole = b"".join(stream_of(backend, backend.open(data, Padding.OFF)[1]))
    for end in range(len(whole)):
        writes, reader = streamed(backend)
        with pytest.raises((ResponseCut, ResponseForged)):
            read(reader, b"".join(writes)[:end], 10_000)
        assert not reader.ended


def test_an_answer_changed_at_any_byte_is_an_error(backend: Backend) -> None:
    session = backend.session()
    length = len(b"".join(streamed(backend)[0]))
    for at in range(length):
        data, reader = session.seal("POST", "/v1/chat/completions", FIELDS, b"{}")
        whole = b"".join(stream_of(backend, backend.open(data, Padding.OFF)[1]))
        assert len(whole) == length
        with pytest.raises((ResponseCut, ResponseForged)):
            read(reader, whole[:at] + bytes((whole[at] ^ 1,)) + whole[at + 1 :], 10_000)
        assert not reader.ended


def test_no_word_of_a_changed_write_is_given(backend: Backend) -> None:
    writes, reader = streamed(backend)
    reader.feed(writes[0] + writes[1])
    for at in (2, len(writes[2]) - 1):
        changed = writes[2][:at] + bytes((writes[2][at] ^ 1,)) + writes[2][at + 1 :]
        with pytest.raises(ResponseForged):
            reader.feed(changed)
    with pytest.raises(ResponseForged):  # It stays unusable afterwards.
        reader.feed(writes[2])


def test_the_answer_to_another_request_does_not_open(backend: Backend) -> None:
    session = backend.session()
    _, reader = session.seal("POST", "/v1/chat/completions", FIELDS, b"{}")
    other, _ = session.seal("POST", "/v1/chat/completions", FIELDS, b"{}")
    with pytest.raises(ResponseForged):
        reader.feed(b"".join(stream_of(backend, backend.open(other)[1])))


def test_bytes_after_the_answer_are_an_error(backend: Backend) -> None:
    writes, reader = streamed(backend)
    with pytest.raises(ResponseForged):
        read(reader, b"".join(writes) + b"\x00", 10_000)


def test_a_long_stream_is_not_bounded_like_one_message(backend: Backend) -> None:
    data, reader = backend.session().seal("POST", "/v1/chat/completions", FIELDS, b"{}")
    exchange = backend.open(data)[1]
    _, start = exchange.begin(200, ((b"content-type", b"text/event-stream"),))
    reader.feed(start)
    events = DEFAULT_LIMITS.chunks + 10
    total = sum(len(reader.feed(exchange.data(b"data: x\n\n"))) for _ in range(events))
    reader.feed(exchange.end(backend.notary.closing(exchange, 200)))
    reader.finish()
    assert total == events * 512


@pytest.mark.parametrize(
    "url",
    [
        "llm.example.org",
        "ftp://llm.example.org",
        "https://llm.example.org/v1",
        "https://user@llm.example.org",
        "https://llm.example.org?x",
        "https://",
        "https://a:99999",
    ],
)
def test_an_upstream_is_an_origin(url: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        Origin.parse(url)


def test_origins_are_compared_with_their_default_ports() -> None:
    origin = Origin.parse("https://LLM.example.org/")
    assert str(origin) == "https://llm.example.org"
    assert origin.matches("https", "llm.example.org", None)
    assert origin.matches("https", "llm.example.org", 443)
    assert not origin.matches("http", "llm.example.org", 443)
    assert not origin.matches("https", "llm.example.org", 8443)
    assert str(Origin.parse("http://[::1]:80")) == "http://[::1]"


ORIGIN = Origin.parse("https://llm.example.org")
KEY_PROBLEM = b'{"type": "https://iana.org/assignments/http-problem-types#ohttp-key", "title": "T"}'


@pytest.mark.parametrize(
    ("status", "media", "body", "kind", "unknown"),
    [
        (422, "application/problem+json", KEY_PROBLEM, UpstreamRefused, True),
        (401, "Application/Problem+JSON; charset=utf-8", KEY_PROBLEM, UpstreamRefused, True),
        (422, "application/json", KEY_PROBLEM, UpstreamRefused, False),
        (200, "application/problem+json", KEY_PROBLEM, ResponseForged, False),
        (307, "text/html", b"", UpstreamRefused, False),
        (503, "application/problem+json", b"[" * 100_000, UpstreamRefused, False),
        (503, "application/problem+json", b'{"type": 5, "title": []}', UpstreamRefused, False),
        (500, None, b"\xff", UpstreamRefused, False),
    ],
)
def test_answers_in_the_clear(
    status: int, media: str | None, body: bytes, kind: type[ClientError], unknown: bool
) -> None:
    assert not is_sealed(status, media)
    error = refusal(ORIGIN, status, media, None, body)
    assert type(error) is kind
    assert key_is_unknown(error) is unknown


def test_an_unauthenticated_text_is_shortened_and_named_so() -> None:
    title = b"evil\\u001b[31m\\n" + b"x" * 1000
    error = refusal(ORIGIN, 503, "application/problem+json", "7", b'{"title": "%s"}' % title)
    assert isinstance(error, UpstreamRefused)
    assert error.retry_after == 7
    assert "not authenticated" in str(error)
    assert "\x1b" not in str(error)
    assert len(str(error)) < 400


def test_nothing_shows_a_request_in_a_repr(backend: Backend) -> None:
    session = backend.session()
    _, reader = session.seal("POST", "/v1/x", ((b"authorization", b"Bearer sk-canary"),), b"canary")
    assert "canary" not in repr(session) + repr(reader)


def test_the_real_clock_is_the_default() -> None:
    backend = Backend(time.time())
    upstream = Upstream("https://llm.example.org", policy=Policy.accept_simulated())
    challenge = upstream.challenge()
    assert upstream.accept(challenge, backend.document(challenge.nonce)) is upstream.session()


def test_field_names_become_lower_case(backend: Backend) -> None:
    data, _ = backend.session().seal("GET", "/v1/models", ((b"Accept", b"x"),), b"")
    assert bhttp.field(backend.open(data)[0].fields, b"accept") == b"x"
