"""The closed set of errors of this package, split by who is at fault. Messages are for people."""

import enum


class Step(enum.IntEnum):
    """The verifier's steps, in order. `verify.verify` says what each does."""

    STRUCTURE = 1
    NONCE = 2
    CPU_REPORT = 3
    BINDING = 4
    GPU = 5
    POLICY = 6

    @property
    def title(self) -> str:
        """For people: `cpu report`."""
        return self.name.lower().replace("_", " ")


class AttestationError(Exception):
    """Base of everything that this package raises."""


class EvidenceError(AttestationError):
    """The document, or the claims in it, do not follow the format."""

    step = Step.STRUCTURE


class VerificationError(AttestationError):
    """The document is well-formed and wrong: another nonce, a signature that does not hold, a binding that differs."""

    def __init__(self, step: Step, message: str) -> None:
        super().__init__(message)
        self.step = step


class PolicyError(AttestationError):
    """The evidence holds, and claims something that the policy does not accept."""

    step = Step.POLICY

    def __init__(self, claim: str, message: str) -> None:
        super().__init__(message)
        self.claim = claim


class PolicyFileError(AttestationError):
    """The policy file cannot be used. The message says which line to write."""


class CollectionError(AttestationError):
    """Evidence could not be made: a device failed, or a round was asked for what it does not have."""
