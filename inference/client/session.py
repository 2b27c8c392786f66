"""The verified upstream, without IO: a challenge out, evidence in, requests sealed, answers opened.

1. `Upstream.challenge` returns a fresh nonce and the path to ask for evidence with it.
2. `Upstream.accept` verifies the document that came back and returns a `Session`. There is no other way to get one.
3. `Session.seal` returns a sealed request and the `ResponseReader` that alone opens its answer.

A session is used until its keys are about to expire, until `recheck_s` seconds have passed since it was verified, or
until the backend answers that it does not know the key. The policy's maximum age applies when evidence is accepted.
"""

import datetime
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from email.utils import formatdate, parsedate_to_datetime

from adytum.attestation.core.errors import AttestationError, PolicyError
from adytum.attestation.core.limits import LIMITS as ATTESTATION_LIMITS
from adytum.attestation.core.trust import TrustRoots
from adytum.attestation.policy.policy import Policy
from adytum.attestation.reference.release import Release
from adytum.attestation.verifier.document import VerifiedEvidence, verify
from adytum.inference.channel import bhttp, keyconfig, ohttp
from adytum.inference.channel.bhttp import Fields, RequestHead, ResponseHead
from adytum.inference.channel.errors import ChannelError
from adytum.inference.channel.hpke import KemId
from adytum.inference.channel.keyconfig import KeyConfiguration
from adytum.inference.channel.limits import DEFAULT_LIMITS
from adytum.inference.channel.padding import bucket
from adytum.inference.channel.receipts import digest
from adytum.inference.client.errors import ClientError, NotVerified, RequestRefused
from adytum.inference.client.origin import Origin
from adytum.inference.client.reader import ANSWER_LIMITS, Expected, ResponseReader

KEMS = {"mlkem768-x25519": KemId.MLKEM768_X25519, "x25519": KemId.X25519}
"""Names of the KEMs, best first."""
RECHECK_S = 600.0
"""Seconds after which the client asks for evidence again."""
EXPIRY_MARGIN_S = 60
"""Keys are not used in the last seconds of their life, because a request takes time to arrive."""
DOCUMENT_LIMIT = ATTESTATION_LIMITS.document
SEALED_HEADERS = {
    "content-type": ohttp.CHUNKED.request,
    "accept": ohttp.CHUNKED.response,
    # RFC 10036: intermediaries should not buffer.
    "incremental": "?1",
}

_ATTESTATION_PATH = "/.well-known/attestation?nonce="
_SAME_DATE_S = 2.0
"""A date has whole seconds: a smaller difference means nothing."""
_PIECE = 16_384
"""Plaintext bytes per chunk of a request: every receiver of chunked OHTTP has to accept this size."""
_GATEWAY_PATH = re.compile(r"/(?!/)[\x21-\x22\x24-\x7e]*")  # No fragment, no second authority.
# Fields about this hop only (RFC 9110, 7.6.1), the outer message, or the browser that talks to the proxy.
_OUTER = frozenset(
    b"host connection keep-alive proxy-connection proxy-authenticate proxy-authorization proxy-authentication-info te "
    b"trailer transfer-encoding upgrade content-length accept-encoding expect cookie origin referer forwarded via "
    b"date x-forwarded-for x-forwarded-host x-forwarded-proto x-real-ip priority".split()
)
_CREDENTIALS = frozenset((b"authorization", b"x-api-key"))


@dataclass(frozen=True)
class Challenge:
    """A nonce that this client made. `target` is the path and query of the evidence for it."""

    nonce: bytes

    @property
    def target(self) -> str:
        return _ATTESTATION_PATH + self.nonce.hex()


@dataclass(frozen=True, repr=False)
class Accepted:
    """Evidence that met the policy, with the document as received."""

    origin: Origin
    nonce: bytes
    document: bytes
    evidence: VerifiedEvidence
    release: Release | None
    """The signed release that the policy requires, if it requires one."""


