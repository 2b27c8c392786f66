"""A folder that keeps every evidence document a client accepted, for an audit afterwards. No content, no API keys.

`<UTC time>-<first 16 hexadecimal digits of the SHA-256>.json` is a document as received; `evidence.log` has a line of
JSON for each. `releases.json` has the highest release that was accepted from each upstream: from then on an older one
is refused. The folder has mode 0700, its files 0600.
"""

import json
import os
import secrets
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from adytum.attestation.reference.release import Release
from adytum.inference.client.errors import NotVerified, RequestRefused
from adytum.inference.client.session import Accepted

LOG = "evidence.log"
RELEASES = "releases.json"
LOCK_SECONDS = 10.0
"""How long to wait for another program that uses the folder."""


class Workspace:
    """Creates the folder if it is missing. Raises `OSError`."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self._folder = Path(folder)
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._folder.chmod(0o700)

    def record(self, accepted: Accepted) -> None:
        """Writes document and line. Raises `RequestRefused` if it cannot, because nothing may be sent unrecorded, and
        `NotVerified` for a release older than one that was accepted before."""
        try:
            if accepted.release is not None:
                self._advance(str(accepted.origin), accepted.release)
            self._write(accepted)
        except (OSError, sqlite3.Error) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise RequestRefused(
                f"The workspace {self._folder} cannot be written ({reason}), so nothing was sent. Free some space, or "
                "run without a workspace.",
                status=500,
            ) from error

    def _advance(self, upstream: str, release: Release) -> None:
        with _locked(self._folder / ".releases.lock"):
            known = self._releases()
            sequence, sha256 = known.get(upstream, (-1, ""))
            if release.sequence < sequence:
                raise NotVerified(
                    f"{upstream}: the policy's release has the sequence {release.sequence}, and {sequence} was "
                    "accepted before. Nothing was sent. Get the current release from its publisher."
                )
            if release.sequence == sequence and release.sha256.hex() != sha256:
                raise NotVerified(
                    f"{upstream}: the policy's release has the sequence {sequence} of another one that was accepted "
                    "before. Nothing was sent. Ask the publisher which of the two is genuine."
                )
            if release.sequence > sequence:
                known[upstream] = (release.sequence, release.sha256.hex())
                value = {name: {"sequence": s, "sha256": digest} for name, (s, digest) in known.items()}
                self._replace(RELEASES, json.dumps(value, indent=2).encode() + b"\n")

    def _releases(self) -> dict[str, tuple[int, str]]:
        path = self._folder / RELEASES
        try:
            value = json.loads(path.read_bytes())
            found = {name: (entry["sequence"], entry["sha256"]) for name, entry in value.items()}
            if not all(type(sequence) is int and isinstance(sha256, str) for sequence, sha256 in found.values()):
                raise TypeError
        except FileNotFoundError:
            return {}
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            # If it were taken for empty, an old release would be accepted again.
            raise NotVerified(
                f"{path}, the record of accepted releases, cannot be read. Nothing was sent. Restore it, or remove it "
                "and set the policy's release.minimum to the current release's sequence."
            ) from error
        return found

    def _replace(self, name: str, data: bytes) -> None:
        temporary = self._folder / f".{secrets.token_hex(8)}.tmp"
        try:
            _write_new(temporary, data)
            os.replace(temporary, self._folder / name)
        finally:
            temporary.unlink(missing_ok=True)

    def _write(self, accepted: Accepted) -> None:
        evidence = accepted.evidence
        digest = evidence.document_sha256.hex()
        name = f"{evidence.verified_at:%Y%m%dT%H%M%SZ}-{digest[:16]}.json"
        self._replace(name, accepted.document)
        line = {
            "time": evidence.verified_at.isoformat(),
            "upstream": str(accepted.origin),
            "document": name,
            "sha256": digest,
            "nonce": accepted.nonce.hex(),
            "claims_sha256": evidence.claims_sha256.hex(),
            "provider": evidence.provider,
            "measurement": evidence.measurement.hex(),
            "release": None if accepted.release is None else accepted.release.sequence,
            "policy": "accepted",
        }
        # A single write to a file opened for appending: lines of several processes do not mix.
        handle = os.open(self._folder / LOG, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            os.write(handle, json.dumps(line).encode() + b"\n")
        finally:
            os.close(handle)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Keeps other programs that share the folder from changing it meanwhile. Raises `sqlite3.Error`."""
    # SQLite's lock works on every system and is released when its process ends. The file stays empty.
    with closing(sqlite3.connect(path, timeout=LOCK_SECONDS, isolation_level=None)) as lock:
        lock.execute("BEGIN IMMEDIATE")
        yield


def _write_new(path: Path, data: bytes) -> None:
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(handle, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
