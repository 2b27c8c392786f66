"""The vendors' cache when vendors fail, in every way that they can, over real HTTP and TLS."""

import contextlib
import ipaddress
import itertools
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography import x509

from adytum.attestation.collect.vendors import FetchFailed, Request, VendorCache, https
from adytum.attestation.core.limits import LIMITS
from tests.unit.attestation.collect.vendor_case import DAY, GETTERS, HOUR, MINUTE, Case, Clock, missing, ocsp_der
from tests.unit.attestation.vendors import FAILURES, START, YEARS, Vendors, issue, serving, tls_files


@pytest.fixture
def case() -> Iterator[Case]:
    with serving() as (vendors, server):
        yield Case(vendors, server)


# When vendors fail


@pytest.mark.parametrize("mode", FAILURES)
@pytest.mark.parametrize("name", GETTERS)
def test_every_failure_is_a_collection_error_and_passes(case: Case, name: str, mode: str) -> None:
    start, get = GETTERS[name]
    case.vendors.failing[start] = mode
    missing(lambda: get(case.cache))
    case.cache.refresh()
    assert case.server.url.removeprefix("http://") in missing(lambda: get(case.cache))
    assert not any(path.startswith("/elsewhere") for path in case.paths)
    case.vendors.failing.clear()
    case.wait(MINUTE - 1)
    missing(lambda: get(case.cache))
    case.wait(1)
    get(case.cache)


@pytest.mark.parametrize("mode", ["429", "503", "hang-up"])
def test_a_vendor_that_limits_or_is_away_is_left_alone_as_a_whole(case: Case, mode: str) -> None:
    case.vendors.failing["/"] = mode
    for product in ("Milan", "Genoa", "Turin"):
        missing(lambda product=product: case.cache.amd_crl(product))
    case.cache.refresh()
    assert len(case.paths) == 1
    for product in ("Milan", "Genoa", "Turin"):
        assert "has not answered yet" not in missing(lambda product=product: case.cache.amd_crl(product))
    case.wait(MINUTE)
    assert len(case.paths) == 2  # Another one: it has failed less often.
    assert case.paths[0] != case.paths[1]
    case.vendors.failing.clear()
    case.wait(2 * MINUTE)
    for product in ("Milan", "Genoa", "Turin"):
        case.cache.amd_crl(product)


@pytest.mark.parametrize("mode", ["404", "500", "wrong-content", "redirect"])
def test_one_bad_thing_holds_up_nothing_else(case: Case, mode: str) -> None:
    case.vendors.failing["/vcek/v1/Milan/crl"] = mode
    for product in ("Milan", "Genoa"):
        missing(lambda product=product: case.cache.amd_crl(product))
    case.cache.refresh()
    case.cache.amd_crl("Genoa")
    missing(lambda: case.cache.amd_crl("Milan"))


@pytest.mark.parametrize(
    ("retry_after", "seconds"),
    [
        ("", MINUTE),
        ("5", MINUTE),
        ("600", 600.0),
        ("Fri, 02 Jan 2026 00:00:00 GMT", HOUR),
        ("1e300", DAY),
        ("inf", DAY),
        ("nan", MINUTE),
        ("-7", MINUTE),
        ("soon", HOUR),
    ],
)
def test_retry_after_is_respected_for_a_day_at_most(case: Case, retry_after: str, seconds: float) -> None:
    case.vendors.failing["/"], case.vendors.retry_after = "429", retry_after
    missing(lambda: case.cache.amd_crl("Milan"))
    case.cache.refresh()
    case.vendors.failing.clear()
    case.wait(seconds - 1)
    assert len(case.paths) == 1
    case.wait(1)
    assert len(case.paths) == 2
    case.cache.amd_crl("Milan")


def test_pauses_double_up_to_an_hour_and_never_overflow() -> None:
    clock, tries = Clock(), []

    def fetch(request: Request) -> bytes:
        tries.append(clock.now)
        raise FetchFailed("no", whole_host=True)

    cache = VendorCache(fetch, clock)
    missing(lambda: cache.amd_crl("Milan"))
    cache.refresh()
    while len(tries) < 1100:
        clock.now += MINUTE
        cache.refresh()
    gaps = [after - before for before, after in itertools.pairwise(tries)]
    assert gaps[:7] == [60, 120, 240, 480, 960, 1920, 3600]
    assert set(gaps[7:]) == {3600}


@pytest.mark.parametrize("mode", ["404", "429"])
def test_a_success_ends_the_growth_of_the_pauses(case: Case, mode: str) -> None:
    missing(lambda: case.cache.ocsp(ocsp_der()))
    case.vendors.failing["/"] = mode
    case.cache.refresh()
    case.wait(MINUTE)
    case.vendors.failing.clear()
    case.wait(2 * MINUTE)
    case.cache.ocsp(ocsp_der())
    case.vendors.failing["/"] = mode
    case.wait(12 * HOUR)
    assert len(case.paths) == 4
    case.wait(MINUTE)
    assert len(case.paths) == 5


@pytest.mark.parametrize("mode", ["drip-headers", "drip-body"])
def test_a_server_that_sends_a_little_now_and_then_is_left(case: Case, mode: str) -> None:
    case.vendors.failing["/"], case.timeout = mode, 0.4
    missing(lambda: case.cache.amd_crl("Milan"))
    before = time.monotonic()
    case.cache.refresh()
    # The server would go on until the test ends.
    assert 0.3 < time.monotonic() - before < 20
    missing(lambda: case.cache.amd_crl("Milan"))


