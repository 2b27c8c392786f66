"""The report of Azure's paravisor (HCL, "host compatibility layer"; OpenHCL): format and parsing.

Layout, integers little-endian (OpenHCL, `openhcl_attestation_protocol::igvm_attest::get`; checked on real reports):

Offset  Size  Field
0x000   4     ASCII "HCLA"
0x004   4     version, 1 or 2
0x008   4     size of what follows up to the end of the runtime data, this header included
0x00C   20    request type, status, reserved
0x020   1184  the SEV-SNP report
0x4C0   4     size of the runtime claims, these five fields included
0x4C4   4     version, 1
0x4C8   4     report type: 2 SEV-SNP, 4 TDX
0x4CC   4     hash type: 1 SHA-256, 2 SHA-384, 3 SHA-512
0x4D0   4     size of the runtime data
0x4D4         the runtime data, JSON, then zero bytes

The runtime data's hash, zero padded, is the SNP report's report data. So the hardware signs that the paravisor, which
the SNP report measures, stated it. `keys` has the virtual TPM's attestation key (`HCLAkPub`), `user-data` the 64 bytes
written to the virtual TPM. `vm-configuration` comes from the host and proves nothing: it is not read.
"""

import base64
import binascii
import hashlib
import json
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

from cryptography.hazmat.primitives.asymmetric import rsa

from adytum.attestation.core import strict
from adytum.attestation.core.errors import EvidenceError, Step, UnsupportedError
from adytum.attestation.core.limits import LIMITS, Limits

_HEADER = struct.Struct("<4sII20s")
_CLAIMS = struct.Struct("<5I")
_REPORT_SIZE = 1184
_START = _HEADER.size + _REPORT_SIZE
_SNP_REPORT_DATA = slice(0x50, 0x90)
_SNP = 2
_HASHES: dict[int, Callable[[bytes], Any]] = {1: hashlib.sha256, 2: hashlib.sha384, 3: hashlib.sha512}
_ATTESTATION_KEY = "HCLAkPub"
_USER_DATA = re.compile(r"[0-9A-Fa-f]{128}")
_BASE64URL = re.compile(r"[A-Za-z0-9_-]+")
_EXPONENT = 65537
_MODULUS_BITS = range(2048, 4097)


@dataclass(frozen=True)
class HclReport:
    """One report, parsed and not yet verified."""

    encoded: bytes
    """The report without the zero bytes after it."""
    snp_report: bytes
    runtime_data: bytes
    report_data: bytes
    """What the SNP report has to carry: the runtime data's hash, zero padded to 64 bytes."""
    attestation_key: rsa.RSAPublicKey
    """Of the virtual TPM."""
    user_data: bytes | None
    """The 64 bytes that the guest wrote. None: the runtime data has none."""

    @property
    def whole(self) -> bool:
        """Whether the SNP report in it was made for its runtime data. The SNP report is not verified here."""
        return self.snp_report[_SNP_REPORT_DATA] == self.report_data

    @classmethod
    def parse(cls, data: bytes, limits: Limits = LIMITS) -> Self:
        """Reads a report. Raises `EvidenceError`, and `UnsupportedError` for other hardware and other versions."""
        if len(data) > limits.report:
            raise EvidenceError(f"the paravisor's report has {len(data)} bytes, more than {limits.report}")
        if len(data) < _START + _CLAIMS.size:
            raise EvidenceError("the paravisor's report ends before its runtime data")
        magic, version, size, _ = _HEADER.unpack_from(data)
        claims_size, claims_version, report_type, hash_type, length = _CLAIMS.unpack_from(data, _START)
        if magic != b"HCLA":
            raise EvidenceError("the paravisor's report does not begin with HCLA")
        if version not in (1, 2) or claims_version != 1:
            raise _unsupported(f"a paravisor's report of version {version} with claims of version {claims_version}")
        if report_type != _SNP:
            raise _unsupported(f"a paravisor's report of type {report_type}; the one for SEV-SNP is {_SNP}")
        if hash_type not in _HASHES:
            raise _unsupported(f"runtime data hashed by method {hash_type}")
        if length > limits.runtime_data:
            raise EvidenceError(f"the runtime data has {length} bytes, more than {limits.runtime_data}")
        end = _START + _CLAIMS.size + length
        if size != end or claims_size != _CLAIMS.size + length or len(data) < end:
            raise EvidenceError("the lengths in the paravisor's report do not fit each other or the data")
        if data[end:].strip(b"\x00"):
            raise EvidenceError("something other than zero bytes follows the runtime data")
        runtime_data = data[_START + _CLAIMS.size : end]
        values = _json(runtime_data)
        return cls(
            encoded=data[:end],
            snp_report=data[_HEADER.size : _START],
            runtime_data=runtime_data,
            report_data=_HASHES[hash_type](runtime_data).digest().ljust(64, b"\x00"),
            attestation_key=_attestation_key(values),
            user_data=_user_data(values),
        )


def _json(data: bytes) -> dict[str, object]:
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=strict.unique)
    except (ValueError, RecursionError) as error:
        raise EvidenceError("the runtime data is not JSON") from error
    if not isinstance(value, dict):
        raise EvidenceError("the runtime data is not a JSON object")
    return value


def _attestation_key(values: dict[str, object]) -> rsa.RSAPublicKey:
    keys = values.get("keys")
    if not isinstance(keys, list):
        raise EvidenceError("the runtime data has no list of keys")
    found = [key for key in keys if isinstance(key, dict) and key.get("kid") == _ATTESTATION_KEY]
    if len(found) != 1:
        raise EvidenceError(f"the runtime data has {len(found)} keys named {_ATTESTATION_KEY}, not one")
    key = found[0]
    if key.get("kty") != "RSA" or key.get("key_ops") != ["sign"]:
        raise EvidenceError(f"{_ATTESTATION_KEY} is not an RSA key that signs")
    exponent, modulus = _number(key.get("e")), _number(key.get("n"))
    if exponent != _EXPONENT or modulus.bit_length() not in _MODULUS_BITS or modulus % 2 == 0:
        raise EvidenceError(f"{_ATTESTATION_KEY} is not an RSA key of 2048 to 4096 bits with the exponent 65537")
    try:
        return rsa.RSAPublicNumbers(exponent, modulus).public_key()
    except ValueError as error:
        raise EvidenceError(f"{_ATTESTATION_KEY} is not an RSA key") from error


def _number(text: object) -> int:
    """Base64url without padding, RFC 7518, 2."""
    if not isinstance(text, str) or not _BASE64URL.fullmatch(text):
        raise EvidenceError(f"{_ATTESTATION_KEY} is not in base64url")
    try:
        return int.from_bytes(base64.urlsafe_b64decode(text + "=" * (-len(text) % 4)), "big")
    except binascii.Error as error:
        raise EvidenceError(f"{_ATTESTATION_KEY} is not in base64url") from error


def _user_data(values: dict[str, object]) -> bytes | None:
    if "user-data" not in values:
        return None
    text = values["user-data"]
    # Upper case in the reports seen; versions of the paravisor differ.
    if not isinstance(text, str) or not _USER_DATA.fullmatch(text):
        raise EvidenceError("the runtime data's user-data is not 64 bytes in hexadecimal")
    return bytes.fromhex(text)


def _unsupported(what: str) -> UnsupportedError:
    return UnsupportedError(Step.CPU_REPORT, f"this version cannot verify {what}; use a version that can")
