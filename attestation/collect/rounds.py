"""Makes evidence: one report of the CPU and one bundle of the GPUs for all nonces of a round.

Devices are behind two ports. An implementation turns a device's failure into `CollectionError`.
"""

from collections.abc import Sequence
from typing import Protocol

from adytum.attestation.core.errors import CollectionError
from adytum.attestation.core.limits import LIMITS
from adytum.attestation.document.binding import NONCE_SIZE, NonceTree, gpu_nonce, report_data
from adytum.attestation.document.evidence import NO_GPUS, Claims, Collateral, CpuEvidence, Evidence, NonceProof

_NONCES = b'"nonces":'


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


class Endorsements(Protocol):
    """What the vendors signed about these devices. Never fetches: it returns what a background task has fetched."""

    def collateral(self, cpu: CpuEvidence, gpu: bytes) -> Collateral:
        """For one CPU's evidence and one GPU bundle. Raises `CollectionError` if it is not there yet."""


class NoEndorsements:
    """For simulated devices, about which no vendor signs anything."""

    def collateral(self, cpu: CpuEvidence, gpu: bytes) -> Collateral:
        """The empty collateral."""
        return Collateral()


class Round:
    """One round of collection. Each nonce has its own document; they share everything but the inclusion proof."""

    def __init__(self, nonces: Sequence[bytes], tree: NonceTree, evidence: Evidence) -> None:
        self._places = {nonce: place for place, nonce in enumerate(nonces)}
        self._tree = tree
        # No string of a canonical document contains quotes, so this occurs once.
        self._before, _, rest = evidence.encode().partition(_NONCES)
        self._after = rest[rest.index(b"}") :]

    def __repr__(self) -> str:
        return f"Round({self._tree.size} nonces)"

    def pieces(self, nonce: bytes) -> tuple[bytes, bytes, bytes]:
        """The document in three pieces, the first and last shared by the whole round. Raises `CollectionError`."""
        place = self._places.get(nonce)
        if place is None:
            raise CollectionError("this nonce was not in the round")
        proof = NonceProof(self._tree.root, place, self._tree.size, self._tree.path(place)).encode()
        return self._before, _NONCES + proof[:-1], self._after

    def document(self, nonce: bytes) -> bytes:
        """The evidence document for one nonce of the round. Raises `CollectionError`."""
        return b"".join(self.pieces(nonce))


class Collector:
    """Collects rounds of evidence."""

    def __init__(self, cpu: CpuDevice, gpus: GpuDevices, endorsements: Endorsements) -> None:
        self._cpu = cpu
        self._gpus = gpus
        self._endorsements = endorsements

    def collect(self, claims: Claims, nonces: Sequence[bytes]) -> Round:
        """One report for all these nonces; a nonce given twice counts once. Raises `AttestationError`."""
        asked = list(dict.fromkeys(nonces))
        if not 1 <= len(asked) <= LIMITS.round or any(len(nonce) != NONCE_SIZE for nonce in asked):
            raise CollectionError(f"a round takes 1 to {LIMITS.round} nonces of {NONCE_SIZE} bytes")
        encoded = claims.encode()
        tree = NonceTree(asked)
        gpu = self._gpus.collect(gpu_nonce(tree.root, encoded))
        cpu = self._cpu.report(report_data(tree.root, encoded, gpu))
        proof = NonceProof(tree.root, 0, tree.size, tree.path(0))
        return Round(asked, tree, Evidence(encoded, proof, cpu, gpu, self._endorsements.collateral(cpu, gpu)))
