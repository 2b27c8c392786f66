"""What a verifier trusts before it looks at any evidence."""

from dataclasses import dataclass


@dataclass(frozen=True)
class TrustRoots:
    """Keys from which trust starts; an argument of `verify`, never a global.

    This version verifies simulated evidence only. Its key is made when a backend starts, so there is no root: that it
    counts at all is the policy's decision (`cpu = ["simulated"]`), and a key known beforehand can be pinned here.
    """

    simulated: frozenset[bytes] | None = None
    """SHA-256 of the SubjectPublicKeyInfo of each key that may sign simulated reports. None: no key is known
    beforehand, so any may. An empty set: none may."""
