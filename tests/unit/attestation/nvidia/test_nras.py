"""NRAS verdicts: the real one as far as it can be checked, and a fake service's with one thing wrong in each."""

import base64
import contextlib
import datetime
import hashlib
import json
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given, settings
from hypothesis import strategies as st

from adytum.attestation.core.certificates import load_all
from adytum.attestation.core.checks import Checks
from adytum.attestation.core.errors import AttestationError, EvidenceError
from adytum.attestation.core.limits import LIMITS
from adytum.attestation.nvidia.nras import ISSUER, VerifiedNras, check_devices, verify_nras
from tests.unit.attestation.nvidia.authority import NOW, Authority, FakeGpu, new_key
from tests.unit.attestation.nvidia.rim_authority import FakeNras, base64url, detached, refused

NONCE = bytes(range(32))
HOUR = datetime.timedelta(hours=1)
SECOND = datetime.timedelta(seconds=1)
SERVICE = FakeNras()
JWKS = SERVICE.jwks()


def verify(answer: bytes, jwks: bytes = JWKS, *, nonce: bytes = NONCE, now: datetime.datetime = NOW) -> VerifiedNras:
    return verify_nras(answer, jwks, nonce=nonce, now=now, checks=Checks())


# The real one: its key is not archived, so its signature stays unchecked


def real(vectors: Path) -> tuple[bytes, dict[str, object]]:
    folder = vectors / "nvidia-gpu" / "nras"
    claims = json.loads((folder / "hopperClaimsv3_decoded.json").read_text())["GPU-0"]
    return (folder / "hopperClaimsv3_detached_eat.json").read_bytes(), claims


def test_the_real_verdict_names_a_key_that_is_not_here(vectors: Path) -> None:
    answer, _ = real(vectors)
    at = datetime.datetime(2025, 6, 11, 0, 40, tzinfo=datetime.UTC)
    nonce = bytes.fromhex("931d8dd0add203ac3d8b4fbde75e115278eefcdceac5b87671a748f32364dfcb")
    for jwks in (JWKS, b'{"keys":[]}'):
        with refused("nras.key", "fetch the set again"):
            verify(answer, jwks, nonce=nonce, now=at)


def test_the_real_verdict_under_another_key_of_that_name(vectors: Path) -> None:
    """So the signature is what is checked, and before anything that the token says."""
    answer, _ = real(vectors)
    (_, overall), _ = json.loads(answer)
    header = json.loads(base64.urlsafe_b64decode(overall.split(".")[0] + "=="))
    assert header == {"kid": header["kid"], "alg": "ES384"}
    with refused("nras.signature"):
        verify(answer, SERVICE.jwks(kid=header["kid"]))


def test_a_fake_verdict_has_the_form_of_the_real_one(vectors: Path) -> None:
    """The real claims, re-signed by the fake service, verify at their time and name the GPU of the real report."""
    answer, claims = real(vectors)
    (_, overall), tokens = json.loads(answer)
    said = json.loads(base64.urlsafe_b64decode(overall.split(".")[1] + "=="))
    # The real digest binds the real token.
    assert said["submods"] == {"GPU-0": ["DIGEST", ["SHA-256", hashlib.sha256(tokens["GPU-0"].encode()).hexdigest()]]}
    assert json.loads(base64.urlsafe_b64decode(tokens["GPU-0"].split(".")[1] + "==")) == claims
    token = SERVICE.token(claims)
    digest = ["DIGEST", ["SHA-256", hashlib.sha256(token.encode()).hexdigest()]]
    again = detached(SERVICE.token({**said, "submods": {"GPU-0": digest}}), {"GPU-0": token})
    now = datetime.datetime.fromtimestamp(said["iat"], datetime.UTC)
    verdict = verify(again, nonce=bytes.fromhex(said["eat_nonce"]), now=now)
    assert verdict.gpus == (claims,)
    assert verdict.valid_until == now + HOUR
    chain = load_all((vectors / "nvidia-gpu" / "h100-550.90.07-full" / "chain.pem").read_bytes(), "the chain")
    check_devices(verdict, chain[:1], Checks())
    with refused("nras.device"):
        check_devices(verdict, chain[1:2], Checks())


# A fake service


