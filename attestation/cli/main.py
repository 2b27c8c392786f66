"""`python -m adytum.attestation`: its commands and their arguments.

Prints a JSON object; `show` prints words for people. Exit status: 0 accepted, 10 rejected, 20 unsupported (it could
not be checked), 30 malformed; 2 if the command cannot be carried out as given, or there is nothing to judge.
"""
# ruff: noqa: T201 - a command line prints

import argparse
import datetime
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from adytum.attestation.cli import commands, words
from adytum.attestation.cli.commands import Unusable, read
from adytum.attestation.cli.verdict import ACCEPTED, Verdict
from adytum.attestation.core.errors import CollectionError, FetchError, PolicyFileError
from adytum.attestation.document.binding import NONCE_SIZE

USAGE = 2
_STOP = "Send nothing to this backend"
_EPILOG = "exit status: 0 accepted, 10 rejected, 20 unsupported, 30 malformed, 2 a command that cannot be carried out"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status."""
    parsed = parser().parse_args(arguments)
    try:
        status: int = parsed.run(parsed)
    except (Unusable, PolicyFileError, CollectionError, FetchError) as error:
        print(f"error: {error}", file=sys.stderr)
        return USAGE
    except BrokenPipeError:
        # The reader closed the pipe.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return USAGE
    return status


def parser() -> argparse.ArgumentParser:
    """All commands; each sets `run`, which takes the parsed arguments and returns the exit status."""
    top = argparse.ArgumentParser(
        prog="python -m adytum.attestation",
        description="Verify, show and collect attestation evidence.",
        epilog=_EPILOG,
    )
    some = top.add_subparsers(required=True, metavar="verify | fetch | snp | gpu | tdx | collect | show")

    command = some.add_parser("verify", help="verify a document that was made for your nonce", epilog=_EPILOG)
    command.add_argument("file", type=Path, help="the evidence document")
    command.add_argument("--nonce", type=_octets, required=True, help="your nonce, 64 hexadecimal digits")
    _add_judging(command)
    _add_time(command)
    command.set_defaults(
        run=lambda p: _print(
            commands.verify_document(read(p.file), p.nonce, p.policy, _now(p), _keys(p)),
            _STOP,
        )
    )

    command = some.add_parser(
        "fetch", help="fetch a backend's evidence on a fresh nonce, and verify it", epilog=_EPILOG
    )
    command.add_argument("url", help="the backend, like https://host:8080")
    _add_judging(command)
    command.add_argument("--out", type=Path, help="also write the document here, whether it verifies or not")
    command.set_defaults(run=lambda p: _print(commands.fetch(p.url, p.policy, p.out, _keys(p)), _STOP))

    command = some.add_parser("snp", help="verify an SEV-SNP report by itself", epilog=_EPILOG)
    command.add_argument("file", type=Path, help="the report, 1,184 bytes, or a paravisor's HCL report around it")
    command.add_argument("--vek", type=Path, required=True, help="the VCEK or VLEK certificate, DER or PEM")
    command.add_argument("--chain", type=Path, required=True, help="ASK or ASVK, then ARK, PEM")
    command.add_argument("--crl", type=Path, help="AMD's list of revoked certificates, DER or PEM")
    command.add_argument("--policy", type=Path, help="judge by this policy's rules about CPUs")
    _add_time(command)
    command.set_defaults(
        run=lambda p: _print(
            commands.snp(
                read(p.file),
                read(p.vek),
                read(p.chain),
                p.crl and read(p.crl),
                p.policy,
                _now(p),
            )
        )
    )

    command = some.add_parser("gpu", help="verify a GPU's report by itself", epilog=_EPILOG)
    command.add_argument("file", type=Path, help="the SPDM measurements report")
    command.add_argument("--chain", type=Path, required=True, help="the GPU's certificates, leaf first, PEM")
    command.add_argument(
        "--nonce", type=_octets, required=True, help="the nonce that it was requested with, 64 hexadecimal digits"
    )
    command.add_argument("--rim", type=Path, action="append", default=[], help="a manifest of driver or VBIOS, XML")
    command.add_argument("--ocsp", type=Path, action="append", default=[], help="an OCSP answer, DER")
    command.add_argument("--nras", type=Path, help="NVIDIA's remote appraisal of the same evidence; needs --jwks")
    command.add_argument("--jwks", type=Path, help="the keys of NVIDIA's appraisal service")
    command.add_argument("--policy", type=Path, help="judge by this policy's rules about GPUs")
    _add_time(command)
    command.set_defaults(run=_gpu)

    command = some.add_parser("tdx", help="verify a TDX quote by itself", epilog=_EPILOG)
    command.add_argument("file", type=Path, help="the quote")
    command.add_argument("--collateral", type=Path, help="Intel's collateral, JSON; needs the extra tdx")
    command.add_argument("--policy", type=Path, help="judge by this policy's rules about CPUs")
    _add_time(command)
    command.set_defaults(
        run=lambda p: _print(commands.tdx(read(p.file), p.collateral and read(p.collateral), p.policy, _now(p)))
    )

    command = some.add_parser("collect", help="collect reports of this machine's devices on a nonce", epilog=_EPILOG)
    command.add_argument("--cpu", choices=("sev-snp", "sev-snp-vtpm", "tdx", "none"), required=True)
    command.add_argument("--gpus", choices=("nvidia", "none"), required=True)
    command.add_argument("--nonce", type=_octets, required=True, help="64 hexadecimal digits")
    command.set_defaults(run=_collect)

    command = some.add_parser("show", help="describe a file in words, and what of it is valid", epilog=_EPILOG)
    command.add_argument("file", type=Path, help="a document, report, quote, certificate, manifest, list or policy")
    _add_time(command)
    command.set_defaults(run=lambda p: words.show(read(p.file), _now(p), colour=sys.stdout.isatty()))
    return top


def _collect(parsed: argparse.Namespace) -> int:
    # Imported here: devices need Linux, and the other commands do not.
    from adytum.attestation.collect import devices

    return _print_object(devices.collect(parsed.cpu, parsed.gpus, parsed.nonce))


def _gpu(parsed: argparse.Namespace) -> int:
    if (parsed.nras is None) != (parsed.jwks is None):
        raise Unusable("--nras and --jwks belong together")
    nras = None if parsed.nras is None else (read(parsed.nras), read(parsed.jwks))
    rims, ocsp = [read(path) for path in parsed.rim], [read(path) for path in parsed.ocsp]
    return _print(
        commands.gpu(
            read(parsed.file),
            read(parsed.chain),
            parsed.nonce,
            rims,
            ocsp,
            nras,
            parsed.policy,
            _now(parsed),
        )
    )


def _print(verdict: Verdict, advice: str = "") -> int:
    _print_object(verdict.as_json())
    if verdict.status != ACCEPTED:
        print(f"{verdict.result.upper()} ({verdict.code}): {verdict.reason}.", file=sys.stderr)
        if advice:
            print(f"{advice}.", file=sys.stderr)
    return verdict.status


def _print_object(value: dict[str, object]) -> int:
    print(json.dumps(value, indent=2))
    return ACCEPTED


def _add_judging(command: argparse.ArgumentParser) -> None:
    command.add_argument("--policy", type=Path, required=True, help="the policy file (TOML) to judge by")
    command.add_argument(
        "--simulated-key",
        type=_octets,
        action="append",
        help="accept simulated reports of this key only: SHA-256 of its SubjectPublicKeyInfo; may be given again",
    )


def _add_time(command: argparse.ArgumentParser) -> None:
    command.add_argument("--time", type=_time, help="judge as of this time, like 2026-11-23T12:00:00Z (default: now)")


def _keys(parsed: argparse.Namespace) -> frozenset[bytes] | None:
    return None if parsed.simulated_key is None else frozenset(parsed.simulated_key)


def _now(parsed: argparse.Namespace) -> datetime.datetime:
    return parsed.time or datetime.datetime.now(datetime.UTC)


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
