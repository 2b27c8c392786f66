"""The nonce tree against RFC 9162's own recursive definition, written here a second time."""

import hashlib

import pytest

from adytum.attestation.core.errors import Step, VerificationError
from adytum.attestation.document.binding import (
    NonceTree,
    gpu_nonce,
    report_data,
    root_from_path,
)

SIZES = range(1, 41)


def nonces(size: int) -> list[bytes]:
    return [hashlib.sha256(b"nonce %d" % number).digest() for number in range(size)]


def split(size: int) -> int:
    """The largest power of two smaller than `size`."""
    k = 1
    while k * 2 < size:
        k *= 2
    return k


def mth(entries: list[bytes]) -> bytes:
    """MTH, RFC 9162 section 2.1.1."""
    if len(entries) == 1:
        return hashlib.sha256(b"\x00" + entries[0]).digest()
    k = split(len(entries))
    return hashlib.sha256(b"\x01" + mth(entries[:k]) + mth(entries[k:])).digest()


def path(m: int, entries: list[bytes]) -> list[bytes]:
    """PATH, RFC 9162 section 2.1.3.1."""
    if len(entries) == 1:
        return []
    k = split(len(entries))
    if m < k:
        return [*path(m, entries[:k]), mth(entries[k:])]
    return [*path(m - k, entries[k:]), mth(entries[:k])]


@pytest.mark.parametrize("size", SIZES)
def test_tree_is_rfc_9162s(size: int) -> None:
    entries = nonces(size)
    tree = NonceTree(entries)
    assert tree.root == mth(entries)
    for index in range(size):
        assert list(tree.path(index)) == path(index, entries)
        assert root_from_path(entries[index], index, size, path(index, entries)) == mth(entries)


@pytest.mark.parametrize("size", SIZES)
def test_no_proof_serves_another_nonce_index_or_path(size: int) -> None:
    entries, root = nonces(size), mth(nonces(size))
    for index in range(size):
        proof = path(index, entries)

        def leads_to_root(nonce: bytes, at: int, length: int, nodes: list[bytes]) -> bool:
            try:
                return root_from_path(nonce, at, length, nodes) == root
            except VerificationError as error:
                return error.step != Step.NONCE  # Any other step would be a fault of its own.

        assert leads_to_root(entries[index], index, size, proof)
        for other in range(-1, size + 2):
            if other != index:
                assert not leads_to_root(entries[index], other, size, proof)
        assert not leads_to_root(b"\xaa" * 32, index, size, proof)
        for stranger in entries:
            if stranger != entries[index]:
                assert not leads_to_root(stranger, index, size, proof)
        for place in range(len(proof)):
            assert not leads_to_root(entries[index], index, size, proof[:place] + proof[place + 1 :])
            assert not leads_to_root(entries[index], index, size, [*proof[:place], b"\0" * 32, *proof[place + 1 :]])
            swapped = proof[:place] + proof[place : place + 2][::-1] + proof[place + 2 :]
            if swapped != proof:
                assert not leads_to_root(entries[index], index, size, swapped)
        assert not leads_to_root(entries[index], index, size, [*proof, b"\0" * 32])
        assert not leads_to_root(entries[index], index, size, [b"\0" * 32, *proof])


@pytest.mark.parametrize("size", SIZES)
def test_a_size_of_another_depth_for_this_leaf_is_refused(size: int) -> None:
    """A size is not hashed into the root: sizes that give the leaf the same path are the same proof, others are not."""
    entries = nonces(size)
    for index in range(size):
        proof = path(index, entries)
        for other in range(index + 1, 2 * size + 2):
            expected = len(path(index, nonces(other)))
            if expected != len(proof):
                with pytest.raises(VerificationError):
                    root_from_path(entries[index], index, other, proof)
        for other in (0, -1, index):
            with pytest.raises(VerificationError):
                root_from_path(entries[index], index, other, proof)


def test_an_inner_node_is_no_leaf() -> None:
    """The prefixes keep a client from being told that a hash inside the tree was its nonce."""
    entries = nonces(4)
    inner = hashlib.sha256(entries[0] + entries[1]).digest()
    assert root_from_path(inner, 0, 2, [mth(entries[2:])]) != mth(entries)


@pytest.mark.parametrize("bad", [[], [b""], [b"a" * 31], [b"a" * 32, b"a" * 33]])
def test_a_tree_takes_32_byte_nonces_only(bad: list[bytes]) -> None:
    with pytest.raises(ValueError, match="32 bytes"):
        NonceTree(bad)


@pytest.mark.parametrize("index", [-1, 3, 4])
def test_a_path_needs_a_leaf(index: int) -> None:
    with pytest.raises(ValueError, match="no such leaf"):
        NonceTree(nonces(3)).path(index)


def test_hash_inputs_byte_by_byte() -> None:
    root, claims, gpu = b"r" * 32, b'{"claims":1}', b"[]"
    claims_hash, gpu_hash = hashlib.sha256(claims).digest(), hashlib.sha256(gpu).digest()
    assert (
        report_data(root, claims, gpu)
        == hashlib.sha512(
            bytes.fromhex("61647974756d207265706f727420646174612076310072") + root[1:] + claims_hash + gpu_hash
        ).digest()
    )
    assert gpu_nonce(root, claims) == hashlib.sha256(b"adytum gpu nonce v1\0" + root + claims_hash).digest()
