"""What vendors sign about devices, fetched over the network and cached.

A getter never fetches. It returns what is in the cache, or notes the wish and raises. `refresh`, which a background
task calls, fetches what was wished for and what will expire. So no client's request waits for a vendor, and the number
of requests to a vendor depends on the certificates and not on the clients (AMD limits requests per address).
"""

import base64
import binascii
import contextlib
import datetime
import http.client
import ipaddress
import json
import socket
import ssl
import threading
import time
import urllib.parse
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Literal, Protocol

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509 import ocsp

from adytum.attestation.core.certificates import load_all
from adytum.attestation.core.errors import AttestationError, CollectionError, EvidenceError, NotThereYet
from adytum.attestation.core.limits import LIMITS
from adytum.attestation.snp.report import SnpReport, tcb_levels

AMD_KDS = "https://kdsintf.amd.com"
AZURE_IMDS = "http://169.254.169.254"
NVIDIA_RIM = "https://rim.attestation.nvidia.com"
NVIDIA_OCSP = "https://ocsp.ndis.nvidia.com"
_LEVELS = (
    ("fmc", "fmcSPL"),
    ("bootloader", "blSPL"),
    ("tee", "teeSPL"),
    ("snp", "snpSPL"),
    ("microcode", "ucodeSPL"),
)
"""Components and their names in the address of a VCEK, in its order."""
_DAY = 86_400.0
_LONGEST = _DAY / 2
"""Seconds after which everything is fetched again, however long it is valid: it may be revoked or renewed."""
_FIRST_RETRY, _LAST_RETRY = 60.0, 3600.0


@dataclass(frozen=True)
class Request:
    """One request to a vendor."""

    url: str
    headers: tuple[tuple[str, str], ...] = ()
    body: bytes | None = None
    """If there is one, the request is a POST."""


class FetchFailed(Exception):
    """`retry_after`: seconds that the server asked to wait, else 0. `whole_host`: the server would refuse other
    requests too, or cannot be reached."""

    def __init__(self, message: str, retry_after: float = 0.0, whole_host: bool = False) -> None:
        super().__init__(message)
        self.retry_after = retry_after
        self.whole_host = whole_host


class Fetch(Protocol):
    """Carries a request out. Raises `FetchFailed`."""

    def __call__(self, request: Request) -> bytes: ...


@dataclass
class _Pause:
    """How long not to ask again. It doubles with each failure in a row."""

    failures: int = 0
    until: float = 0.0
    problem: str = ""

    def longer(self, now: float, problem: str, at_least: float) -> None:
        wait = min(_FIRST_RETRY * 2 ** min(self.failures, 16), _LAST_RETRY)
        self.failures += 1
        self.until = now + max(wait, min(at_least, _DAY))
        self.problem = problem


@dataclass
class _Wish:
    """One thing to fetch: the request, and the answer once it is there."""

    request: Request
    check: Callable[[bytes], float]
    """Returns when the answer expires, seconds since 1970. Raises `EvidenceError` for an unusable answer."""
    data: bytes | None = None
    expires: float = 0.0
    due: float = 0.0
    """When to fetch next, unless there is a pause."""
    pause: _Pause = field(default_factory=_Pause)