def test_a_good_verdict() -> None:
    checks = Checks()
    verdict = verify_nras(SERVICE.answer(NONCE), JWKS, nonce=NONCE, now=NOW, checks=checks)
    assert [gpu["measres"] for gpu in verdict.gpus] == ["success"]
    assert verdict.valid_until == NOW + HOUR - 60 * SECOND
    assert [check.code for check in checks.passed] == [
        "nras.signature",
        "nras.validity",
        "nras.nonce",
        "nras.digest",
        "nras.result",
    ]
    many = [SERVICE.gpu(NONCE, ueid=str(place)) for place in range(LIMITS.gpus)]
    assert len(verify(SERVICE.answer(NONCE, *many)).gpus) == LIMITS.gpus
    with pytest.raises(EvidenceError, match="1 to 16 GPUs"):
        verify(SERVICE.answer(NONCE, *many, SERVICE.gpu(NONCE)))


def test_keys_beside_the_right_one_do_not_disturb() -> None:
    other = FakeNras("other")
    rsa = {"kty": "RSA", "kid": "rsa", "n": "AQAB", "e": "AQAB"}
    p256 = {"kty": "EC", "crv": "P-256", "kid": SERVICE.kid, "x": "AA", "y": "AA"}
    jwks = json.dumps({"keys": [other.jwk(), rsa, p256, 7, SERVICE.jwk()]}).encode()
    assert verify(SERVICE.answer(NONCE), jwks).gpus


def answer_with(overall: object = None, tokens: object = None) -> bytes:
    """A good verdict's overall token and GPUs' tokens, either replaced."""
    (_, good), gpus = json.loads(SERVICE.answer(NONCE))
    return detached(good if overall is None else overall, gpus if tokens is None else tokens)


GOOD_OVERALL = json.loads(SERVICE.answer(NONCE))[0][1]


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"{}",
        b"[]",
        b"null",
        b"[" * 100_000,
        b"\xff",
        b'"\xed\xa0\x80"',
        json.dumps([["JWT", GOOD_OVERALL]]).encode(),
        json.dumps([["JWT"], {}]).encode(),
        json.dumps([["JWS", GOOD_OVERALL], {"GPU-0": GOOD_OVERALL}]).encode(),
        json.dumps([["JWT", GOOD_OVERALL], {"GPU-0": GOOD_OVERALL}, 1]).encode(),
        # No GPU.
        answer_with(tokens={}),
        answer_with(tokens=[]),
        answer_with(tokens=[GOOD_OVERALL]),
        answer_with(tokens={"GPU-0": None}),
        answer_with(tokens={"GPU-0": {}}),
        answer_with(tokens={"GPU-0": ""}),
        answer_with(tokens={"GPU-0": "a.b"}),
        answer_with(tokens={"GPU-0": "\ud800"}),
        answer_with(overall=7),
        answer_with(overall=""),
        answer_with(overall="..\ud800"),
        answer_with(overall=GOOD_OVERALL + "\N{ZERO WIDTH SPACE}"),
        # Three parts, no more.
        answer_with(overall=f"{GOOD_OVERALL}.{GOOD_OVERALL}"),
        answer_with(overall=GOOD_OVERALL.rpartition(".")[0]),
        # A signature of another length, none, or in another alphabet or padding.
        answer_with(overall=GOOD_OVERALL.rpartition(".")[0] + "."),
        answer_with(overall=GOOD_OVERALL[:-4]),
        answer_with(overall=GOOD_OVERALL + "="),
        answer_with(overall=GOOD_OVERALL.rpartition(".")[0] + "." + "+/" * 64),
        answer_with(overall=GOOD_OVERALL.rpartition(".")[0] + "." + "~" * 128),
        b" " * (LIMITS.collateral + 1),
    ],
)
def test_what_is_no_verdict(answer: bytes) -> None:
    with pytest.raises(EvidenceError):
        verify(answer)


@pytest.mark.parametrize(
    "alg", ["none", "None", "HS256", "HS384", "ES256", "ES512", "RS256", "PS384", "", None, 384, ["ES384"]]
)
def test_no_algorithm_but_one(alg: object) -> None:
    claims = SERVICE.overall(NONCE, {})
    with pytest.raises(EvidenceError, match="ES384"):
        verify(answer_with(overall=SERVICE.token(claims, alg=alg)))
    gpu = SERVICE.token(SERVICE.gpu(NONCE), alg=alg)
    with pytest.raises(EvidenceError, match="ES384"):
        verify(detached(SERVICE.token(SERVICE.overall(NONCE, {"GPU-0": gpu})), {"GPU-0": gpu}))


