"""What a verifier trusts before it looks at any evidence."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

AMD_ARK: Mapping[str, frozenset[bytes]] = MappingProxyType(
    {
        "Milan": frozenset({bytes.fromhex("9f056bee44377e29308cb5ffa895bdfb62d18881fa6bed8d6f075b0204089cb9")}),
        "Genoa": frozenset({bytes.fromhex("429a69c9422aa258ee4d8db5fcda9c6470ef15f8cd5a9cebd6cbc7d90b863831")}),
        "Turin": frozenset({bytes.fromhex("4f125410563a2ab9a50356f9243f6fe0b6f73de98603f53f90339c70e9d7ad08")}),
    }
)
"""AMD's root keys by product line (Siena and Bergamo are Genoa's)."""
NVIDIA_DEVICE = frozenset({bytes.fromhex("a90c4eb5acfd3e3d03a25db6a26b84f720ad0503196c627c21ddd48dd85b06a4")})
"""NVIDIA Device Identity CA."""
NVIDIA_RIM = frozenset({bytes.fromhex("dec1dc316477aa851eebdf51327ae9f864bc8d89254657ed1e7eb9168af1e1a3")})
"""NVIDIA's signing root of reference integrity manifests (CoRIM)."""
INTEL_SGX = frozenset({bytes.fromhex("a0af031289f5d5d4132f9186068a7fc13628633ba235777472e29b6b6c67a49e")})
"""Intel SGX Root CA."""


@dataclass(frozen=True)
class TrustRoots:
    """Keys from which trust starts; an argument of every verification, never a global.

    Each is a SHA-256 of a SubjectPublicKeyInfo. `TrustRoots()` has the vendors' roots.
    """

    amd_ark: Mapping[str, frozenset[bytes]] = field(default_factory=lambda: AMD_ARK)
    nvidia_device: frozenset[bytes] = NVIDIA_DEVICE
    nvidia_rim: frozenset[bytes] = NVIDIA_RIM
    intel_sgx: frozenset[bytes] = INTEL_SGX
    simulated: frozenset[bytes] | None = None
    """Keys that may sign simulated reports. They are made when a backend starts, so there is no root: that such a
    report counts at all is the policy's decision (`cpu = ["simulated"]`). None: no key is known beforehand, so any key
    may sign. An empty set: none may."""