@dataclass
class VendorCache:
    """What vendors sign, fetched and kept. Their addresses are arguments, so that a mirror or a test can stand in."""

    fetch: Fetch
    clock: Callable[[], float] = time.time
    amd: str = AMD_KDS
    azure: str = AZURE_IMDS
    nvidia_rim: str = NVIDIA_RIM
    nvidia_ocsp: str = NVIDIA_OCSP
    entries: int = 256
    """The largest number of answers kept; the one requested longest ago is evicted first."""
    size: int = LIMITS.cached
    """The largest number of bytes kept, of all answers together."""
    _wishes: "OrderedDict[Request, _Wish]" = field(default_factory=OrderedDict, repr=False)
    _hosts: dict[str, _Pause] = field(default_factory=dict, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)
    _refreshing: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def amd_certificates(self, report: SnpReport) -> tuple[bytes, ...]:
        """VCEK, ASK, ARK (DER) for a report of version 3 or later. Raises `CollectionError` while they are missing."""
        if report.signing_key != "vcek" or report.product is None:
            raise CollectionError(
                "AMD's service has certificates only for VCEKs, by product; the host has to send those of a "
                f"{report.signing_key} in a report of version {report.version}"
            )
        if not any(report.chip_id):
            raise CollectionError(
                "the host hides the chip's id (MASK_CHIP_ID), so AMD's service cannot be asked for its certificate"
            )
        product = report.product
        levels = tcb_levels(product, report.reported_tcb)
        query = "&".join(f"{name}={levels[part]:02d}" for part, name in _LEVELS if part in levels)
        hwid = report.chip_id[:8] if product == "Turin" else report.chip_id
        key = Request(f"{self.amd}/vcek/v1/{product}/{hwid.hex()}?{query}")
        # Both are wished for before a missing one raises, so that one refresh fetches both.
        self._wish(key, _one_certificate)
        chain = self.amd_chain(product, "vcek")
        return (*_ders(load_all(self._get(key, _one_certificate), "the VCEK")), *chain)

    def amd_chain(self, product: str, kind: Literal["vcek", "vlek"]) -> tuple[bytes, ...]:
        """ASK or ASVK, then ARK (DER). Raises `CollectionError` while they are missing."""
        data = self._get(Request(f"{self.amd}/{kind}/v1/{product}/cert_chain"), _two_certificates)
        return _ders(load_all(data, "the chain"))

    def amd_crl(self, product: str) -> bytes:
        """The list of revoked certificates of a product line, DER. Raises `CollectionError` while it is missing."""
        return self._get(Request(f"{self.amd}/vcek/v1/{product}/crl"), _crl)

    def azure_certificates(self) -> tuple[bytes, ...]:
        """VCEK, ASK, ARK (DER) of this Azure machine's host. Raises `CollectionError` while they are missing."""
        address = f"{self.azure}/metadata/THIM/amd/certification"
        return _ders(_azure(self._get(Request(address, (("Metadata", "true"),)), _azure_expiry)))

    def rim(self, name: str) -> bytes:
        """NVIDIA's manifest of that name, XML. Raises `CollectionError` while it is missing."""
        request = Request(f"{self.nvidia_rim}/v1/rim/{urllib.parse.quote(name, safe='')}")
        return _rim(self._get(request, _rim_expiry))

    def ocsp(self, request: bytes) -> bytes:
        """NVIDIA's OCSP answer to a DER request. Raises `CollectionError` while it is missing."""
        headers = (("Content-Type", "application/ocsp-request"),)
        return self._get(Request(f"{self.nvidia_ocsp}/", headers, request), partial(_ocsp, request))

    def refresh(self) -> None:
        """Fetches what is due, one after another. A second call waits for the first, so that everything due has been
        tried when it returns. A vendor's failure raises nothing: it is tried again later, and an old answer stays
        until it expires."""
        with self._refreshing:
            now = self.clock()
            with self._lock:
                due = [wish for wish in self._wishes.values() if max(wish.due, wish.pause.until) <= now]
            # Those that never failed go first, so that one failing request does not delay the others to its host.
            for wish in sorted(due, key=lambda wish: wish.pause.failures):
                self._fetch(wish, self._hosts.setdefault(_host(wish.request), _Pause()))

    def _fetch(self, wish: _Wish, host: _Pause) -> None:
        if host.until > self.clock():
            return
        try:
            data = self.fetch(wish.request)
            expires = wish.check(data)
            if expires <= self.clock():
                raise EvidenceError("its answer has expired; is this machine's clock right?")
        except FetchFailed as error:
            with self._lock:
                for pause in (wish.pause, host) if error.whole_host else (wish.pause,):
                    pause.longer(self.clock(), str(error), error.retry_after)
            return
        except AttestationError as error:
            with self._lock:
                wish.pause.longer(self.clock(), f"{_host(wish.request)}: {error}", 0.0)
            return
        now = self.clock()
        with self._lock:
            wish.data, wish.expires = data, expires
            wish.due = now + min(max((expires - now) / 2, _FIRST_RETRY), _LONGEST)
            wish.pause = _Pause()
            self._hosts[_host(wish.request)] = _Pause()
            self._evict()

    def _get(self, request: Request, check: Callable[[bytes], float]) -> bytes:
        wish = self._wish(request, check)
        with self._lock:
            if wish.data is not None and wish.expires > self.clock():
                return wish.data
            host = _host(request)
            problem = wish.pause.problem or self._hosts.get(host, _Pause()).problem
        raise NotThereYet(f"{problem or f'{host} has not answered yet'}; it is fetched in the background")

    def _wish(self, request: Request, check: Callable[[bytes], float]) -> _Wish:
        with self._lock:
            wish = self._wishes.setdefault(request, _Wish(request, check))
            self._wishes.move_to_end(request)
            self._evict()
            return wish

    def _evict(self) -> None:
        kept = sum(len(wish.data or b"") for wish in self._wishes.values())
        while len(self._wishes) > self.entries or kept > self.size:
            kept -= len(self._wishes.popitem(last=False)[1].data or b"")


