"""What a verification did, in order, for the person or program that reads its result."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Check:
    """One thing that was checked and holds, or that was not checked because its input was missing."""

    code: str
    """For machines: `snp.signature`. It is also the code of the `VerificationError` if the check fails."""
    says: str
    """For people: one line, what it means."""


@dataclass
class Checks:
    """Filled while verification runs. It decides nothing: a check that fails raises."""

    passed: list[Check] = field(default_factory=list)
    not_given: list[Check] = field(default_factory=list)

    def ok(self, code: str, says: str) -> None:
        """Notes a check that held."""
        self.passed.append(Check(code, says))

    def lacks(self, code: str, says: str) -> None:
        """Notes a check that was not made because its input was missing. A policy that requires the check refuses."""
        self.not_given.append(Check(code, says))

    def add(self, other: "Checks", prefix: str) -> None:
        """Adds the notes of another verification, which `prefix` names."""
        self.passed += [Check(check.code, f"{prefix}: {check.says}") for check in other.passed]
        self.not_given += [Check(check.code, f"{prefix}: {check.says}") for check in other.not_given]
