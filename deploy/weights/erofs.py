"""Writes an uncompressed EROFS image whose every byte follows from the files' paths and contents.

mkfs.erofs keeps the modes and owners of its source folder and lays files out differently in each release, so two people
would get two dm-verity root hashes for the same weights. Here everything belongs to root, is read-only and has time 0.
Files lie one after another in the order of their paths, each in whole blocks, so the kernel reads them in long runs.
Format: the kernel's filesystems/erofs.rst and fs/erofs/erofs_fs.h; extended inodes with plain data only, which every
kernel since 5.4 reads. There are no links: a link's target is written in its place.
"""

import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import BinaryIO

BLOCK = 4096
_MAGIC = 0xE0F5E1E2
_SUPERBLOCK_AT = 1024
# magic, checksum, compatible features, log2(block), slots, root, inodes, time s, ns, blocks, inode block, xattr block,
# uuid, name, incompatible features.
_SUPERBLOCK = struct.Struct("<IIIBBHQQIIII16s16sI44x")
# format, xattrs, mode, reserved, size, block, number, uid, gid, mtime s, ns, links.
_INODE = struct.Struct("<HHHHQIIIIQII16x")
_DIRENT = struct.Struct("<QHBB")
_SLOT = 32
_FIRST_NID = BLOCK // _SLOT  # Inodes start in block 1.
_EXTENDED_PLAIN = 1
_FILE, _FOLDER = 1, 2
_FILE_MODE, _FOLDER_MODE = 0o100444, 0o040555
_MAX_NAME = 255


class ImageError(Exception):
    """The image cannot be written. The text says why."""


@dataclass
class _Node:
    """A file (`entries` is None) or a folder with its entries."""

    size: int = 0
    path: str = ""
    entries: "dict[bytes, _Node] | None" = None
    nid: int = 0
    parent: "_Node | None" = None
    block: int = 0
    data: bytes = field(default=b"", repr=False)


def write(
    out: BinaryIO,
    files: Iterable[tuple[str, int]],
    copy: Callable[[str, BinaryIO], int],
    uuid: bytes,
) -> int:
    """Writes the image of `files` (path with forward slashes, size in bytes) to `out` from its start.

    `copy(path, out)` writes one file's content and returns its length. Returns the image's size in bytes. Raises
    `ImageError` if a length is not the stated size, or if a path cannot be in an EROFS folder.
    """
    root = _tree(files)
    nodes = list(_order(root))
    for index, node in enumerate(nodes):
        node.nid = _FIRST_NID + index * (_INODE.size // _SLOT)
    next_block = 1 + _blocks(len(nodes) * _INODE.size)
    for node in [*(n for n in nodes if n.entries is not None), *(n for n in nodes if n.entries is None)]:
        if node.entries is not None:
            node.data = _folder(node)
            node.size = len(node.data)
        node.block = next_block if node.size else 0
        next_block += _blocks(node.size)
    if next_block >= 1 << 32:
        raise ImageError("the files are larger than an EROFS image can be (16 TiB)")
    superblock = _SUPERBLOCK.pack(_MAGIC, 0, 0, 12, 0, root.nid, len(nodes), 0, 0, next_block, 0, 0, uuid, b"adytum", 0)
    out.write((b"\x00" * _SUPERBLOCK_AT + superblock).ljust(BLOCK, b"\x00"))
    _pad(out, out.write(b"".join(_inode(node, index + 1) for index, node in enumerate(nodes))))
    for node in nodes:
        if node.entries is not None:
            _pad(out, out.write(node.data))
    for node in nodes:
        if node.entries is None:
            if copy(node.path, out) != node.size:
                raise ImageError(f"{node.path} changed its size while it was read")
            _pad(out, node.size)
    return next_block * BLOCK


def _tree(files: Iterable[tuple[str, int]]) -> _Node:
    root = _Node(entries={})
    for path, size in files:
        *folders, name = PurePosixPath(path).parts
        place = root
        for part in folders:
            assert place.entries is not None
            key = _name(part)
            place = place.entries.setdefault(key, _Node(entries={}, parent=place))
            if place.entries is None:
                raise ImageError(f"{path}: {part} is a file and a folder")
        assert place.entries is not None
        if place.entries.setdefault(_name(name), node := _Node(size, path, parent=place)) is not node:
            raise ImageError(f"{path} occurs twice")
    return root


def _name(part: str) -> bytes:
    name = part.encode("utf-8", "surrogateescape")
    if len(name) > _MAX_NAME:
        raise ImageError("a name is longer than 255 bytes")
    return name


def _order(node: _Node) -> Iterable[_Node]:
    """A folder, then its entries by name. The root comes first, because its number has only 16 bits."""
    yield node
    for _, entry in sorted((node.entries or {}).items()):
        yield from _order(entry)


def _folder(node: _Node) -> bytes:
    """A folder's data: blocks of entries in the order of their names, each block's names after its entries."""
    assert node.entries is not None
    parent = node.parent or node
    entries = [(b".", node), (b"..", parent), *node.entries.items()]
    done, block, used = b"", list[tuple[bytes, _Node]](), 0
    for name, entry in sorted(entries, key=lambda item: item[0]):
        if used + _DIRENT.size + len(name) > BLOCK:
            done += _folder_block(block).ljust(BLOCK, b"\x00")
            block, used = [], 0
        block.append((name, entry))
        used += _DIRENT.size + len(name)
    return done + _folder_block(block)


def _folder_block(entries: list[tuple[bytes, _Node]]) -> bytes:
    place = len(entries) * _DIRENT.size
    head = b""
    for name, node in entries:
        head += _DIRENT.pack(node.nid, place, _FILE if node.entries is None else _FOLDER, 0)
        place += len(name)
    return head + b"".join(name for name, _ in entries)


def _inode(node: _Node, number: int) -> bytes:
    if node.entries is None:
        mode, links = _FILE_MODE, 1
    else:
        mode, links = _FOLDER_MODE, 2 + sum(entry.entries is not None for entry in node.entries.values())
    return _INODE.pack(_EXTENDED_PLAIN, 0, mode, 0, node.size, node.block, number, 0, 0, 0, 0, links)


def _blocks(size: int) -> int:
    return -(-size // BLOCK)


def _pad(out: BinaryIO, size: int) -> None:
    out.write(b"\x00" * (-size % BLOCK))
