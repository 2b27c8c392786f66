"""`python -m attestation verify | show | fetch`: evidence documents from the command line.

Exit status: 0 verified (for `show`: shown), 1 refused or not fetched, 2 a command that cannot be carried out as given.
"""
# ruff: noqa: T201 - a command line prints

import argparse
import datetime
import http.client
import os
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from attestation.binding import NONCE_SIZE
from attestation.errors import EvidenceError, PolicyError, PolicyFileError, VerificationError
from attestation.evidence import Claims, Evidence
from attestation.limits import LIMITS
from attestation.policy import Policy
from attestation.trust import TrustRoots
from attestation.verify import verify

_FETCH_SECONDS = 30.0
REFUSED, USAGE = 1, 2


class _Unusable(Exception):
    """The command cannot be carried out as given."""


class _NotFetched(Exception):
    """There is no document to judge."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; its exit status."""
    parsed = _parser().parse_args(arguments)
    try:
        status: int = parsed.run(parsed)
    except (_Unusable, PolicyFileError) as error:
        print(f"error: {error}", file=sys.stderr)
        return USAGE
    except _NotFetched as error:
        print(f"NOT VERIFIED: {error}.", file=sys.stderr)
        return REFUSED
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m attestation",
        description="Verify or show the evidence of a cloister backend.",
        epilog="exit status: 0 verified, 1 refused or not fetched, 2 a command that cannot be carried out as given",
    )
    commands = parser.add_subparsers(required=True, metavar="verify | show | fetch")

    command = commands.add_parser("verify", help="verify a document that was made for your nonce")
    command.add_argument("file", type=Path, help="the evidence document")
    command.add_argument("--nonce", type=_octets, required=True, help="your nonce, 64 hexadecimal digits")
    _add_judging(command)
    command.add_argument("--at", type=_time, help="verify as of this time, like 2026-11-23T12:00:00Z (default: now)")
    command.set_defaults(run=_verify)

    command = commands.add_parser("show", help="show what a document says, without judging it")
    command.add_argument("file", type=Path, help="the evidence document")
    command.set_defaults(run=_show)

    command = commands.add_parser("fetch", help="ask a backend for evidence on a fresh nonce, and verify it")
    command.add_argument("url", help="the backend, like https://host:8080")
    _add_judging(command)
    command.add_argument("--out", type=Path, help="also write the document here, whether it verifies or not")
    command.set_defaults(run=_fetch)
    return parser


def _add_judging(command: argparse.ArgumentParser) -> None:
    command.add_argument("--policy", type=Path, required=True, help="the policy file (TOML) to judge by")
    command.add_argument(
        "--simulated-key",
        type=_octets,
        action="append",
        help="accept simulated reports of this key only: SHA-256 of its SubjectPublicKeyInfo; may be given again",
    )


def _octets(text: str) -> bytes:
    if len(text) != 2 * NONCE_SIZE or not set(text) <= set("0123456789abcdefABCDEF"):
        raise argparse.ArgumentTypeError("give 64 hexadecimal digits")
    return bytes.fromhex(text)


