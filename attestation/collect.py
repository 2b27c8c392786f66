"""Makes evidence: one report of the CPU, one bundle of the GPUs, for all nonces of a round.

Devices come in through two ports. What implements them turns a device's failure into `CollectionError`.
"""

from collections.abc import Sequence
from typing import Protocol

from attestation.binding import NONCE_SIZE, NonceTree, gpu_nonce, report_data
from attestation.errors import CollectionError
from attestation.evidence import NO_GPUS, Claims, CpuEvidence, Evidence, NonceProof
from attestation.limits import LIMITS


class CpuDevice(Protocol):
    """The CPU that signs reports."""

    @property
    def provider(self) -> str:
        """Its name in documents."""

    def report(self, report_data: bytes) -> CpuEvidence:
        """A report that carries these 64 bytes. Raises `CollectionError`."""


class GpuDevices(Protocol):
    """All GPUs of the machine."""

    def collect(self, nonce: bytes) -> bytes:
        """The bundle of their evidence on a 32-byte nonce. Raises `CollectionError`."""


class NoGpus:
    """A machine without GPUs."""

    def collect(self, nonce: bytes) -> bytes:
        """The empty bundle."""
        return NO_GPUS


class Round:
    """One round of collection. Every nonce of it gets a document; all share one report."""

    def __init__(self, nonces: Sequence[bytes], tree: NonceTree, claims: bytes, cpu: CpuEvidence, gpu: bytes) -> None:
        self._places = {nonce: place for place, nonce in enumerate(nonces)}
        self._tree = tree
        self._claims = claims
        self._cpu = cpu
        self._gpu = gpu

    def __repr__(self) -> str:
        return f"Round({self._tree.size} nonces)"

    def document(self, nonce: bytes) -> bytes:
        """The evidence document for one nonce of the round."""
        place = self._places.get(nonce)
        if place is None:
            raise CollectionError("this nonce was not in the round")
        proof = NonceProof(self._tree.root, place, self._tree.size, self._tree.path(place))
        return Evidence(self._claims, proof, self._cpu, self._gpu).encode()


class Collector:
    """Collects rounds of evidence."""

    def __init__(self, cpu: CpuDevice, gpus: GpuDevices) -> None:
        self._cpu = cpu
        self._gpus = gpus

    def collect(self, claims: Claims, nonces: Sequence[bytes]) -> Round:
        """One report for all these nonces; a nonce given twice counts once. Raises `AttestationError`."""
        asked = list(dict.fromkeys(nonces))
        if not 1 <= len(asked) <= LIMITS.round or any(len(nonce) != NONCE_SIZE for nonce in asked):
            raise CollectionError(f"a round takes 1 to {LIMITS.round} nonces of {NONCE_SIZE} bytes")
        encoded = claims.encode()
        tree = NonceTree(asked)
        gpu = self._gpus.collect(gpu_nonce(tree.root, encoded))
        cpu = self._cpu.report(report_data(tree.root, encoded, gpu))
        return Round(asked, tree, encoded, cpu, gpu)
