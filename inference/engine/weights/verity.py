"""dm-verity's on-disk format: an image's description in a manifest, its superblock, and its root hash.

The kernel checks each block of a dm-verity device against a hash tree when it reads the block, and the root hash fixes
all blocks. Format: cryptsetup's wiki page "DMVerity" and the kernel's admin-guide/device-mapper/verity.rst; hash type 1
only (the salt comes first, digests are padded to a power of two). `tests/unit/engine/test_verity.py` compares with
veritysetup.
"""

import hashlib
import struct
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, BinaryIO

ALGORITHM = "sha256"
"""The only accepted hash algorithm; veritysetup's default."""
SUPERBLOCK_SIZE = 512
_SUPERBLOCK = struct.Struct("<8sII16s32sIIQH6x256s168x")
_MAGIC = b"verity\x00\x00"
_DIGEST = 32
_BLOCK_SIZES = tuple(512 << power for power in range(8))
_MAX_SALT = 256
_MAX_BLOCKS = 1 << 40


class VerityError(Exception):
    """Not a dm-verity description, superblock or image of the kind that is accepted here."""


@dataclass(frozen=True)
class Verity:
    """An image under dm-verity.

    `root_hash` and `salt` in lower-case hexadecimal; block sizes and `data_size` in bytes. The superblock and the tree
    follow the data in the same file, at `data_size`.
    """

    root_hash: str
    salt: str
    data_block_size: int
    hash_block_size: int
    data_size: int
    algorithm: str = ALGORITHM

    def __post_init__(self) -> None:
        if self.algorithm != ALGORITHM:
            raise VerityError(f"a dm-verity hash algorithm other than {ALGORITHM}")
        if len(_bytes(self.root_hash, "root hash")) != _DIGEST:
            raise VerityError("a dm-verity root hash of another length than 32 bytes")
        if len(_bytes(self.salt, "salt")) > _MAX_SALT:
            raise VerityError("a dm-verity salt longer than 256 bytes")
        if self.data_block_size not in _BLOCK_SIZES or self.hash_block_size not in _BLOCK_SIZES:
            raise VerityError("a dm-verity block size that is not a power of two from 512 to 65536")
        if type(self.data_size) is not int or self.data_size <= 0 or self.data_size % self.data_block_size:
            raise VerityError("a dm-verity data size that is not a number of whole blocks")

    @classmethod
    def from_json(cls, value: Any) -> "Verity":
        """From `to_json`. Raises `VerityError`, also if a field is missing or unknown."""
        try:
            return cls(**value)
        except TypeError as error:
            raise VerityError("a dm-verity description with other fields") from error

    def to_json(self) -> dict[str, str | int]:
        """The fields as a dictionary."""
        return asdict(self)


@dataclass(frozen=True)
class Superblock:
    """What veritysetup writes before the hash tree. It is data, not proof: only the root hash decides."""

    uuid: bytes
    data_block_size: int
    hash_block_size: int
    data_blocks: int
    salt: bytes

    @classmethod
    def parse(cls, data: bytes) -> "Superblock":
        """From the first 512 bytes. Raises `VerityError`."""
        if len(data) < SUPERBLOCK_SIZE:
            raise VerityError("a truncated dm-verity superblock")
        magic, version, hash_type, uuid, algorithm, data_block, hash_block, blocks, salt_size, salt = (
            _SUPERBLOCK.unpack_from(data)
        )
        if magic != _MAGIC or version != 1:
            raise VerityError("not a dm-verity superblock of version 1")
        if hash_type != 1 or algorithm.rstrip(b"\x00") != ALGORITHM.encode():
            raise VerityError(f"a dm-verity hash type other than 1 or an algorithm other than {ALGORITHM}")
        if data_block not in _BLOCK_SIZES or hash_block not in _BLOCK_SIZES or salt_size > _MAX_SALT:
            raise VerityError("a dm-verity superblock with impossible sizes")
        if not 0 < blocks <= _MAX_BLOCKS:
            raise VerityError("a dm-verity superblock with an impossible number of blocks")
        return cls(uuid, data_block, hash_block, blocks, salt[:salt_size])


def root_hash(
    data: BinaryIO,
    superblock: Superblock,
    progress: Callable[[int, int], None] | None = None,
) -> bytes:
    """The root hash of the data from the current position of `data`, 32 bytes. Raises `VerityError` if it is too short.

    The tree that is stored after the data is not read: a wrong tree makes the kernel refuse to read, but cannot make it
    accept other data.
    """
    salted = hashlib.sha256(superblock.salt)
    size, hash_block = superblock.data_block_size, superblock.hash_block_size
    if superblock.data_blocks == 1:
        return _hash(salted, _read(data, size))
    total, done = superblock.data_blocks * size, 0
    level = bytearray()
    # As much data at a time as makes one block of digests; the level above needs only the hash of that block.
    while done < total:
        piece = memoryview(_read(data, min(size * (hash_block // _DIGEST), total - done)))
        digests = b"".join([_hash(salted, piece[start : start + size]) for start in range(0, len(piece), size)])
        level += _hash(salted, digests.ljust(hash_block, b"\x00"))
        done += len(piece)
        if progress is not None:
            progress(done, total)
    while len(level) > _DIGEST:
        blocks = [bytes(level[start : start + hash_block]) for start in range(0, len(level), hash_block)]
        level = bytearray().join(_hash(salted, block.ljust(hash_block, b"\x00")) for block in blocks)
    return bytes(level)


def _hash(salted: Any, block: bytes | memoryview) -> bytes:
    digest = salted.copy()
    digest.update(block)
    value: bytes = digest.digest()
    return value


def _read(stream: BinaryIO, count: int) -> bytes:
    data = stream.read(count)
    if len(data) != count:
        raise VerityError("the image is shorter than its superblock says")
    return data


def _bytes(text: object, name: str) -> bytes:
    if not isinstance(text, str) or text != text.lower():
        raise VerityError(f"a dm-verity {name} that is not lower-case hexadecimal")
    try:
        return bytes.fromhex(text)
    except ValueError as error:
        raise VerityError(f"a dm-verity {name} that is not lower-case hexadecimal") from error
