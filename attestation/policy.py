"""The appraisal policy: what a relying party accepts. Every rule is stated; nothing unset means skip."""

from dataclasses import dataclass
from os import PathLike
from typing import Literal, Self

from attestation import policy_file, rules
from attestation.evidence import CC_MODES, PADDINGS
from attestation.rules import Facts, Rule

PROVIDERS = frozenset({"simulated", "sev-snp", "tdx"})
"""Words that `cpu` may list. `verify` can check the simulated one in this version and refuses the others."""


@dataclass(frozen=True)
class Policy:
    """One rule for each claim. A rule that is not given is a missing argument, not a skipped check."""

    cpu: rules.Cpu
    measurement: rules.Measurement
    gpu: rules.Gpu
    cc_mode: rules.CcMode
    configuration: rules.Configuration
    software: rules.Software
    replica: rules.Replica
    tls: rules.Tls
    padding: rules.Padding
    age: rules.Age
    models: rules.Models

    @classmethod
    def default(cls, measurements: frozenset[bytes]) -> Self:
        """For production: hardware evidence with one of these launch measurements, GPUs attested, in CC mode On."""
        return cls(
            cpu=rules.Cpu(frozenset({"sev-snp"})),
            measurement=rules.Measurement(measurements),
            gpu=rules.Gpu("required"),
            cc_mode=rules.CcMode(frozenset({"on"})),
            configuration=rules.Configuration("any"),
            software=rules.Software("any"),
            replica=rules.Replica("any"),
            tls=rules.Tls("any"),
            padding=rules.Padding(frozenset({"pad"})),
            age=rules.Age(maximum_s=300, clock_skew_s=60),
            models=rules.Models("any"),
        )

    @classmethod
    def accept_simulated(cls) -> Self:
        """For a local demo, and for a backend that checks its own simulated evidence. Proves nothing about hardware."""
        return cls(
            cpu=rules.Cpu(frozenset({"simulated"})),
            measurement=rules.Measurement("any"),
            gpu=rules.Gpu("none"),
            cc_mode=rules.CcMode(frozenset({"none"})),
            configuration=rules.Configuration("any"),
            software=rules.Software("any"),
            replica=rules.Replica("any"),
            tls=rules.Tls("any"),
            padding=rules.Padding(frozenset({"off", "pad"})),
            age=rules.Age(maximum_s=300, clock_skew_s=60),
            models=rules.Models("any"),
        )

    @classmethod
    def from_toml(cls, source: bytes | PathLike[str]) -> Self:
        """Reads a policy: `bytes` are its text, a path is its file. Raises `PolicyFileError`."""
        file = policy_file.PolicyFile(source)
        gpu: Literal["none", "required"] = "none" if file.word("gpu", ("none", "required")) == "none" else "required"
        return cls(
            cpu=rules.Cpu(file.words("cpu", PROVIDERS)),
            measurement=rules.Measurement(file.digests("measurement", 48)),
            gpu=rules.Gpu(gpu),
            cc_mode=rules.CcMode(file.words("cc_mode", CC_MODES)),
            configuration=rules.Configuration(file.digests("configuration", 32)),
            software=rules.Software(file.names("software")),
            replica=rules.Replica(file.names("replica")),
            tls=rules.Tls("none" if file.is_word("tls", "none") else file.digests("tls", 32)),
            padding=rules.Padding(file.words("padding", PADDINGS)),
            age=rules.Age(file.seconds("maximum_age_s"), file.seconds("clock_skew_s")),
            models=rules.Models(file.roots("models")),
        )

    def to_toml(self) -> str:
        """The policy as a file with comments; `from_toml` reads it back."""
        return policy_file.render(
            {
                "cpu": self.cpu.accepted,
                "measurement": self.measurement.accepted,
                "gpu": self.gpu.expected,
                "cc_mode": self.cc_mode.accepted,
                "configuration": self.configuration.accepted,
                "software": self.software.accepted,
                "replica": self.replica.accepted,
                "tls": self.tls.accepted,
                "padding": self.padding.accepted,
                "maximum_age_s": self.age.maximum_s,
                "clock_skew_s": self.age.clock_skew_s,
                "models": self.models.roots,
            }
        )

    def evaluate(self, facts: Facts) -> None:
        """Applies every rule, in this order. Raises `PolicyError` for the first claim that is not accepted."""
        every: tuple[Rule, ...] = (
            self.cpu,
            self.measurement,
            self.gpu,
            self.cc_mode,
            self.configuration,
            self.software,
            self.replica,
            self.tls,
            self.padding,
            self.age,
            rules.KeysAlive(),
            self.models,
        )
        for rule in every:
            rule.check(facts)
