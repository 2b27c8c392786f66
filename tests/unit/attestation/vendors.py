"""Fake vendors on this machine: AMD's KDS, NVIDIA's RIM and OCSP services, Azure's metadata service.

One HTTP server, with TLS or without, that answers as they do and that can be told to fail in the ways that they can.
Certificates, lists and OCSP answers are made and signed here, for the paths and requests that are asked for.
"""

import base64
import contextlib
import datetime
import json
import re
import ssl
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import ClassVar, Self
from urllib.parse import parse_qs, urlsplit

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509 import ocsp

START = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)
DAY = datetime.timedelta(days=1)
YEARS = datetime.timedelta(days=3650)
AMD_CRL_LIFE = datetime.timedelta(days=365)
_VCEK_PATH = re.compile(r"/vcek/v1/(Milan|Genoa|Turin)/([0-9a-f]+)")
_CHAIN_PATH = re.compile(r"/(vcek|vlek)/v1/(Milan|Genoa|Turin)/cert_chain")
_CRL_PATH = re.compile(r"/vcek/v1/(Milan|Genoa|Turin)/crl")
_SPLS = {
    "Milan": ["blSPL", "teeSPL", "snpSPL", "ucodeSPL"],
    "Genoa": ["blSPL", "teeSPL", "snpSPL", "ucodeSPL"],
    "Turin": ["fmcSPL", "blSPL", "teeSPL", "snpSPL", "ucodeSPL"],
}
_HWID_SIZES = {"Milan": 64, "Genoa": 64, "Turin": 8}
FAILURES = (
    "429",
    "500",
    "503",
    "404",
    "redirect",
    "truncated",
    "truncated-chunks",
    "wrong-content",
    "empty",
    "huge",
    "endless",
    "not-http",
    "hang-up",
)


@dataclass(frozen=True)
class Authority:
    """A key with its certificate, and what it signs."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey

    @property
    def der(self) -> bytes:
        return self.certificate.public_bytes(Encoding.DER)

    @property
    def pem(self) -> bytes:
        return self.certificate.public_bytes(Encoding.PEM)


def issue(
    name: str,
    by: Authority | None = None,
    *,
    until: datetime.datetime = START + YEARS,
    alternative: x509.SubjectAlternativeName | None = None,
    ca: bool = True,
) -> Authority:
    key = ec.generate_private_key(ec.SECP384R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(by.certificate.subject if by else subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(START - YEARS)
        .not_valid_after(until)
        .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )
    issuer_key = by.key if by else key
    builder = builder.add_extension(
        x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()), critical=False
    )
    if ca:
        usage = x509.KeyUsage(True, False, False, False, False, True, True, False, False)
        builder = builder.add_extension(usage, critical=True)
    if alternative:
        builder = builder.add_extension(alternative, critical=False)
    return Authority(builder.sign(by.key if by else key, hashes.SHA384()), key)


@cache
def ark(product: str) -> Authority:
    return issue(f"ARK-{product}")


@cache
def ask(product: str, kind: str) -> Authority:
    return issue(f"{'SEV' if kind == 'vcek' else 'SEV-VLEK'}-{product}", ark(product))


@cache
def ocsp_pair() -> tuple[Authority, Authority]:
    """(A certificate, its issuer) that NVIDIA's OCSP service knows."""
    issuer = issue("a fake NVIDIA authority")
    return issue("a GPU", issuer, ca=False), issuer