def test_an_answer_is_bounded(case: Case) -> None:
    for mode in ("huge", "endless"):
        case.vendors.failing["/"] = mode
        with pytest.raises(FetchFailed, match="too much"):
            https(Request(f"{case.server.url}/vcek/v1/Milan/crl"))
    case.vendors.failing.clear()
    case.vendors.recorded = {"/most": bytes(LIMITS.fetched), "/more": bytes(LIMITS.fetched + 1)}
    assert https(Request(f"{case.server.url}/most")) == bytes(LIMITS.fetched)
    with pytest.raises(FetchFailed):
        https(Request(f"{case.server.url}/more"))


def test_nobody_listens() -> None:
    with serving() as (_, server):
        url = server.url
    with pytest.raises(FetchFailed, match="ConnectionRefusedError") as caught:
        https(Request(f"{url}/x"))
    assert caught.value.whole_host


# TLS


def test_tls_is_verified(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = issue("a web authority")
    (tmp_path / "roots.pem").write_bytes(root.pem)
    here = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    elsewhere = x509.SubjectAlternativeName([x509.DNSName("kdsintf.amd.com")])
    good = issue("127.0.0.1", root, alternative=here, ca=False)
    cases = {
        "good": (good, root, True),
        "another name": (issue("127.0.0.1", root, alternative=elsewhere, ca=False), root, False),
        "expired": (issue("127.0.0.1", root, alternative=here, ca=False, until=START - YEARS / 2), root, False),
        "unknown issuer": (issue("127.0.0.1", other := issue("a web authority"), alternative=here), other, False),
    }
    for name, (leaf, issuer, accepted) in cases.items():
        with serving(Vendors(recorded={"/x?y=z": b"found"}), tls_files(tmp_path, leaf, issuer)) as (vendors, server):
            request = Request(f"{server.url}/x?y=z")
            # Without the environment's say the machine's own roots count, which have none of these.
            with pytest.raises(FetchFailed, match="SSLCertVerificationError"):
                https(request)
            with monkeypatch.context() as context:
                context.setenv("SSL_CERT_FILE", str(tmp_path / "roots.pem"))
                if accepted:
                    assert https(request) == b"found"
                else:
                    with pytest.raises(FetchFailed, match="SSLCertVerificationError"):
                        https(request)
            assert len(vendors.asked) == accepted, name


@pytest.mark.parametrize("mode", ["truncated", "drip-headers", "drip-body", "redirect", "endless"])
def test_failures_over_tls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    root = issue("a web authority")
    here = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    leaf = issue("127.0.0.1", root, alternative=here, ca=False)
    (tmp_path / "roots.pem").write_bytes(root.pem)
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "roots.pem"))
    with serving(Vendors(failing={"/": mode}), tls_files(tmp_path, leaf, root)) as (vendors, server):
        before = time.monotonic()
        with pytest.raises(FetchFailed):
            https(Request(f"{server.url}/vcek/v1/Milan/crl"), 0.5)
        # The server would go on until the test ends.
        assert time.monotonic() - before < 20
        assert len(vendors.asked) == 1


@pytest.mark.parametrize(
    "url",
    [
        "http://kdsintf.amd.com/x",
        "http://192.0.2.1/x",
        "http://localhost/x",
        "http://8.8.8.8@127.0.0.1.example/x",
        "ftp://127.0.0.1/x",
        "file:///etc/passwd",
        "/x",
        "",
        "https://[::1/x",
        "https://127.0.0.1:port/x",
    ],
)
def test_addresses_that_are_not_asked(url: str) -> None:
    with pytest.raises(FetchFailed, match="address cannot be used"):
        https(Request(url))
    cache = VendorCache(https, Clock(), amd=url.removesuffix("/x"))
    missing(lambda: cache.amd_crl("Milan"))
    cache.refresh()
    missing(lambda: cache.amd_crl("Milan"))


# The background task beside everything else


def test_one_refresh_at_a_time_for_which_others_wait_and_getters_do_not() -> None:
    inside, go, fetched = threading.Event(), threading.Event(), []

    def fetch(request: Request) -> bytes:
        fetched.append(request.url)
        inside.set()
        assert go.wait(10)
        return Vendors()._crl("Milan")

    cache = VendorCache(fetch, Clock())
    missing(lambda: cache.amd_crl("Milan"))
    first, second = threading.Thread(target=cache.refresh), threading.Thread(target=cache.refresh)
    first.start()
    assert inside.wait(10)
    second.start()
    before = time.monotonic()
    missing(lambda: cache.amd_crl("Milan"))
    missing(lambda: cache.amd_crl("Genoa"))
    # The fetch under way waits for ten seconds.
    assert time.monotonic() - before < 8
    second.join(0.2)
    assert second.is_alive()  # When it returns, what was due has been tried.
    go.set()
    first.join(10)
    second.join(10)
    cache.amd_crl("Milan")
    cache.amd_crl("Genoa")  # Wished for in between.
    assert len(fetched) == 2


def test_a_fault_of_the_program_does_not_block_later_refreshes() -> None:
    broken = True

    def fetch(request: Request) -> bytes:
        if broken:
            raise ZeroDivisionError
        return Vendors()._crl("Milan")

    cache = VendorCache(fetch, Clock())
    missing(lambda: cache.amd_crl("Milan"))
    with contextlib.suppress(ZeroDivisionError):
        cache.refresh()
    broken = False
    cache.refresh()
    cache.amd_crl("Milan")
