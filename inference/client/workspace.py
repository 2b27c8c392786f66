"""A folder that keeps every evidence document a client accepted, for an audit afterwards. No content, no API keys.

`<UTC time>-<first 16 hexadecimal digits of the SHA-256>.json` is a document as it came; `evidence.log` has a line of
JSON for each. The folder has mode 0700, its files 0600.
"""

import json
import os
import secrets
from pathlib import Path

from inference.client.errors import RequestRefused
from inference.client.session import Accepted

LOG = "evidence.log"


class Workspace:
    """Makes the folder where it is not there. Raises `OSError`."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self._folder = Path(folder)
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._folder.chmod(0o700)

    def record(self, accepted: Accepted) -> None:
        """Writes document and line. Raises `RequestRefused`: a record that was asked for is not left out."""
        try:
            self._write(accepted)
        except OSError as error:
            raise RequestRefused(
                f"The workspace {self._folder} cannot be written ({error.strerror}), so nothing was sent. Make room "
                "there, or go without a workspace.",
                status=500,
            ) from error

    def _write(self, accepted: Accepted) -> None:
        evidence = accepted.evidence
        digest = evidence.document_sha256.hex()
        name = f"{evidence.verified_at:%Y%m%dT%H%M%SZ}-{digest[:16]}.json"
        temporary = self._folder / f".{secrets.token_hex(8)}.tmp"
        try:
            _write_new(temporary, accepted.document)
            os.replace(temporary, self._folder / name)
        finally:
            temporary.unlink(missing_ok=True)
        line = {
            "time": evidence.verified_at.isoformat(),
            "upstream": str(accepted.origin),
            "document": name,
            "sha256": digest,
            "nonce": accepted.nonce.hex(),
            "claims_sha256": evidence.claims_sha256.hex(),
            "provider": evidence.provider,
            "measurement": evidence.measurement.hex(),
            "policy": "accepted",
        }
        # One write to a file opened for appending: lines of several processes do not mix.
        handle = os.open(self._folder / LOG, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            os.write(handle, json.dumps(line).encode() + b"\n")
        finally:
            os.close(handle)


def _write_new(path: Path, data: bytes) -> None:
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(handle, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