def https(request: Request, timeout: float = 20.0) -> bytes:
    """The production `Fetch`: TLS verified, no redirects, the answer bounded in bytes and, once connected, in seconds.

    Plain HTTP goes only to link-local addresses, where a cloud's metadata service is, and to this machine itself.
    """
    try:
        parts = urllib.parse.urlsplit(request.url)
        path = f"{parts.path}?{parts.query}" if parts.query else parts.path
        connection = _connection(parts, timeout)
    except (ValueError, http.client.HTTPException) as error:
        raise FetchFailed("the vendor's address cannot be used") from error
    host = parts.netloc
    # A socket's timeout is per read: a server that sends a byte now and then would never reach it.
    cut = threading.Timer(timeout, _cut, (connection,))
    cut.daemon = True
    data = b""
    with contextlib.closing(connection):
        try:
            connection.connect()
            deadline = time.monotonic() + timeout
            cut.start()
            connection.request("GET" if request.body is None else "POST", path, request.body, dict(request.headers))
            answer = connection.getresponse()
            if answer.status != 200:
                wait = _seconds(answer.getheader("Retry-After"))
                raise FetchFailed(f"{host} answered {answer.status}", wait, answer.status in (429, 503))
            while part := answer.read1(65_536):
                data += part
                if len(data) > LIMITS.fetched or time.monotonic() > deadline:
                    break
            # Checked again after the loop: headers that were cut off look like headers that ended.
            if len(data) > LIMITS.fetched or time.monotonic() >= deadline:
                raise FetchFailed(f"{host} sends too much or too slowly")
            if answer.length:
                raise FetchFailed(f"{host} sent less than it announced")
        except (OSError, http.client.HTTPException, ValueError) as error:
            unreachable = isinstance(error, OSError)
            raise FetchFailed(f"{host} cannot be read: {type(error).__name__}", whole_host=unreachable) from error
        finally:
            cut.cancel()
    return data


def _connection(parts: urllib.parse.SplitResult, timeout: float) -> http.client.HTTPConnection:
    if parts.scheme == "https":
        return http.client.HTTPSConnection(parts.netloc, timeout=timeout, context=ssl.create_default_context())
    address = ipaddress.ip_address(parts.hostname or "")
    if parts.scheme != "http" or not (address.is_link_local or address.is_loopback):
        raise ValueError("HTTP without TLS to another machine")
    return http.client.HTTPConnection(parts.netloc, timeout=timeout)


def _cut(connection: http.client.HTTPConnection) -> None:
    sock: socket.socket | None = connection.sock
    if sock is not None:
        with contextlib.suppress(OSError):
            # Not TLS's own shutdown, which would discard the reading thread's state.
            socket.socket.shutdown(sock, socket.SHUT_RDWR)


def _seconds(value: str | None) -> float:
    try:
        return max(0.0, float(value or 0))
    except ValueError:
        return _LAST_RETRY  # A date; an hour is close enough.


def _ders(certificates: tuple[x509.Certificate, ...]) -> tuple[bytes, ...]:
    return tuple(certificate.public_bytes(Encoding.DER) for certificate in certificates)


def _until(certificates: tuple[x509.Certificate, ...], count: int) -> float:
    if len(certificates) != count:
        raise EvidenceError(f"{count} certificates were expected, {len(certificates)} came")
    return min(certificate.not_valid_after_utc.timestamp() for certificate in certificates)


def _one_certificate(data: bytes) -> float:
    return _until(load_all(data, "the VCEK"), 1)


def _two_certificates(data: bytes) -> float:
    return _until(load_all(data, "the chain"), 2)


def _crl(data: bytes) -> float:
    try:
        until: datetime.datetime | None = x509.load_der_x509_crl(data).next_update_utc
    except Exception as error:  # The library's errors for odd lists have no common base.
        raise EvidenceError("not a list of revoked certificates") from error
    if until is None:
        raise EvidenceError("a list of revoked certificates without an expiry")
    return until.timestamp()


def _ocsp(request: bytes, data: bytes) -> float:
    try:
        answer = ocsp.load_der_ocsp_response(data)
        until = answer.next_update_utc
        same = answer.serial_number == ocsp.load_der_ocsp_request(request).serial_number
    except Exception as error:  # An answer without a status raises late, with another error.
        raise EvidenceError("not an OCSP answer") from error
    if not same:
        raise EvidenceError("an OCSP answer about another certificate")
    if until is None:
        raise EvidenceError("an OCSP answer without an expiry")
    return until.timestamp()


def _azure(data: bytes) -> tuple[x509.Certificate, ...]:
    try:
        value = json.loads(data)
        texts = (value["vcekCert"], value["certificateChain"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise EvidenceError("not the metadata service's certificates") from error
    if not all(isinstance(text, str) and text.isascii() for text in texts):
        raise EvidenceError("not the metadata service's certificates")
    return tuple(found for text in texts for found in load_all(text.encode(), "the metadata service's answer"))


def _azure_expiry(data: bytes) -> float:
    return _until(_azure(data), 3)


def _rim(data: bytes) -> bytes:
    try:
        return base64.b64decode(json.loads(data)["rim"], validate=True)
    except (ValueError, KeyError, TypeError, binascii.Error, RecursionError) as error:
        raise EvidenceError("not a manifest from NVIDIA's service") from error


def _rim_expiry(data: bytes) -> float:
    # Imported here, so that machines without GPUs do not need lxml.
    from adytum.attestation.nvidia.rim import Rim

    return Rim.parse(_rim(data)).valid_until.timestamp()


def _host(request: Request) -> str:
    return request.url.partition("://")[2].partition("/")[0]