def test_headers() -> None:
    claims = SERVICE.overall(NONCE, {})
    part = base64url(json.dumps(claims).encode())
    with pytest.raises(EvidenceError):
        verify(answer_with(overall=SERVICE.token(claims, crit=["exp"])))
    for header in ("", "AA", base64url(b"[]"), base64url(b"null"), base64url(b'"ES384"'), base64url(b"{")):
        with pytest.raises(EvidenceError):
            verify(answer_with(overall=SERVICE.sign(header, part)))
    for kid in ("another", "", None, 7, ["a"]):
        with refused("nras.key"):
            verify(answer_with(overall=SERVICE.token(claims, kid=kid)))
    # A key that comes with the token is not one of the set.
    stranger = FakeNras("stranger")
    with refused("nras.key"):
        verify(answer_with(overall=stranger.token(claims, jwk=stranger.jwk())))
    with refused("nras.signature"):
        verify(answer_with(overall=FakeNras().token(claims, jwk=stranger.jwk(), jku="http://127.0.0.1:9/")))


def test_claims_that_are_none() -> None:
    header = base64url(json.dumps({"kid": SERVICE.kid, "alg": "ES384"}).encode())
    for body in (b"", b"[]", b"7", b"{", b"\xff", b"[" * 50_000, b'{"exp":' + b"9" * 5000 + b"}"):
        with pytest.raises(EvidenceError):
            verify(answer_with(overall=SERVICE.sign(header, base64url(body))))


def test_sizes() -> None:
    """White space is JSON, so nothing but the size is wrong."""
    padding = b" " * LIMITS.collateral
    for answer, jwks in ((SERVICE.answer(NONCE) + padding, JWKS), (SERVICE.answer(NONCE), JWKS + padding)):
        with pytest.raises(EvidenceError, match="larger than"):
            verify(answer, jwks)


def test_key_sets() -> None:
    answer = SERVICE.answer(NONCE)
    good = SERVICE.jwk()
    for jwks in (
        b"",
        b"[]",
        b"{}",
        b'{"keys":{}}',
        b'{"keys":null}',
        b"\xff",
        b" " * (LIMITS.collateral + 1),
        SERVICE.jwks(x=None),
        SERVICE.jwks(x="~"),
        SERVICE.jwks(x=base64url(bytes(48))),
        SERVICE.jwks(x=base64url(b"\xff" * 100)),
        SERVICE.jwks(x=good["y"], y=good["x"]),
        SERVICE.jwks(kid=None),
        SERVICE.jwks(kid=7),
        json.dumps({"keys": [good, good]}).encode(),
        json.dumps({"keys": [good, FakeNras(SERVICE.kid).jwk()]}).encode(),
    ):
        with pytest.raises(EvidenceError):
            verify(answer, jwks)
    for jwks in (b'{"keys":[]}', b'{"keys":[7]}', SERVICE.jwks(kty="RSA"), SERVICE.jwks(crv="P-256")):
        with refused("nras.key"):
            verify(answer, jwks)
    # The right name with another key.
    with refused("nras.signature"):
        verify(answer, FakeNras(SERVICE.kid).jwks())
    assert isinstance(SERVICE.key.curve, ec.SECP384R1)


def test_each_token_is_signed() -> None:
    stranger = FakeNras(SERVICE.kid)
    gpu = stranger.token(SERVICE.gpu(NONCE))
    with refused("nras.signature"):
        verify(detached(SERVICE.token(SERVICE.overall(NONCE, {"GPU-0": gpu})), {"GPU-0": gpu}))
    with refused("nras.signature"):
        verify(stranger.answer(NONCE))
    # The claims of one under the signature of another.
    first, second = (SERVICE.token(SERVICE.gpu(NONCE, ueid=name)).split(".") for name in "ab")
    mixed = ".".join((first[0], first[1], second[2]))
    with refused("nras.signature"):
        verify(detached(SERVICE.token(SERVICE.overall(NONCE, {"GPU-0": mixed})), {"GPU-0": mixed}))


def test_issuer() -> None:
    for issuer in (None, "", "https://nras.attestation.nvidia.com.example", f"{ISSUER}/", ISSUER.upper(), [ISSUER]):
        with refused("nras.issuer"):
            verify(SERVICE.answer(NONCE, iss=issuer))
        with refused("nras.issuer"):
            verify(SERVICE.answer(NONCE, SERVICE.gpu(NONCE, iss=issuer)))