def _time(text: str) -> datetime.datetime:
    try:
        at = datetime.datetime.fromisoformat(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError("give a time like 2026-11-23T12:00:00Z") from error
    if at.tzinfo is None:
        raise argparse.ArgumentTypeError(f"give the time zone too, like {text}Z")
    return at


def _verify(parsed: argparse.Namespace) -> int:
    document = _read(parsed.file)
    return _judge(document, parsed.nonce, parsed, parsed.at or datetime.datetime.now(datetime.UTC))


def _fetch(parsed: argparse.Namespace) -> int:
    Policy.from_toml(parsed.policy)  # A bad policy is told before a backend is asked.
    nonce = os.urandom(NONCE_SIZE)
    document = _download(parsed.url, nonce)
    print(f"nonce: {nonce.hex()}")
    if parsed.out is not None:
        try:
            parsed.out.write_bytes(document)
        except OSError as error:
            raise _Unusable(f"{parsed.out} cannot be written: {error.strerror}") from error
        print(f"document: {parsed.out}")
    return _judge(document, nonce, parsed, datetime.datetime.now(datetime.UTC))


def _judge(document: bytes, nonce: bytes, parsed: argparse.Namespace, now: datetime.datetime) -> int:
    policy = Policy.from_toml(parsed.policy)
    trust = TrustRoots(simulated=None if parsed.simulated_key is None else frozenset(parsed.simulated_key))
    try:
        verified = verify(document, nonce=nonce, policy=policy, trust=trust, now=now)
    except (EvidenceError, VerificationError) as error:
        print(f"REFUSED at step {error.step} ({error.step.title}): {error}.", file=sys.stderr)
        print("Send nothing to this backend.", file=sys.stderr)
        return REFUSED
    except PolicyError as error:
        print(f"REFUSED at step {error.step} (policy), {error.claim}: {error}.", file=sys.stderr)
        print("Send nothing to this backend, or change the policy if you mean to accept this.", file=sys.stderr)
        return REFUSED
    simulated = ", which proves nothing about hardware" if verified.provider == "simulated" else ""
    print(f"VERIFIED: the evidence holds, and the policy {parsed.policy} accepts it.")
    print(f"CPU evidence     {verified.provider}{simulated}")
    print(f"signed by        {verified.cpu_key_sha256.hex()} (SHA-256 of the key)")
    print(f"measurement      {verified.measurement.hex()}")
    print(f"document SHA-256 {verified.document_sha256.hex()}")
    print(f"verified at      {verified.verified_at.isoformat(timespec='seconds')}")
    _print_claims(verified.claims)
    return 0


def _show(parsed: argparse.Namespace) -> int:
    try:
        evidence = Evidence.parse(_read(parsed.file))
        claims = Claims.parse(evidence.claims)
    except EvidenceError as error:
        print(f"This is no evidence document of version 1: {error}.", file=sys.stderr)
        return REFUSED
    print("NOT VERIFIED: this is what the document says; nothing of it was checked. `verify` checks.")
    print(f"nonce            number {evidence.nonces.index} of {evidence.nonces.size} in its round")
    print(f"CPU evidence     {evidence.cpu.provider}, {len(evidence.cpu.report)} bytes")
    print(f"certificates     {len(evidence.cpu.certificates)}")
    print(f"GPU evidence     {len(evidence.gpu)} bytes{' (none)' if evidence.gpu == b'[]' else ''}")
    _print_claims(claims)
    return 0


def _print_claims(claims: Claims) -> None:
    ehbp = claims.ehbp_key_configuration
    print(f"replica          {claims.replica}")
    print(f"gateway path     {claims.gateway_path}")
    print(f"keys             {claims.key_configurations.hex()[:64]}... ({len(claims.key_configurations)} bytes)")
    print(f"EHBP key         {'none' if ehbp is None else ehbp.hex()}")
    print(f"keys expire      {_date(claims.keys_expire_at)}")
    print(f"TLS key SHA-256  {'none: no TLS' if claims.tls_spki_sha256 is None else claims.tls_spki_sha256.hex()}")
    for model in claims.models:
        aliases = f" (also {', '.join(model.aliases)})" if model.aliases else ""
        print(f"model            {model.id}{aliases}, {model.task}, weights {model.weights_root.hex()}")
    print(f"configuration    {claims.configuration_sha256.hex()}")
    print(f"padding          {claims.padding}")
    print(f"software         {claims.software_version}")
    print(f"GPU CC mode      {claims.cc_mode}{' (there is no GPU)' if claims.cc_mode == 'none' else ''}")
    print(f"issued at        {_date(claims.issued_at)}")


def _date(seconds: int) -> str:
    try:
        return datetime.datetime.fromtimestamp(seconds, datetime.UTC).isoformat()
    except (ValueError, OverflowError, OSError):
        return f"{seconds} s after 1970, beyond the calendar"


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(LIMITS.document + 1)
    except (OSError, ValueError) as error:
        raise _Unusable(f"{path} cannot be read: {error}") from error


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """Evidence of another server than the one named would be about that other server."""

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: object, newurl: str
    ) -> None:
        return None


def _download(url: str, nonce: bytes) -> bytes:
    try:
        parts = urllib.parse.urlsplit(url)
    except ValueError as error:
        raise _Unusable(f"{url} is no address: {error}") from error
    if parts.scheme not in ("http", "https") or not parts.netloc or parts.query or parts.fragment:
        raise _Unusable("give the backend's address as http://host:port or https://host:port")
    request = f"{url.rstrip('/')}/.well-known/attestation?nonce={nonce.hex()}"
    deadline = time.monotonic() + _FETCH_SECONDS
    document = bytearray()
    try:
        with urllib.request.build_opener(_NoRedirects).open(request, timeout=_FETCH_SECONDS) as answer:
            while part := answer.read1(65536):
                document += part
                if len(document) > LIMITS.document:
                    raise _NotFetched(f"the answer is larger than {LIMITS.document} bytes, no evidence document is")
                if time.monotonic() > deadline:
                    raise _NotFetched(f"the answer took more than {_FETCH_SECONDS:.0f} s")
    except urllib.error.HTTPError as error:
        raise _NotFetched(f"the backend answered with status {error.code} instead of evidence") from error
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise _NotFetched(f"no evidence came from {url}: {error}") from error
    return bytes(document)


if __name__ == "__main__":
    sys.exit(main())
