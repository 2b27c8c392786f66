"""Bounds on every peer-controlled size."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Bounds on an evidence document and its parts. Sizes are in bytes, after base64 decoding."""

    document: int = 4 * 1024 * 1024
    """The whole document."""
    claims: int = 256 * 1024
    key_configurations: int = 64 * 1024
    """The list of key configurations; an X-Wing key is 1,216 bytes."""
    models: int = 256
    aliases: int = 64
    """Further names of one model."""
    text: int = 256
    """Characters of a name, a path or a version."""
    round: int = 65_536
    """Nonces in one round of collection, the leaves of its tree."""
    path: int = 16
    """Hashes in an inclusion path; 2^16 leaves need 16."""
    report: int = 64 * 1024
    """The CPU's report."""
    auxblob: int = 64 * 1024
    """The certificates that a host sends with a report."""
    certificates: int = 8
    certificate: int = 16 * 1024
    """One DER certificate."""
    gpu: int = 1024 * 1024
    """The bundle of the GPUs' evidence; one GPU takes about 12 KB."""
    gpus: int = 16
    tdx_collateral: int = 512 * 1024
    """Intel's collateral for one platform; a real one is about 20 KiB."""
    runtime_data: int = 32 * 1024
    """The runtime data that Azure's paravisor hashes into a report; a real one is about 1.2 KiB."""
    collateral: int = 512 * 1024
    """One piece of collateral; NVIDIA's manifests are about 25 KB, AMD's lists 2 KB."""
    fetched: int = 1024 * 1024
    """One answer of a vendor's service."""
    cached: int = 16 * 1024 * 1024
    """All vendors' answers in the cache; those for four GPUs take about 200 KB."""
    rims: int = 32
    ocsp: int = 64
    policy: int = 1024 * 1024
    """A policy file, or a release file."""
    release_measurements: int = 256
    release_versions: int = 8
    """Versions that one release accepts at once: the new one and those still draining."""
    release_keys: int = 8
    """Keys in a policy, and signatures of one release."""
    sequence: int = 2**53 - 1
    """Of a release; the largest integer that every JSON reader holds exactly."""
    vcpus: int = 4096
    """Virtual CPUs of one machine; KVM's own bound."""


LIMITS = Limits()
