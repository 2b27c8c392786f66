"""The end of an OVMF image, composed from facts: 4 KiB whose tables are those of edk2's OvmfPkg/AmdSev build.

The addresses are the build's (OvmfPkg/ResetVector, AmdSevX64.fdf); nothing else of the firmware is here. With the
launch digest of the real firmware's pages in place of these bytes', the measurement has to be the one that
sev-snp-measure publishes for the real firmware.
"""

import struct
import uuid

_FOOTER = "96b582de-1fb2-45f7-baea-a366c55a082d"
_HASH_TABLE = "7255371f-3a3b-4b04-927b-1da6efa8d454"
_RESET_BLOCK = "00f771de-1a7e-4fcb-890e-68c77e2fb44e"
_METADATA = "dc886566-984a-4798-a75e-5585a7bf67cc"
_MEMORY, _SECRETS, _CPUID, _SVSM, _HASHES = 1, 2, 3, 4, 0x10
AMD_SEV = (
    (0x800000, 0x9000, _MEMORY),
    (0x80A000, 0x3000, _MEMORY),
    (0x80D000, 0x1000, _SECRETS),
    (0x80E000, 0x1000, _CPUID),
    (0x80F000, 0x1000, _SVSM),
    (0x810000, 0x1000, _HASHES),
    (0x811000, 0xF000, _MEMORY),
)
WITHOUT_HASHES = tuple(section for section in AMD_SEV if section[2] != _HASHES)
RESET_EIP = 0x80B004
HASH_TABLE = 0x810C00


def end(sections: tuple[tuple[int, int, int], ...] = AMD_SEV, size: int = 4096) -> bytes:
    """The last `size` bytes of a firmware with these sections."""
    metadata = b"ASEV" + struct.pack("<III", 16 + 12 * len(sections), 1, len(sections))
    metadata += b"".join(struct.pack("<III", *section) for section in sections)
    blocks = _entry(_HASH_TABLE, struct.pack("<II", HASH_TABLE, 0x400)) + _entry(
        _RESET_BLOCK, struct.pack("<I", RESET_EIP)
    )
    below = len(metadata) + len(blocks) + 4 + 18 + 18 + 32
    table = blocks + _entry(_METADATA, struct.pack("<I", below))
    footer = struct.pack("<H", len(table) + 18) + uuid.UUID(_FOOTER).bytes_le
    return (metadata + table + footer + bytes(32)).rjust(size, b"\0")


def _entry(guid: str, data: bytes) -> bytes:
    return data + struct.pack("<H", len(data) + 18) + uuid.UUID(guid).bytes_le