@dataclass
class Vendors:
    """Everything that the services have, by the clock of the test, and what they were asked."""

    now: datetime.datetime = START
    rims: dict[str, bytes] = field(default_factory=dict)
    azure_product: str = "Genoa"
    recorded: dict[str, bytes] = field(default_factory=dict)
    """Answers that were recorded, by path and query; they come before those that are made here."""
    failing: dict[str, str] = field(default_factory=dict)
    """By the beginning of a path: one of `FAILURES`, or `drip-headers` or `drip-body`."""
    retry_after: str = ""
    ocsp_life: datetime.timedelta | None = DAY
    """None: answers that say no end."""
    asked: list[tuple[str, str]] = field(default_factory=list)
    """(method, path and query) of each request in order."""
    stop: threading.Event = field(default_factory=threading.Event)

    def answer(self, method: str, target: str, metadata: str | None, kind: str, body: bytes) -> tuple[int, bytes]:
        if target in self.recorded:
            return 200, self.recorded[target]
        parts = urlsplit(target)
        if method == "POST" and parts.path == "/":
            return self._ocsp(kind, body)
        if method != "GET":
            return 405, b""
        if found := _CHAIN_PATH.fullmatch(parts.path):
            return 200, ask(found[2], found[1]).pem + ark(found[2]).pem
        if found := _CRL_PATH.fullmatch(parts.path):
            return 200, self._crl(found[1])
        if found := _VCEK_PATH.fullmatch(parts.path):
            return self._vcek(found[1], found[2], parts.query)
        if parts.path == "/metadata/THIM/amd/certification":
            return self._azure() if metadata == "true" else (400, b'{"error":"Bad request. Metadata missing"}')
        if parts.path.startswith("/v1/rim/"):
            return self._rim(parts.path.removeprefix("/v1/rim/"))
        return 404, b"Not found"

    def _vcek(self, product: str, hwid: str, query: str) -> tuple[int, bytes]:
        levels = parse_qs(query, strict_parsing=True)
        if list(levels) != _SPLS[product] or len(hwid) != 2 * _HWID_SIZES[product]:
            return 400, b"Bad request"
        if not all(len(value) == 1 and re.fullmatch(r"\d{2,3}", value[0]) for value in levels.values()):
            return 400, b"Bad request"
        # What was asked for is in the name, so that a test can tell certificates apart.
        return 200, issue(f"{product} {hwid[:8]} {query[-11:]}", ask(product, "vcek"), ca=False).der

    def _crl(self, product: str) -> bytes:
        builder = (
            x509.CertificateRevocationListBuilder()
            .issuer_name(ark(product).certificate.subject)
            .last_update(self.now - DAY)
            .next_update(self.now + AMD_CRL_LIFE)
        )
        return builder.sign(ark(product).key, hashes.SHA384()).public_bytes(Encoding.DER)

    def _azure(self) -> tuple[int, bytes]:
        product = self.azure_product
        value = {
            "vcekCert": issue(f"{product} of Azure", ask(product, "vcek"), ca=False).pem.decode(),
            "certificateChain": (ask(product, "vcek").pem + ark(product).pem).decode(),
            "tcbm": "DB18000000000004",
            "cacheControl": "86400",
        }
        return 200, json.dumps(value).encode()

    def _rim(self, name: str) -> tuple[int, bytes]:
        if name not in self.rims:
            return 404, b'{"detail":"Not Found"}'
        rim = base64.b64encode(self.rims[name]).decode()
        return 200, json.dumps({"id": name, "rim": rim, "sha256": "", "rim_format": "XML", "request_id": "1"}).encode()

    def _ocsp(self, kind: str, body: bytes) -> tuple[int, bytes]:
        if kind != "application/ocsp-request":
            return 415, b""
        leaf, issuer = ocsp_pair()
        try:
            asked = ocsp.load_der_ocsp_request(body).serial_number
        except ValueError:
            failed = ocsp.OCSPResponseBuilder.build_unsuccessful(ocsp.OCSPResponseStatus.MALFORMED_REQUEST)
            return 200, failed.public_bytes(Encoding.DER)
        if asked != leaf.certificate.serial_number:
            failed = ocsp.OCSPResponseBuilder.build_unsuccessful(ocsp.OCSPResponseStatus.UNAUTHORIZED)
            return 200, failed.public_bytes(Encoding.DER)
        return 200, self.ocsp_answer(leaf, issuer)

    def ocsp_answer(self, leaf: Authority, issuer: Authority) -> bytes:
        builder = ocsp.OCSPResponseBuilder().add_response(
            leaf.certificate, issuer.certificate, hashes.SHA384(), ocsp.OCSPCertStatus.GOOD,
            self.now - DAY / 24, self.now + self.ocsp_life if self.ocsp_life else None, None, None,
        )  # fmt: skip
        builder = builder.responder_id(ocsp.OCSPResponderEncoding.HASH, issuer.certificate)
        return builder.sign(issuer.key, hashes.SHA384()).public_bytes(Encoding.DER)

    def failure(self, target: str) -> str:
        return next((mode for start, mode in self.failing.items() if target.startswith(start)), "")