class Upstream:
    """One backend as the client knows it: its origin, the policy for it, and the session with it, if any.

    `record` is called with accepted evidence before its first use; an exception from it prevents the use. `clock`
    returns Unix seconds.
    """

    def __init__(
        self,
        url: str,
        *,
        policy: Policy,
        trust: TrustRoots | None = None,
        kem: str | None = None,
        recheck_s: float = RECHECK_S,
        clock: Callable[[], float] = time.time,
        record: Callable[[Accepted], None] | None = None,
    ) -> None:
        if kem is not None and kem not in KEMS:
            raise ValueError(f"kem is one of {', '.join(KEMS)}")
        self.origin = Origin.parse(url)
        self._policy = policy
        self._trust = trust if trust is not None else TrustRoots()
        self._kem = kem
        self._recheck_s = recheck_s
        self._clock = clock
        self._record = record
        self._session: Session | None = None
        self._failures: tuple[int, ClientError | None] = (0, None)

    def session(self, unwanted: "Session | None" = None) -> "Session | None":
        """The session, if it can be used. `unwanted` is one whose key the backend does not know."""
        session = self._session
        if session is None or session is unwanted or not session.usable(self._clock()):
            return None
        return session

    def challenge(self) -> Challenge:
        """A new challenge for each document: a nonce that was used before proves no freshness."""
        return Challenge(os.urandom(32))

    def accept(self, challenge: Challenge, document: bytes) -> "Session":
        """Verifies the document and returns a new session. Raises `NotVerified`, and what `record` raises."""
        now = self._clock()
        self._session = None
        try:
            evidence = verify(
                document,
                nonce=challenge.nonce,
                policy=self._policy,
                trust=self._trust,
                now=datetime.datetime.fromtimestamp(now, datetime.UTC),
            )
        except AttestationError as error:
            raise _not_verified(self.origin, error) from error
        session = Session(
            self.origin,
            evidence,
            kem=self._kem,
            usable_from=now,
            usable_until=now + self._recheck_s,
            clock=self._clock,
        )
        if self._record is not None:
            required = self._policy.release.required
            release = None if required == "none" else required.release
            self._record(Accepted(self.origin, challenge.nonce, document, evidence, release))
        self._session = session
        return session

    # Tasks and threads that wait while another one verifies share its result, including its failure.

    @property
    def ticket(self) -> int:
        """Taken before waiting and passed to `shared`."""
        return self._failures[0]

    def shared(self, ticket: int) -> None:
        """Raises the failure that happened while the holder of `ticket` waited."""
        count, error = self._failures
        if count != ticket and error is not None:
            raise error

    def failed(self, error: ClientError) -> None:
        """Notes that verification failed."""
        self._failures = (self._failures[0] + 1, error)


