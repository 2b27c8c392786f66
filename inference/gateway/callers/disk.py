r"""A signed list of callers on a raw disk, for a virtual machine that mounts no file system of its host.

    0     "adytum callers v1 SIGNATURE LENGTH\n"   128 hexadecimal digits, a decimal number; zeros to 4096
    4096  the list, LENGTH bytes; zeros to the disk's end

The host writes the disk while the machine runs. A list that is read half old and half new does not verify, and is read
again.
"""

import mmap
import os
import re
import stat

HEADER = 4096
LARGEST = 4 << 20
"""Bytes of a list."""
_MAGIC = b"adytum callers v1 "
_FIRST = re.compile(re.escape(_MAGIC) + rb"([0-9a-f]{128}) ([1-9][0-9]{0,6})\n\x00*")


def pack(data: bytes, signature: str) -> bytes:
    """The whole disk, always of one size. Raises `ValueError` if the list is too long or the signature is invalid."""
    first = _MAGIC + f"{signature} {len(data)}\n".encode()
    if len(data) > LARGEST or _FIRST.fullmatch(first) is None:
        raise ValueError("the list is too long, empty, or its signature is not 128 hexadecimal digits")
    return first.ljust(HEADER, b"\0") + data.ljust(LARGEST, b"\0")


def head(descriptor: int) -> bytes | None:
    """The bytes that change with the list; `None` if this is not a disk of this kind."""
    first = _read(descriptor, HEADER, 0)
    return first if first.startswith(_MAGIC) else None


def unpack(descriptor: int) -> tuple[bytes, str] | None:
    """The list and its signature, not yet verified; `None` if this is an ordinary file. Raises `OSError`."""
    first = head(descriptor)
    if first is None:
        if stat.S_ISBLK(os.fstat(descriptor).st_mode):
            raise OSError("the disk is not one that `adytum callers disk` wrote")
        return None
    found = _FIRST.fullmatch(first)
    length = int(found[2]) if found else LARGEST + 1
    if found is None or length > LARGEST:
        raise OSError("the disk's first line is not what `adytum callers disk` writes")
    data = _read(descriptor, -(-length // HEADER) * HEADER, HEADER)[:length]
    if len(data) < length:
        raise OSError("the disk is shorter than its list")
    return data, found[1].decode()


def _read(descriptor: int, size: int, place: int) -> bytes:
    # Mapped memory has the alignment that O_DIRECT needs.
    with mmap.mmap(-1, size) as buffer:
        count = 0
        while count < size:
            with memoryview(buffer) as view, view[count:] as rest:
                got = os.preadv(descriptor, [rest], place + count)
            if not got:
                break
            count += got
        return buffer[:count]