class Server:
    """The vendors on a port of 127.0.0.1. `tls`: (certificate chain, key) in PEM."""

    def __init__(self, vendors: Vendors, tls: Path | None = None) -> None:
        handler = type("Handler", (_Handler,), {"vendors": vendors})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        # A stuck client's thread must not hold up the end of a test.
        self._server.block_on_close = False
        self.scheme = "http"
        if tls:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(tls)
            self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
            self.scheme = "https"
        self._vendors = vendors
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)

    @property
    def port(self) -> int:
        return int(self._server.server_address[1])

    @property
    def url(self) -> str:
        return f"{self.scheme}://127.0.0.1:{self.port}"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._vendors.stop.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(5)


def tls_files(folder: Path, server: Authority, issuer: Authority) -> Path:
    """The file that a TLS server loads."""
    path = folder / "server.pem"
    key = server.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    path.write_bytes(server.pem + issuer.pem + key)
    return path


class _Handler(BaseHTTPRequestHandler):
    vendors: ClassVar[Vendors]
    protocol_version = "HTTP/1.1"
    timeout = 5.0

    def handle(self) -> None:
        with contextlib.suppress(OSError):  # A client that gives up in the middle.
            super().handle()

    def do_GET(self) -> None:
        self._do("GET")

    def do_POST(self) -> None:
        self._do("POST")

    def log_message(self, format: str, *args: object) -> None:
        pass

    def _do(self, method: str) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.vendors.asked.append((method, self.path))
        headers = self.headers
        with contextlib.suppress(OSError):  # The client may have gone: that is what some tests are about.
            mode = self.vendors.failure(self.path)
            metadata, kind = headers.get("Metadata"), headers.get("Content-Type") or ""
            status, data = self.vendors.answer(method, self.path, metadata, kind, body)
            if mode:
                self.close_connection = True
                self._fail(mode, data)
                return
            self._send(status, data)

    def _send(self, status: int, data: bytes, length: int | None = None, **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(data) if length is None else length))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(data)

    def _fail(self, mode: str, data: bytes) -> None:
        match mode:
            case "429" | "500" | "503" | "404":
                # A good body: only the status shows the failure.
                retry = {"Retry_After": self.vendors.retry_after} if self.vendors.retry_after else {}
                self._send(int(mode), data, **retry)
            case "redirect":
                self._send(302, data, Location=f"http://{self.headers['Host']}/elsewhere{self.path}")
            case "truncated":
                self._send(200, data[:-1], length=len(data))
            case "truncated-chunks":
                self.send_response(200)
                self.send_header("Transfer-Encoding", "chunked")
                self.end_headers()
                self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
            case "wrong-content":
                self._send(200, b"<!doctype html><title>Welcome to the hotel's wireless network</title>")
            case "empty":
                self._send(200, b"")
            case "huge":
                self._send(200, data + bytes(4 << 20))
            case "endless":
                self.send_response(200)
                self.end_headers()
                while not self.vendors.stop.is_set():
                    self.wfile.write(bytes(65_536))
            case "not-http":
                self.wfile.write(b"SSH-2.0-OpenSSH_9.6\r\n")
            case "hang-up":
                pass
            case "drip-headers":
                self._drip(b"HTTP/1.1 200 OK\r\nX-A: ", b"b")
            case "drip-body":
                self._drip(b"HTTP/1.1 200 OK\r\n\r\n", b"a")
            case _:
                raise AssertionError(mode)

    def _drip(self, first: bytes, then: bytes) -> None:
        self.wfile.write(first)
        while not self.vendors.stop.is_set():
            self.wfile.write(then)
            time.sleep(0.02)


@contextlib.contextmanager
def serving(vendors: Vendors | None = None, tls: Path | None = None) -> Iterator[tuple[Vendors, Server]]:
    vendors = vendors or Vendors()
    with Server(vendors, tls) as server:
        yield vendors, server