class Session:
    """A verified backend and the attested key to seal to."""

    def __init__(
        self,
        origin: Origin,
        evidence: VerifiedEvidence,
        *,
        kem: str | None = None,
        usable_from: float,
        usable_until: float,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Raises `NotVerified` if the claims contain no key that this client can use."""
        self.evidence = evidence
        self.gateway_path = evidence.claims.gateway_path
        if not _GATEWAY_PATH.fullmatch(self.gateway_path):
            raise NotVerified(f"{origin}: claims.gateway_path is not a path. Nothing was sent.")
        self._key = _pick(origin, evidence.claims.key_configurations, kem)
        self._receipt_key = evidence.claims.receipt_key
        self._weights = {model.id: model.weights_root for model in evidence.claims.models}
        self._authority = origin.authority
        self._clock = clock
        self._ahead = 0.0
        self._from = usable_from
        self._until = min(usable_until, evidence.claims.keys_expire_at - EXPIRY_MARGIN_S)

    @property
    def kem(self) -> str:
        """The name of the KEM that requests are sealed with."""
        return next(name for name, kem in KEMS.items() if kem is self._key.kem)

    def usable(self, now: float) -> bool:
        """Whether new requests may be sealed. A clock that was set back also makes the session unusable."""
        return self._from <= now < self._until

    def seal(
        self, method: str, path: str, fields: Fields, body: bytes, *, api_key: str | None = None
    ) -> tuple[bytes, ResponseReader]:
        """The sealed request, to be sent as POST to `gateway_path` with `SEALED_HEADERS`, and the reader of its answer.

        `path` includes the query. `api_key` replaces the credentials in `fields`. Raises `RequestRefused`.
        """
        date = formatdate(self._clock() + self._ahead, usegmt=True).encode()
        head = RequestHead(method, "https", self._authority, path, (*_inner_fields(fields, api_key), (b"date", date)))
        try:
            message = bhttp.encode(head, body)
        except ChannelError as error:
            raise RequestRefused(f"The request cannot be sealed: {error}. Nothing was sent.") from error
        if len(message) > DEFAULT_LIMITS.message:
            size = DEFAULT_LIMITS.message // 1024 // 1024
            raise RequestRefused(
                f"The request is larger than the {size} MiB that a backend accepts. Nothing was sent.", status=413
            )
        message += bytes(_padded(len(message)) - len(message))
        sealer = ohttp.RequestSealer(ohttp.CHUNKED, self._key)
        pieces = [sealer.start()]
        last = max(0, len(message) - 1) // _PIECE * _PIECE
        pieces += [sealer.chunk(message[at : at + _PIECE]) for at in range(0, last, _PIECE)]
        pieces.append(sealer.final(message[last:]))
        expected = Expected(
            digest(sealer.enc), digest(message), digest(self._key.encode()), self._receipt_key, self._weights
        )
        return b"".join(pieces), ResponseReader(sealer.response(ANSWER_LIMITS), expected)

    def corrects_date(self, head: ResponseHead) -> bool:
        """Whether the backend refused the request because of its date. The backend's own date is used from now on."""
        said = bhttp.field(head.fields, b"date")
        if head.status != 400 or bhttp.field(head.fields, b"content-type") != b"application/problem+json" or not said:
            return False
        try:
            ahead = parsedate_to_datetime(said.decode("ascii")).timestamp() - self._clock()
        except (ValueError, OverflowError):
            return False
        if abs(ahead - self._ahead) < _SAME_DATE_S:
            return False
        self._ahead = ahead
        return True

    def __repr__(self) -> str:
        return f"Session({self._authority}, {self.kem}, {self.evidence!r})"


def _pick(origin: Origin, encoded: bytes, kem: str | None) -> KeyConfiguration:
    try:
        offered = keyconfig.decode_list(encoded)
    except ChannelError as error:
        raise NotVerified(f"{origin}: claims.key_configurations cannot be used: {error}. Nothing was sent.") from error
    for wanted in KEMS if kem is None else (kem,):
        for configuration in offered:
            if configuration.kem is KEMS[wanted]:
                return configuration
    raise NotVerified(
        f"{origin}: claims.key_configurations has no key for {kem}. Nothing was sent. Leave the KEM unset to use the "
        "best one that the backend offers."
    )


def _inner_fields(fields: Fields, api_key: str | None) -> Fields:
    named = [(name.lower(), value) for name, value in fields]
    dropped = {word.strip().lower() for name, value in named if name == b"connection" for word in value.split(b",")}
    dropped |= _OUTER | (_CREDENTIALS if api_key is not None else frozenset())
    kept = [(name, value) for name, value in named if name not in dropped and not name.startswith(b"sec-")]
    if api_key is not None:
        kept.append((b"authorization", b"Bearer " + api_key.encode()))
    return tuple(kept)


def _padded(length: int) -> int:
    padded = bucket(length)
    if padded - length > DEFAULT_LIMITS.padding:
        # Above 16 MiB a bucket can be wider than the padding that a receiver accepts.
        padded = -(-length // DEFAULT_LIMITS.padding) * DEFAULT_LIMITS.padding
    return padded


def _not_verified(origin: Origin, error: AttestationError) -> NotVerified:
    step = getattr(error, "step", None)
    where = f"step {int(step)} ({step.title})" if step is not None else type(error).__name__
    text = str(error)
    text += "" if text.endswith((".", "?")) else "."
    if isinstance(error, PolicyError):
        where += f", claim {error.claim}"
        advice = "If you trust this backend as it is, change your policy; otherwise ask its operator."
    else:
        advice = "Ask the backend's operator, and do not use it until then."
    return NotVerified(f"{origin} is not verified: {where}: {text} Nothing was sent. {advice}", error)
