"""The policy's rules: one claim, one class. A rule passes or raises `PolicyError`; none can be unset."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol, TypeVar

from adytum.attestation.core.errors import PolicyError
from adytum.attestation.document.facts import Facts
from adytum.attestation.reference import release

AnyValue = Literal["any"]
"""Written out where a relying party does not care."""
T = TypeVar("T", str, bytes)


class Rule(Protocol):
    """Judges one claim."""

    def check(self, facts: Facts) -> None:
        """Raises `PolicyError` if the claim is not accepted."""


@dataclass(frozen=True)
class Cpu:
    """Whose CPU evidence counts."""

    accepted: frozenset[str]

    def check(self, facts: Facts) -> None:
        if facts.cpu.provider in self.accepted:
            return
        advice = ""
        if facts.cpu.provider == "simulated":
            advice = '. Simulated evidence proves nothing about hardware; for a local demo write cpu = ["simulated"]'
        raise PolicyError(
            "cpu", f"the CPU evidence is {facts.cpu.provider}; the policy accepts {_list(self.accepted)}{advice}"
        )


@dataclass(frozen=True)
class Measurement:
    """What the CPU measured at launch."""

    accepted: frozenset[bytes] | AnyValue

    def check(self, facts: Facts) -> None:
        one_of("measurement", "the launch measurement", facts.cpu.measurement, self.accepted)


@dataclass(frozen=True)
class SignedRelease:
    """Whether launch and configuration have to be those of one version in a signed release."""

    required: release.RequiredRelease | Literal["none"]

    def check(self, facts: Facts) -> None:
        if self.required == "none":
            return
        found = self.required.release
        # A report that is judged by itself states no configuration.
        configuration = None if facts.claims is None else facts.claims.configuration_sha256
        if found.version(facts.cpu.measurement, configuration) is None:
            stated = "" if configuration is None else f" with the configuration {configuration.hex()}"
            raise PolicyError(
                "release",
                f"no version in the release {found.sequence} ({', '.join(v.name for v in found.versions)}) has the "
                f"launch measurement {facts.cpu.measurement.hex()}{stated}",
            )


@dataclass(frozen=True)
class Models:
    """Which models, with which weights. Every model that the backend claims has to be listed here."""

    roots: Mapping[str, bytes] | AnyValue

    def check(self, facts: Facts) -> None:
        if self.roots == "any":
            return
        for model in facts.stated.models:
            root = self.roots.get(model.id)
            if root is None:
                raise PolicyError("models", f"the backend serves {model.id}, which the policy does not list")
            if root != model.weights_root:
                raise PolicyError(
                    "models",
                    f"the weights of {model.id} have the root {model.weights_root.hex()}, "
                    f"the policy wants {root.hex()}",
                )


@dataclass(frozen=True)
class Configuration:
    """The SHA-256 of the backend's configuration."""

    accepted: frozenset[bytes] | AnyValue

    def check(self, facts: Facts) -> None:
        one_of("configuration", "the configuration's SHA-256", facts.stated.configuration_sha256, self.accepted)


@dataclass(frozen=True)
class Software:
    """The backend's software version."""

    accepted: frozenset[str] | AnyValue

    def check(self, facts: Facts) -> None:
        one_of("software", "the software version", facts.stated.software_version, self.accepted)


@dataclass(frozen=True)
class Replica:
    """The backend's name."""

    accepted: frozenset[str] | AnyValue

    def check(self, facts: Facts) -> None:
        one_of("replica", "the replica", facts.stated.replica, self.accepted)


@dataclass(frozen=True)
class Tls:
    """The key of the outer TLS. `none`: the backend must not claim one."""

    accepted: frozenset[bytes] | Literal["any", "none"]

    def check(self, facts: Facts) -> None:
        key = facts.stated.tls_spki_sha256
        if self.accepted == "any" or (self.accepted == "none" and key is None):
            return
        if self.accepted == "none":
            raise PolicyError("tls", "the backend claims a TLS key, and the policy says that it has none")
        if key is None:
            raise PolicyError("tls", "the backend claims no TLS key, and the policy requires one of those it lists")
        one_of("tls", "the TLS key's SHA-256", key, self.accepted)


@dataclass(frozen=True)
class Padding:
    """Whether the lengths of answers and events are padded."""

    accepted: frozenset[str]

    def check(self, facts: Facts) -> None:
        one_of("padding", "the padding", facts.stated.padding, self.accepted)


@dataclass(frozen=True)
class Sandbox:
    """Whether the engines are isolated from the gateway and from each other."""

    accepted: frozenset[str]

    def check(self, facts: Facts) -> None:
        one_of("sandbox", "the engines' sandbox", facts.stated.sandbox, self.accepted)


@dataclass(frozen=True)
class Age:
    """How old a signed time may be, and how far the two clocks may be apart in either direction."""

    maximum_s: int
    clock_skew_s: int

    def check(self, facts: Facts) -> None:
        if not facts.signed_at:
            raise PolicyError("maximum_age_s", "nothing in the evidence says when it was made")
        for name, signed_at in facts.signed_at:
            age = facts.now - signed_at
            if age > self.maximum_s + self.clock_skew_s:
                raise PolicyError(
                    "maximum_age_s",
                    f"{name} is {age:.0f} s old; the policy allows {self.maximum_s} s "
                    f"and {self.clock_skew_s} s between the clocks",
                )
            if -age > self.clock_skew_s:
                raise PolicyError(
                    "clock_skew_s",
                    f"{name} lies {-age:.0f} s in the future; the policy allows {self.clock_skew_s} s. "
                    "Is this machine's clock right?",
                )


@dataclass(frozen=True)
class KeysAlive:
    """The claimed keys have not expired. Has no setting: nobody wants to seal to a key that is gone."""

    def check(self, facts: Facts) -> None:
        if facts.now >= facts.stated.keys_expire_at:
            raise PolicyError("keys_expire_at", "the claimed keys have expired; fetch new evidence")


def one_of(claim: str, what: str, value: T, accepted: Collection[T] | AnyValue) -> None:
    """Raises `PolicyError` if `value` is not among the accepted ones."""
    if accepted == "any" or value in accepted:
        return
    raise PolicyError(claim, f"{what} is {_show(value)}; the policy accepts {_list(accepted)}")


def _list(values: Collection[str] | Collection[bytes]) -> str:
    return ", ".join(sorted(_show(value) for value in values)) or "nothing"


def _show(value: str | bytes) -> str:
    return value.hex() if isinstance(value, bytes) else value
