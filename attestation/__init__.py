"""Evidence about an adytum backend: its format, its collection and its verification.

The names below are what a relying party needs; all else is imported by its full path. The package stands alone: it
imports the standard library and `cryptography`, and for GPUs and TDX the libraries that README.md names.
"""

from typing import TYPE_CHECKING

__all__ = ["AttestationError", "Policy", "TrustRoots", "VerifiedEvidence", "verify"]

if TYPE_CHECKING:
    from adytum.attestation.core.errors import AttestationError
    from adytum.attestation.core.trust import TrustRoots
    from adytum.attestation.policy.policy import Policy
    from adytum.attestation.verifier.document import VerifiedEvidence, verify
else:
    _HOMES = {
        "AttestationError": "core.errors",
        "Policy": "policy.policy",
        "TrustRoots": "core.trust",
        "VerifiedEvidence": "verifier.document",
        "verify": "verifier.document",
    }

    def __getattr__(name: str) -> object:
        """Imports a name when it is first used: a gateway that imports one room must not load the verifier."""
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from importlib import import_module

        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
