"""What vendors sign about devices, fetched over the network: the only code of this package that uses one.

A getter never fetches. It gives what is in the cache, or notes the wish and raises; `refresh`, which a background task
calls, fetches what was wished for and what will expire. So no client's request ever waits for a vendor, and a vendor
sees as many requests as there are certificates, not as there are clients (AMD limits them per address).
"""

import base64
import binascii
import contextlib
import datetime
import http.client
import json
import ssl
import threading
import time
import urllib.parse
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509 import ocsp

from attestation.certificates import load_all
from attestation.errors import CollectionError, EvidenceError
from attestation.limits import LIMITS
from attestation.snp.report import SnpReport, tcb_levels

AMD_KDS = "https://kdsintf.amd.com"
AZURE_IMDS = "http://169.254.169.254"
NVIDIA_RIM = "https://rim.attestation.nvidia.com"
NVIDIA_OCSP = "https://ocsp.ndis.nvidia.com"
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
    """A POST where there is one."""


class FetchFailed(Exception):
    """`retry_after`: seconds that the server asked to wait; 0 where it did not say."""

    def __init__(self, message: str, retry_after: float = 0.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class Fetch(Protocol):
    """Carries a request out. Raises `FetchFailed`."""

    def __call__(self, request: Request) -> bytes: ...


@dataclass
class _Wish:
    """One thing to have: how to get it, and what is there."""

    request: Request
    check: Callable[[bytes], float]
    """Raises `EvidenceError` for what is not it; else when it expires, seconds since 1970."""
    data: bytes | None = None
    expires: float = 0.0
    due: float = 0.0
    """When to fetch next."""
    failures: int = 0


@dataclass
class Collateral:
    """The cache. The vendors' addresses are arguments so that a mirror, or a test, can stand in."""

    fetch: Fetch
    clock: Callable[[], float] = time.time
    amd: str = AMD_KDS
    azure: str = AZURE_IMDS
    nvidia_rim: str = NVIDIA_RIM
    nvidia_ocsp: str = NVIDIA_OCSP
    entries: int = 256
    """Things kept at most; the one that was asked for longest ago goes first."""
    _wishes: "OrderedDict[Request, _Wish]" = field(default_factory=OrderedDict, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def amd_certificates(self, report: SnpReport) -> tuple[bytes, ...]:
        """VCEK, ASK, ARK (DER) for a report of version 3 or later. Raises `CollectionError` until they are there."""
        if report.signing_key != "vcek" or report.product is None:
            raise CollectionError(
                "AMD's service has certificates for VCEKs and by product only; the host has to give those of a "
                f"{report.signing_key} in a report of version {report.version}"
            )
        product = report.product
        levels = tcb_levels(product, report.reported_tcb)
        names = (
            ("fmc", "fmcSPL"),
            ("bootloader", "blSPL"),
            ("tee", "teeSPL"),
            ("snp", "snpSPL"),
            ("microcode", "ucodeSPL"),
        )
        query = "&".join(f"{name}={levels[part]:02d}" for part, name in names if part in levels)
        hwid = report.chip_id[:8] if product == "Turin" else report.chip_id
        vcek = self._get(Request(f"{self.amd}/vcek/v1/{product}/{hwid.hex()}?{query}"), _one_certificate)
        chain = self._get(Request(f"{self.amd}/vcek/v1/{product}/cert_chain"), _two_certificates)
        certificates = (*load_all(vcek, "the VCEK"), *load_all(chain, "the chain"))
        return tuple(certificate.public_bytes(Encoding.DER) for certificate in certificates)

    def amd_crl(self, product: str) -> bytes:
        """The list of revoked certificates of a product line, DER. Raises `CollectionError` while it is not there."""
        return self._get(Request(f"{self.amd}/vcek/v1/{product}/crl"), _crl)

    def azure_certificates(self) -> tuple[bytes, ...]:
        """VCEK, ASK, ARK (DER) of this Azure machine's host. Raises `CollectionError` while they are not there."""
        address = f"{self.azure}/metadata/THIM/amd/certification"
        found = _azure(self._get(Request(address, (("Metadata", "true"),)), _azure_expiry))
        return tuple(certificate.public_bytes(Encoding.DER) for certificate in found)

    def rim(self, name: str) -> bytes:
        """NVIDIA's manifest of that name, XML. Raises `CollectionError` while it is not there."""
        request = Request(f"{self.nvidia_rim}/v1/rim/{urllib.parse.quote(name, safe='')}")
        return _rim(self._get(request, _rim_expiry))

    def ocsp(self, request: bytes) -> bytes:
        """NVIDIA's OCSP answer to a DER request. Raises `CollectionError` while it is not there."""
        headers = (("Content-Type", "application/ocsp-request"),)
        return self._get(Request(f"{self.nvidia_ocsp}/", headers, request), _ocsp)

    def refresh(self) -> None:
        """Fetches what is due, one after another. Never raises for a vendor: what failed is tried again later."""
        now = self.clock()
        with self._lock:
            due = [wish for wish in self._wishes.values() if wish.due <= now]
        for wish in due:
            try:
                data = self.fetch(wish.request)
                expires = wish.check(data)
            except (FetchFailed, EvidenceError) as error:
                wish.failures += 1
                wait = min(_FIRST_RETRY * 2 ** (wish.failures - 1), _LAST_RETRY)
                wish.due = self.clock() + max(wait, min(getattr(error, "retry_after", 0.0), _DAY))
                continue
            now = self.clock()
            with self._lock:
                wish.data, wish.expires, wish.failures = data, expires, 0
                wish.due = now + min(max((expires - now) / 2, _FIRST_RETRY), _LONGEST)

    def _get(self, request: Request, check: Callable[[bytes], float]) -> bytes:
        with self._lock:
            wish = self._wishes.setdefault(request, _Wish(request, check))
            self._wishes.move_to_end(request)
            while len(self._wishes) > self.entries:
                self._wishes.popitem(last=False)
            if wish.data is None or wish.expires <= self.clock():
                raise CollectionError(f"{_host(request.url)} has not given it yet: it is fetched in the background")
            return wish.data


def https(request: Request, timeout: float = 20.0) -> bytes:
    """The production `Fetch`: TLS verified, no redirects, the answer bounded. HTTP for the metadata service only."""
    parts = urllib.parse.urlsplit(request.url)
    host, path = parts.netloc, f"{parts.path}?{parts.query}" if parts.query else parts.path
    connection = (
        http.client.HTTPSConnection(host, timeout=timeout, context=ssl.create_default_context())
        if parts.scheme == "https"
        else http.client.HTTPConnection(host, timeout=timeout)
    )
    deadline = time.monotonic() + timeout
    data = b""
    with contextlib.closing(connection):
        try:
            connection.request("GET" if request.body is None else "POST", path, request.body, dict(request.headers))
            answer = connection.getresponse()
            if answer.status != 200:
                raise FetchFailed(f"{host} answered {answer.status}", _seconds(answer.getheader("Retry-After")))
            while part := answer.read1(65_536):
                data += part
                if len(data) > LIMITS.fetched or time.monotonic() > deadline:
                    raise FetchFailed(f"{host} sends too much or too slowly")
            if answer.length:
                raise FetchFailed(f"{host} sent less than it announced")
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise FetchFailed(f"{host}: {type(error).__name__}") from error
    return data


def _seconds(value: str | None) -> float:
    try:
        return max(0.0, float(value or 0))
    except ValueError:
        return _LAST_RETRY  # A date: an hour is as good.


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
        raise EvidenceError("a list of revoked certificates without an end")
    return until.timestamp()


def _ocsp(data: bytes) -> float:
    try:
        until = ocsp.load_der_ocsp_response(data).next_update_utc
    except Exception as error:  # Not only for odd answers: an answer without a status raises late.
        raise EvidenceError("not an OCSP answer") from error
    if until is None:
        raise EvidenceError("an OCSP answer without an end")
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
    # Here, so that machines without GPUs do without lxml.
    from attestation.nvidia.rim import Rim

    return Rim.parse(_rim(data)).valid_until.timestamp()


def _host(url: str) -> str:
    return urllib.parse.urlsplit(url).netloc
