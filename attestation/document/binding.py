"""How a report is tied to nonces, claims and GPU evidence: a Merkle tree (RFC 9162) over nonces, and two hashes."""

import hashlib
from collections.abc import Sequence

from adytum.attestation.core.errors import Step, VerificationError

NONCE_SIZE = 32
_REPORT_DATA = b"adytum report data v1\x00"
_GPU_NONCE = b"adytum gpu nonce v1\x00"


def _leaf(nonce: bytes) -> bytes:
    return hashlib.sha256(b"\x00" + nonce).digest()


def _node(left: bytes, right: bytes) -> bytes:
    return hashlib.sha256(b"\x01" + left + right).digest()


class NonceTree:
    """The tree over a round's nonces. It is built once; then every proof costs a few look-ups."""

    def __init__(self, nonces: Sequence[bytes]) -> None:
        if not nonces or any(len(nonce) != NONCE_SIZE for nonce in nonces):
            raise ValueError("a tree needs at least one nonce, and each has 32 bytes")
        levels = [[_leaf(nonce) for nonce in nonces]]
        while len(levels[-1]) > 1:
            below = levels[-1]
            level = [_node(below[at], below[at + 1]) for at in range(0, len(below) - 1, 2)]
            # An odd last node goes up unchanged: that is RFC 9162's split at the largest power of two.
            levels.append(level + below[len(below) & ~1 :])
        self._levels = levels
        self.size = len(nonces)
        self.root = levels[-1][0]

    def path(self, index: int) -> tuple[bytes, ...]:
        """The inclusion path of leaf `index`, RFC 9162 section 2.1.3.1."""
        if not 0 <= index < self.size:
            raise ValueError("no such leaf")
        path = []
        for level in self._levels:
            if index ^ 1 < len(level):
                path.append(level[index ^ 1])
            index >>= 1
        return tuple(path)


def root_from_path(nonce: bytes, index: int, size: int, path: Sequence[bytes]) -> bytes:
    """The root that a proof leads to, RFC 9162 section 2.1.3.2. Raises `VerificationError` if it fits no tree."""
    if not 0 <= index < size:
        raise VerificationError(Step.NONCE, "nonce.proof", "the inclusion proof's index lies outside its tree")
    fn, sn = index, size - 1
    result = _leaf(nonce)
    for node in path:
        if sn == 0:
            raise VerificationError(Step.NONCE, "nonce.proof", "the inclusion path is too long for its tree")
        if fn & 1 or fn == sn:
            result = _node(node, result)
            while not fn & 1 and fn:
                fn, sn = fn >> 1, sn >> 1
        else:
            result = _node(result, node)
        fn, sn = fn >> 1, sn >> 1
    if sn != 0:
        raise VerificationError(Step.NONCE, "nonce.proof", "the inclusion path is too short for its tree")
    return result


def report_data(root: bytes, claims: bytes, gpu: bytes) -> bytes:
    """The 64 bytes that the CPU's report has to carry."""
    return hashlib.sha512(_REPORT_DATA + root + hashlib.sha256(claims).digest() + hashlib.sha256(gpu).digest()).digest()


def gpu_nonce(root: bytes, claims: bytes) -> bytes:
    """The 32-byte nonce that the GPUs' reports have to carry."""
    return hashlib.sha256(_GPU_NONCE + root + hashlib.sha256(claims).digest()).digest()