def test_times() -> None:
    answer = SERVICE.answer(NONCE)
    issued = NOW - 60 * SECOND
    for now in (issued, issued + HOUR - SECOND):
        assert verify(answer, now=now).valid_until == issued + HOUR
    for now in (issued - SECOND, issued + HOUR, issued + 300 * HOUR, issued - 300 * HOUR):
        with refused("nras.validity"):
            verify(answer, now=now)
    seconds = int(NOW.timestamp())
    for name, value in (("exp", seconds), ("exp", 0), ("exp", -1), ("nbf", seconds + 1), ("iat", seconds + 1)):
        with refused("nras.validity"):
            verify(SERVICE.answer(NONCE, **{name: value}))
        with refused("nras.validity"):
            verify(SERVICE.answer(NONCE, SERVICE.gpu(NONCE, **{name: value})))
    for name in ("exp", "nbf", "iat"):
        odd: object
        for odd in (None, "1", True, 1.5, [], {}):
            with pytest.raises(EvidenceError):
                verify(SERVICE.answer(NONCE, **{name: odd}))
    for beyond in (10**12, 10**18, 10**300):
        with pytest.raises(EvidenceError, match="beyond the calendar"):
            verify(SERVICE.answer(NONCE, exp=beyond))
    # The first to end counts.
    soon = seconds + 5
    assert (
        verify(SERVICE.answer(NONCE, SERVICE.gpu(NONCE), SERVICE.gpu(NONCE, exp=soon))).valid_until == NOW + 5 * SECOND
    )


def test_nonce() -> None:
    answer = SERVICE.answer(NONCE)
    for nonce in (bytes(32), NONCE[::-1], NONCE[:-1], b""):
        with refused("nras.nonce"):
            verify(answer, nonce=nonce)
    for said in (None, "", NONCE.hex()[:-2], NONCE.hex().upper(), [NONCE.hex()], bytes(32).hex()):
        with refused("nras.nonce"):
            verify(SERVICE.answer(NONCE, eat_nonce=said))
        with refused("nras.nonce"):
            verify(SERVICE.answer(NONCE, SERVICE.gpu(NONCE), SERVICE.gpu(NONCE, eat_nonce=said)))


def test_the_tokens_are_those_that_the_verdict_names() -> None:
    one, other = (SERVICE.token(SERVICE.gpu(NONCE, ueid=name)) for name in "12")
    digest = hashlib.sha256(one.encode()).hexdigest()
    named: object
    for named in (
        None,
        {},
        [],
        {"GPU-0": ["DIGEST", ["SHA-256", hashlib.sha256(other.encode()).hexdigest()]]},
        {"GPU-0": ["DIGEST", ["SHA-256", digest.upper()]]},
        {"GPU-0": ["DIGEST", ["SHA-256", digest[:-2]]]},
        {"GPU-0": ["DIGEST", ["SHA-512", hashlib.sha512(one.encode()).hexdigest()]]},
        {"GPU-0": ["DIGEST", ["SHA-256", digest, digest]]},
        {"GPU-0": digest},
        {"GPU-1": ["DIGEST", ["SHA-256", digest]]},
        # One more than there is.
        {"GPU-0": ["DIGEST", ["SHA-256", digest]], "GPU-1": ["DIGEST", ["SHA-256", digest]]},
    ):
        with refused("nras.digest"):
            verify(detached(SERVICE.token(SERVICE.overall(NONCE, {}, submods=named)), {"GPU-0": one}))
    # One more than is named; one for the other.
    overall = SERVICE.token(SERVICE.overall(NONCE, {"GPU-0": one}))
    for tokens in ({"GPU-0": one, "GPU-1": other}, {"GPU-0": other}, {"GPU-1": one}):
        with refused("nras.digest"):
            verify(detached(overall, tokens))


@pytest.mark.parametrize("result", [False, None, "true", 1, "success", []])
def test_the_overall_result(result: object) -> None:
    with refused("nras.result"):
        verify(SERVICE.answer(NONCE, **{"x-nvidia-overall-att-result": result}))


