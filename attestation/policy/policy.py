"""The appraisal policy: what a relying party accepts. Every rule is stated; nothing unset means skip."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from os import PathLike
from types import MappingProxyType
from typing import Literal, Self, cast

from adytum.attestation.document.evidence import CC_MODES, PADDINGS, SANDBOXES
from adytum.attestation.document.facts import Facts
from adytum.attestation.policy import hardware, rules
from adytum.attestation.policy.file import PolicyFile, Value, render
from adytum.attestation.policy.rules import Rule
from adytum.attestation.reference.release import RequiredRelease

PROVIDERS = frozenset({"simulated", "sev-snp", "sev-snp-vtpm", "tdx"})
ARCHITECTURES = frozenset({"hopper", "blackwell"})
TDX_STATUS = frozenset(
    {
        "UpToDate",
        "SWHardeningNeeded",
        "ConfigurationNeeded",
        "ConfigurationAndSWHardeningNeeded",
        "OutOfDate",
        "OutOfDateConfigurationNeeded",
        "Revoked",
    }
)
PLATFORM_FLAGS = frozenset({"smt", "tsme", "ecc", "rapl_disabled", "ciphertext_hiding", "alias_check_complete", "tio"})
_MILAN = frozenset({"bootloader", "tee", "snp", "microcode"})
TCB_COMPONENTS: Mapping[str, frozenset[str]] = MappingProxyType(
    {"Milan": _MILAN, "Genoa": _MILAN, "Turin": _MILAN | {"fmc"}}
)
_CPU_RULES = (
    "cpu",
    "measurement",
    "release",
    "minimum_tcb",
    "debug",
    "migration",
    "vmpl",
    "platform",
    "chips",
    "pcrs",
    "tdx_status",
    "cpu_revocation",
)
_GPU_RULES = ("gpu_architecture", "gpu_driver", "gpu_vbios", "gpu_rims", "gpu_revocation")
_REFUSED = ("refused", "allowed")
_REQUIRED = ("required", "optional")
MAXIMUM_GPUS = 16


@dataclass(frozen=True)
class Policy:
    """One rule for each claim. A missing rule is a missing argument, not a skipped check."""

    cpu: rules.Cpu
    measurement: rules.Measurement
    release: rules.SignedRelease
    minimum_tcb: hardware.MinimumTcb
    debug: hardware.Debug
    migration: hardware.Migration
    vmpl: hardware.Vmpl
    platform: hardware.Platform
    chips: hardware.Chips
    pcrs: hardware.Pcrs
    tdx_status: hardware.TdxStatus
    cpu_revocation: hardware.CpuRevocation
    gpu: hardware.Gpu
    gpu_architecture: hardware.GpuArchitecture
    cc_mode: hardware.CcMode
    gpu_driver: hardware.GpuDriver
    gpu_vbios: hardware.GpuVbios
    gpu_rims: hardware.GpuRims
    gpu_revocation: hardware.GpuRevocation
    configuration: rules.Configuration
    software: rules.Software
    replica: rules.Replica
    tls: rules.Tls
    padding: rules.Padding
    sandbox: rules.Sandbox
    age: rules.Age
    models: rules.Models

    @classmethod
    def default(cls, measurements: frozenset[bytes]) -> Self:
        """For production: hardware evidence with one of these launch measurements, and attested GPUs in CC mode On."""
        return cls(
            cpu=rules.Cpu(frozenset({"sev-snp"})),
            measurement=rules.Measurement(measurements),
            release=rules.SignedRelease("none"),
            minimum_tcb=hardware.MinimumTcb("any"),
            debug=hardware.Debug("refused"),
            migration=hardware.Migration("refused"),
            vmpl=hardware.Vmpl(frozenset({0})),
            platform=hardware.Platform("any", "any"),
            chips=hardware.Chips("any"),
            pcrs=hardware.Pcrs("any"),
            tdx_status=hardware.TdxStatus(frozenset({"UpToDate"})),
            cpu_revocation=hardware.CpuRevocation("required"),
            gpu=hardware.Gpu("required"),
            gpu_architecture=hardware.GpuArchitecture("any"),
            cc_mode=hardware.CcMode(frozenset({"on"})),
            gpu_driver=hardware.GpuDriver("any"),
            gpu_vbios=hardware.GpuVbios("any"),
            gpu_rims=hardware.GpuRims("required"),
            gpu_revocation=hardware.GpuRevocation("required"),
            configuration=rules.Configuration("any"),
            software=rules.Software("any"),
            replica=rules.Replica("any"),
            tls=rules.Tls("any"),
            padding=rules.Padding(frozenset({"pad", "constant"})),
            sandbox=rules.Sandbox(frozenset({"full"})),
            age=rules.Age(maximum_s=300, clock_skew_s=60),
            models=rules.Models("any"),
        )

    @classmethod
    def accept_simulated(cls) -> Self:
        """For a local demo, and for a backend that checks its own simulated evidence. Proves nothing about hardware."""
        return replace(
            cls.default(frozenset()),
            cpu=rules.Cpu(frozenset({"simulated"})),
            measurement=rules.Measurement("any"),
            gpu=hardware.Gpu("none"),
            cc_mode=hardware.CcMode(frozenset({"none"})),
            padding=rules.Padding(PADDINGS),
            sandbox=rules.Sandbox(frozenset({"full", "none"})),
        )

    @classmethod
    def self_check(cls, provider: str, cc_mode: str, gpus: bool) -> Self:
        """For a backend's own evidence: it is valid, and from the hardware that the configuration names.

        Whether that is enough, and whether the vendors' collateral is there already, each client's policy decides.
        """
        return replace(
            cls.accept_simulated(),
            cpu=rules.Cpu(frozenset({provider})),
            vmpl=hardware.Vmpl("any"),
            tdx_status=hardware.TdxStatus("any"),
            cpu_revocation=hardware.CpuRevocation("optional"),
            gpu=hardware.Gpu("required" if gpus else "none"),
            cc_mode=hardware.CcMode(frozenset({cc_mode})),
            gpu_rims=hardware.GpuRims("optional"),
            gpu_revocation=hardware.GpuRevocation("optional"),
        )

    @classmethod
    def from_toml(cls, source: bytes | PathLike[str]) -> Self:
        """Reads a policy from its text (`bytes`) or its file (a path). Raises `PolicyFileError`."""
        file = PolicyFile(source)
        return cls(
            cpu=rules.Cpu(file.words("cpu", PROVIDERS)),
            measurement=rules.Measurement(file.digests("measurement", 48)),
            release=rules.SignedRelease(file.release("release")),
            minimum_tcb=hardware.MinimumTcb(file.levels("minimum_tcb", TCB_COMPONENTS)),
            debug=hardware.Debug(cast(hardware.Allowed, file.word("debug", _REFUSED))),
            migration=hardware.Migration(cast(hardware.Allowed, file.word("migration", _REFUSED))),
            vmpl=hardware.Vmpl(file.numbers("vmpl", 3)),
            platform=hardware.Platform(
                file.choices("platform_set", PLATFORM_FLAGS), file.choices("platform_clear", PLATFORM_FLAGS)
            ),
            chips=hardware.Chips(file.digests("chips", 64)),
            pcrs=hardware.Pcrs(file.registers("pcrs")),
            tdx_status=hardware.TdxStatus(file.choices("tdx_status", TDX_STATUS)),
            cpu_revocation=hardware.CpuRevocation(cast(hardware.Required, file.word("cpu_revocation", _REQUIRED))),
            gpu=hardware.Gpu(
                cast(Literal["none", "required"] | int, file.count("gpu", ("none", "required"), MAXIMUM_GPUS))
            ),
            gpu_architecture=hardware.GpuArchitecture(file.choices("gpu_architecture", ARCHITECTURES)),
            cc_mode=hardware.CcMode(file.words("cc_mode", CC_MODES)),
            gpu_driver=hardware.GpuDriver(file.names("gpu_driver")),
            gpu_vbios=hardware.GpuVbios(file.names("gpu_vbios")),
            gpu_rims=hardware.GpuRims(cast(hardware.Required, file.word("gpu_rims", _REQUIRED))),
            gpu_revocation=hardware.GpuRevocation(cast(hardware.Required, file.word("gpu_revocation", _REQUIRED))),
            configuration=rules.Configuration(file.digests("configuration", 32)),
            software=rules.Software(file.names("software")),
            replica=rules.Replica(file.names("replica")),
            tls=rules.Tls("none" if file.is_word("tls", "none") else file.digests("tls", 32)),
            padding=rules.Padding(file.words("padding", PADDINGS)),
            sandbox=rules.Sandbox(file.words("sandbox", SANDBOXES)),
            age=rules.Age(file.seconds("maximum_age_s"), file.seconds("clock_skew_s")),
            models=rules.Models(file.roots("models")),
        )

    def to_toml(self) -> str:
        """The policy as a commented file, which `from_toml` reads back."""
        return render(
            {
                "cpu": self.cpu.accepted,
                "measurement": self.measurement.accepted,
                "release": _release(self.release.required),
                "minimum_tcb": self.minimum_tcb.minimum,
                "debug": self.debug.verdict,
                "migration": self.migration.verdict,
                "vmpl": self.vmpl.accepted,
                "platform_set": self.platform.set_,
                "platform_clear": self.platform.clear,
                "chips": self.chips.accepted,
                "pcrs": self.pcrs.values,
                "tdx_status": self.tdx_status.accepted,
                "cpu_revocation": self.cpu_revocation.verdict,
                "gpu": self.gpu.expected,
                "gpu_architecture": self.gpu_architecture.accepted,
                "cc_mode": self.cc_mode.accepted,
                "gpu_driver": self.gpu_driver.accepted,
                "gpu_vbios": self.gpu_vbios.accepted,
                "gpu_rims": self.gpu_rims.verdict,
                "gpu_revocation": self.gpu_revocation.verdict,
                "configuration": self.configuration.accepted,
                "software": self.software.accepted,
                "replica": self.replica.accepted,
                "tls": self.tls.accepted,
                "padding": self.padding.accepted,
                "sandbox": self.sandbox.accepted,
                "maximum_age_s": self.age.maximum_s,
                "clock_skew_s": self.age.clock_skew_s,
                "models": self.models.roots,
            }
        )

    def evaluate(self, facts: Facts) -> None:
        """Applies every rule, in this order. Raises `PolicyError` for the first claim that is not accepted."""
        self._apply(facts, [field.name for field in fields(self)])
        rules.KeysAlive().check(facts)

    def evaluate_cpu(self, facts: Facts) -> None:
        """Applies only the rules about the CPU, for a report that is judged by itself. Raises `PolicyError`."""
        self._apply(facts, _CPU_RULES)

    def evaluate_gpus(self, facts: Facts) -> None:
        """Applies only the rules about GPUs, for reports that are judged by themselves. Raises `PolicyError`."""
        self._apply(facts, _GPU_RULES)

    def _apply(self, facts: Facts, names: Iterable[str]) -> None:
        for name in names:
            rule: Rule = getattr(self, name)
            rule.check(facts)


def _release(required: RequiredRelease | Literal["none"]) -> Value:
    if required == "none":
        return required
    return {"file": required.file, "keys": required.keys, "minimum": required.minimum}
