"""The certificate table that a host sends with an SEV-SNP report (configfs-tsm's auxblob, the extended report).

AMD, "Guest Hypervisor Communication Block Standardization" (56421), 4.1.8.1: 24-byte entries {GUID, offset, length},
the last one zero, then the certificates. Real hosts put PEM there as well as DER.
"""

import struct
import uuid

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from adytum.attestation.core.certificates import load_all
from adytum.attestation.core.errors import EvidenceError
from adytum.attestation.core.limits import LIMITS

_ENTRY = struct.Struct("<16sII")
_NAMES = {
    uuid.UUID("63da758d-e664-4564-adc5-f4b93be8accd"): "vcek",
    uuid.UUID("a8074bc2-a25a-483e-aae6-39c045a0b8a1"): "vlek",
    uuid.UUID("4ab7b379-bbac-4fe4-a02f-05aef327c782"): "ask",
    uuid.UUID("c0b406a4-a803-4952-9743-3fb6014cd0ae"): "ark",
}


def certificates(table: bytes, signing_key: str) -> tuple[bytes, ...]:
    """The host's certificates for a report signed by `signing_key` (vcek or vlek), DER.

    Returns VEK, ASK or ASVK, and ARK if the table has all three; the VEK alone if it lacks another; nothing without the
    VEK. Entries of other kinds are ignored. Raises `EvidenceError` for a table that cannot be read.
    """
    found: dict[str, bytes] = {}
    for name, data in _entries(table):
        if name in found:
            raise EvidenceError(f"the host's certificate table has two entries for the {name}")
        found[name] = data
    if signing_key not in found:
        return ()
    names = (signing_key, "ask", "ark") if {"ask", "ark"} <= found.keys() else (signing_key,)
    return tuple(_one(found[name], name) for name in names)


def _entries(table: bytes) -> list[tuple[str, bytes]]:
    if len(table) > LIMITS.auxblob:
        raise EvidenceError(f"the host's certificate table is larger than {LIMITS.auxblob} bytes")
    entries: list[tuple[str, bytes]] = []
    for place in range(LIMITS.certificates + 1):
        if not table[place * _ENTRY.size :].strip(b"\0") and len(table) < (place + 1) * _ENTRY.size:
            # Only zeros are left: a buffer that the host did not fill.
            return entries
        if len(table) < (place + 1) * _ENTRY.size:
            raise EvidenceError("the host's certificate table ends inside an entry")
        guid, offset, length = _ENTRY.unpack_from(table, place * _ENTRY.size)
        if guid == bytes(16):
            if offset or length:
                raise EvidenceError("the host's certificate table does not end with an entry of zeros")
            return entries
        if length == 0 or offset + length > len(table):
            raise EvidenceError("an entry of the host's certificate table lies outside of it")
        # Real tables use the byte order of RFC 4122.
        if name := _NAMES.get(uuid.UUID(bytes=guid)):
            entries.append((name, table[offset : offset + length]))
    raise EvidenceError(f"the host's certificate table has more than {LIMITS.certificates} entries")


def _one(data: bytes, name: str) -> bytes:
    found: tuple[x509.Certificate, ...] = load_all(data, f"the host's {name.upper()} certificate")
    if len(found) != 1:
        raise EvidenceError(f"the host's certificate table has {len(found)} certificates in the entry for the {name}")
    return found[0].public_bytes(Encoding.DER)