@pytest.mark.parametrize(
    ("claim", "value"),
    [
        *(("measres", value) for value in ("fail", "comparison-fail", "absent", "", None, True)),
        *(("secboot", value) for value in (False, None, "true", 1)),
        *(("dbgstat", value) for value in ("enabled", "disabled-since-boot", "", None, False)),
    ],
)
def test_each_gpus_result(claim: str, value: object) -> None:
    """A good overall result does not stand in for one GPU's."""
    bad = SERVICE.gpu(NONCE, **{claim: value})
    for gpus in ((bad,), (SERVICE.gpu(NONCE), bad), (bad, SERVICE.gpu(NONCE))):
        with refused("nras.result"):
            verify(SERVICE.answer(NONCE, *gpus))
    del bad[claim]
    with refused("nras.result"):
        verify(SERVICE.answer(NONCE, bad))


def test_which_gpus() -> None:
    """Another GPU may have answered the same nonce, and passed."""
    authority = Authority()
    gpus = [FakeGpu(authority).certificates[0] for _ in range(3)]
    claims = [SERVICE.gpu(NONCE, ueid=str(gpu.serial_number)) for gpu in gpus]
    one, two = verify(SERVICE.answer(NONCE, claims[0])), verify(SERVICE.answer(NONCE, *claims[:2]))
    checks = Checks()
    check_devices(one, gpus[:1], checks)
    check_devices(two, gpus[1::-1], checks)
    assert [check.code for check in checks.passed] == ["nras.device"] * 2
    for verdict, leaves in (
        (one, []),
        (one, gpus[1:2]),
        (one, gpus[:2]),
        (one, [gpus[0], gpus[0]]),
        (two, gpus[:1]),
        (two, gpus),
        (two, gpus[1:]),
        (verify(SERVICE.answer(NONCE, SERVICE.gpu(NONCE, ueid=None))), gpus[:1]),
    ):
        with refused("nras.device"):
            check_devices(verdict, leaves, Checks())


# Every change, every end


@pytest.mark.slow
def test_every_character_counts() -> None:
    """Every one of both tokens, changed in two ways; none is irrelevant."""
    answer = SERVICE.answer(NONCE)
    start = answer.index(b"ey")
    assert verify(answer).gpus
    for offset in range(start, len(answer) - 3):
        for bit in (0x01, 0x04):
            changed = answer[:offset] + bytes([answer[offset] ^ bit]) + answer[offset + 1 :]
            with pytest.raises(AttestationError):
                verify(changed)


def test_every_truncation_is_malformed() -> None:
    answer = SERVICE.answer(NONCE)
    for end in range(len(answer)):
        with pytest.raises(EvidenceError):
            verify(answer[:end])
    for end in range(len(JWKS)):
        with pytest.raises(EvidenceError):
            verify(answer, JWKS[:end])
    for tail in (b"x", b"[]", b"\0", answer):
        with pytest.raises(EvidenceError):
            verify(answer + tail)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
NAMES = st.sampled_from(
    ["iss", "iat", "nbf", "exp", "eat_nonce", "submods", "x-nvidia-overall-att-result", "measres", "secboot", "dbgstat"]
)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=100), st.binary(max_size=100))
def test_only_our_error_escapes_from_any_bytes(answer: bytes, jwks: bytes) -> None:
    for given_answer, given_jwks in ((answer, JWKS), (SERVICE.answer(NONCE), jwks)):
        with pytest.raises(EvidenceError):
            verify(given_answer, given_jwks)


@settings(max_examples=300, deadline=None)
@given(NAMES, JSON, st.booleans())
def test_only_our_error_escapes_from_signed_claims(name: str, value: object, overall: bool) -> None:
    changes = {name: value}
    answer = SERVICE.answer(NONCE, **changes) if overall else SERVICE.answer(NONCE, SERVICE.gpu(NONCE, **changes))
    with contextlib.suppress(AttestationError):
        verify(answer)


@settings(max_examples=200, deadline=None)
@given(JSON, JSON)
def test_only_our_error_escapes_from_any_json(first: object, second: object) -> None:
    with pytest.raises(EvidenceError):
        verify(detached(first, second))
    with contextlib.suppress(AttestationError):
        verify(SERVICE.answer(NONCE), json.dumps({"keys": [first, SERVICE.jwk(x=second)]}).encode())


def test_a_key_of_another_curve_is_never_tried() -> None:
    other = new_key(ec.SECP256R1())
    numbers = other.public_key().public_numbers()
    x, y = (base64url(number.to_bytes(32, "big")) for number in (numbers.x, numbers.y))
    with pytest.raises(EvidenceError, match="not on P-384"):
        verify(SERVICE.answer(NONCE), SERVICE.jwks(x=x, y=y))
