"""Fetches a backend's evidence document over HTTP, for a relying party. Verification itself never imports this."""

import http.client
import time
import urllib.error
import urllib.parse
import urllib.request
from typing import IO

from adytum.attestation.core.errors import FetchError
from adytum.attestation.core.limits import LIMITS

_SECONDS = 30.0


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirect would fetch another server's evidence."""

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: object, newurl: str
    ) -> None:
        return None


def fetch_document(url: str, nonce: bytes) -> bytes:
    """The evidence document of the backend at `url` on a 32-byte nonce, unverified. Raises `FetchError`."""
    try:
        parts = urllib.parse.urlsplit(url)
    except ValueError as error:
        raise FetchError(f"{url} is not an address: {error}") from error
    if parts.scheme not in ("http", "https") or not parts.netloc or parts.query or parts.fragment:
        raise FetchError("give the backend's address as http://host:port or https://host:port")
    request = f"{url.rstrip('/')}/.well-known/attestation?nonce={nonce.hex()}"
    deadline = time.monotonic() + _SECONDS
    document = bytearray()
    try:
        with urllib.request.build_opener(_NoRedirects).open(request, timeout=_SECONDS) as answer:
            while part := answer.read1(65536):
                document += part
                if len(document) > LIMITS.document:
                    raise FetchError(
                        f"the answer is larger than {LIMITS.document} bytes, the limit of an evidence document"
                    )
                if time.monotonic() > deadline:
                    raise FetchError(f"the answer took more than {_SECONDS:.0f} s")
    except urllib.error.HTTPError as error:
        raise FetchError(f"the backend answered with status {error.code} instead of evidence") from error
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise FetchError(f"no evidence came from {url}: {error}") from error
    return bytes(document)
