"""The closed set of errors of this package, split by who is at fault. Messages are for people."""

import enum


class Step(enum.IntEnum):
    """The verifier's steps, in order. `verifier.document.verify` describes each."""

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
    """A document, report, certificate or manifest does not follow its format."""

    step = Step.STRUCTURE
    code = "malformed"


class VerificationError(AttestationError):
    """Well-formed and wrong: another nonce, an invalid signature, a binding that differs.

    `code` is for machines and does not change with the wording: what was checked, then what was wrong with it, like
    `snp.signature` or `gpu.rim.digest`.
    """

    def __init__(self, step: Step, code: str, message: str) -> None:
        super().__init__(message)
        self.step = step
        self.code = code


class UnsupportedError(VerificationError):
    """Refused because this version, or this installation, cannot check it. It was not shown to be wrong."""

    def __init__(self, step: Step, message: str) -> None:
        super().__init__(step, "unsupported", message)


class PolicyError(AttestationError):
    """The evidence is genuine, but claims something that the policy does not accept."""

    step = Step.POLICY

    def __init__(self, claim: str, message: str) -> None:
        super().__init__(message)
        self.claim = claim
        self.code = f"policy.{claim}"


class PolicyFileError(AttestationError):
    """The policy file cannot be used. The message says which line to write."""


class FetchError(AttestationError):
    """There is no document to verify: the address is unusable, or the backend sent no evidence."""


class CollectionError(AttestationError):
    """Evidence could not be made: a device failed, or the caller asked for something that is not there."""


class NotThereYet(CollectionError):
    """A vendor's answer is still being fetched in the background. Ask again later."""
