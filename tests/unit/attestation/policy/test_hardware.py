"""Each rule about hardware on both sides of its border, judged by itself; and the signed release file."""

import contextlib
from dataclasses import fields, replace
from typing import Any

import pytest

from adytum.attestation.core.errors import PolicyError
from adytum.attestation.document.facts import CpuFacts, Facts, GpuFacts, SnpFacts, TdxFacts
from adytum.attestation.policy.hardware import (
    CcMode,
    Chips,
    CpuRevocation,
    Debug,
    Gpu,
    GpuArchitecture,
    GpuDriver,
    GpuRevocation,
    GpuRims,
    GpuVbios,
    Migration,
    MinimumTcb,
    Pcrs,
    Platform,
    TdxStatus,
    Vmpl,
)
from adytum.attestation.policy.policy import Policy
from adytum.attestation.policy.rules import Rule
from tests.unit.attestation.support import CLAIMS, NOW, START

GPU = GpuFacts(
    "hopper",
    "550.90.07",
    "96.00.9F.00.01",
    fwid=bytes(48),
    key_sha256=bytes(32),
    protected_pcie=False,
    rims_checked=True,
    measurements_matched=33,
    revocation_checked=True,
    valid_until=NOW,
    cc_mode="on",
)
SNP = SnpFacts(
    "Genoa",
    {"bootloader": 9, "tee": 0, "snp": 23, "microcode": 72},
    vmpl=0,
    flags=frozenset({"smt", "tsme"}),
    chip_id=b"\x07" * 64,
    vek="vcek",
    csp_id=None,
)
CPU = CpuFacts("sev-snp", bytes(64), bytes(48), bytes(32), revocation_checked=True, valid_until=NOW, snp=SNP)
FACTS = Facts(CPU, (GPU, GPU), replace(CLAIMS, cc_mode="on"), START)


def cpu(**changes: Any) -> Facts:
    return replace(FACTS, cpu=replace(CPU, **changes))


VTPM = cpu(pcrs={4: b"\x04" * 32, 7: b"\x07" * 32})


def tdx(status: str | None, **changes: Any) -> Facts:
    return cpu(provider="tdx", snp=None, tdx=TdxFacts(status), **changes)


TDX = tdx("UpToDate")


def snp(**changes: Any) -> Facts:
    return cpu(snp=replace(SNP, **changes))


def gpus(**changes: Any) -> Facts:
    """The second of two is different: a rule that looks at the first only would pass."""
    return replace(FACTS, gpus=(GPU, replace(GPU, **changes)))


def levels(**changes: int) -> MinimumTcb:
    return MinimumTcb({"Genoa": {"bootloader": 9, "tee": 0, "snp": 23, "microcode": 72} | changes})


@pytest.mark.parametrize(
    ("rule", "facts"),
    [
        (levels(), FACTS),
        (levels(snp=22), FACTS),
        (MinimumTcb("any"), snp(product="Turin")),
        (levels(), TDX),
        (Debug("refused"), FACTS),
        (Debug("allowed"), cpu(debug=True)),
        (Migration("allowed"), cpu(migration=True)),
        (Vmpl(frozenset({0, 1})), snp(vmpl=1)),
        (Vmpl("any"), snp(vmpl=3)),
        (Platform(frozenset({"tsme"}), frozenset({"tio"})), FACTS),
        (Platform("any", "any"), FACTS),
        (Chips(frozenset({b"\x07" * 64})), FACTS),
        (Chips("any"), FACTS),
        (Pcrs({4: b"\x04" * 32}), VTPM),
        (Pcrs("any"), FACTS),
        (TdxStatus(frozenset({"UpToDate"})), TDX),
        (TdxStatus(frozenset({"UpToDate"})), FACTS),
        (TdxStatus("any"), tdx(None)),
        (CpuRevocation("required"), FACTS),
        (CpuRevocation("required"), cpu(revocation_checked=None)),
        (CpuRevocation("optional"), cpu(revocation_checked=False)),
        (Gpu("none"), replace(FACTS, gpus=())),
        (Gpu("required"), FACTS),
        (Gpu(2), FACTS),
        (GpuArchitecture(frozenset({"hopper"})), FACTS),
        (GpuArchitecture("any"), gpus(architecture="blackwell")),
        (CcMode(frozenset({"on"})), FACTS),
        (GpuDriver(frozenset({"550.90.07"})), FACTS),
        (GpuDriver(frozenset({">=535.86", "1"})), FACTS),
        (GpuDriver(frozenset({">= 550.90.7"})), FACTS),
        (GpuDriver(frozenset({">=99.1"})), FACTS),
        (GpuVbios(frozenset({">=96.00.5E.00.01"})), FACTS),
        (GpuVbios("any"), gpus(vbios="odd")),
        (GpuRims("required"), FACTS),
        (GpuRims("optional"), gpus(rims_checked=False)),
        (GpuRevocation("required"), FACTS),
        (GpuRevocation("optional"), gpus(revocation_checked=False)),
    ],
)
def test_accepted(rule: Rule, facts: Facts) -> None:
    rule.check(facts)


@pytest.mark.parametrize(
    ("rule", "facts", "claim"),
    [
        (levels(snp=24), FACTS, "minimum_tcb"),
        (levels(microcode=73), FACTS, "minimum_tcb"),
        (levels(fmc=0), FACTS, "minimum_tcb"),
        (levels(), snp(product="Milan"), "minimum_tcb"),
        (MinimumTcb({}), FACTS, "minimum_tcb"),
        (Debug("refused"), cpu(debug=True), "debug"),
        (Debug("refused"), tdx("UpToDate", debug=True), "debug"),
        (Migration("refused"), cpu(migration=True), "migration"),
        (Vmpl(frozenset({0})), snp(vmpl=1), "vmpl"),
        (Vmpl(frozenset()), FACTS, "vmpl"),
        (Platform(frozenset({"tsme", "ecc"}), "any"), FACTS, "platform_set"),
        (Platform("any", frozenset({"smt"})), FACTS, "platform_clear"),
        (Chips(frozenset({b"\x08" * 64})), FACTS, "chips"),
        (Chips(frozenset()), FACTS, "chips"),
        (Pcrs({4: b"\x05" * 32}), VTPM, "pcrs"),
        (Pcrs({4: b"\x04" * 32, 8: bytes(32)}), VTPM, "pcrs"),
        (Pcrs({4: b"\x04" * 32}), FACTS, "pcrs"),
        (TdxStatus(frozenset({"UpToDate"})), tdx("OutOfDate"), "tdx_status"),
        (TdxStatus(frozenset({"UpToDate"})), tdx(None), "tdx_status"),
        (CpuRevocation("required"), cpu(revocation_checked=False), "cpu_revocation"),
        (Gpu("none"), FACTS, "gpu"),
        (Gpu("required"), replace(FACTS, gpus=()), "gpu"),
        (Gpu(1), FACTS, "gpu"),
        (Gpu(3), FACTS, "gpu"),
        (GpuArchitecture(frozenset({"hopper"})), gpus(architecture="blackwell"), "gpu_architecture"),
        (CcMode(frozenset({"on"})), gpus(cc_mode="devtools"), "cc_mode"),
        (CcMode(frozenset({"on"})), gpus(cc_mode="off"), "cc_mode"),
        (CcMode(frozenset({"on"})), replace(FACTS, claims=CLAIMS), "cc_mode"),
        (GpuDriver(frozenset({"550.90.07"})), gpus(driver="550.90.08"), "gpu_driver"),
        (GpuDriver(frozenset({">=550.90.08"})), FACTS, "gpu_driver"),
        (GpuDriver(frozenset({">=550.90.07.1"})), FACTS, "gpu_driver"),
        (GpuDriver(frozenset({">="})), FACTS, "gpu_driver"),
        (GpuDriver(frozenset({">=1"})), gpus(driver=""), "gpu_driver"),
        (GpuDriver(frozenset({">=1"})), gpus(driver="newest"), "gpu_driver"),
        (GpuDriver(frozenset()), FACTS, "gpu_driver"),
        (GpuVbios(frozenset({">=96.00.9F.00.02"})), FACTS, "gpu_vbios"),
        (GpuVbios(frozenset({">=96.00.5E.00.01"})), gpus(vbios="96.00.30.00.01"), "gpu_vbios"),
        (GpuRims("required"), gpus(rims_checked=False), "gpu_rims"),
        (GpuRevocation("required"), gpus(revocation_checked=False), "gpu_revocation"),
    ],
)
def test_refused(rule: Rule, facts: Facts, claim: str) -> None:
    with pytest.raises(PolicyError) as refused:
        rule.check(facts)
    assert (refused.value.claim, refused.value.code) == (claim, f"policy.{claim}")


class Refuses:
    def check(self, facts: Facts) -> None:
        raise PolicyError("this one", "always")


def test_a_report_by_itself_is_judged_by_the_rules_about_it() -> None:
    bare = replace(FACTS, claims=None)
    accepts = Policy.default(frozenset({bytes(48)}))
    accepts.evaluate_cpu(bare)
    accepts.evaluate_gpus(bare)
    with pytest.raises(PolicyError, match="no claims"):
        accepts.evaluate(bare)
    with pytest.raises(PolicyError, match="when it was made"):
        accepts.age.check(bare)
    refused: dict[str, set[str]] = {"cpu": set(), "gpus": set()}
    for field in fields(Policy):
        policy = replace(accepts, **{field.name: Refuses()})
        for part, evaluate in (("cpu", policy.evaluate_cpu), ("gpus", policy.evaluate_gpus)):
            with contextlib.suppress(PolicyError):
                evaluate(bare)
                continue
            refused[part].add(field.name)
    assert refused["gpus"] == {"gpu_architecture", "gpu_driver", "gpu_vbios", "gpu_rims", "gpu_revocation"}
    # All but those about GPUs, claims and times.
    assert refused["cpu"] == {field.name for field in fields(Policy)} - refused["gpus"] - {
        "gpu", "cc_mode", "configuration", "software", "replica", "tls", "padding", "sandbox", "age", "models",
    }  # fmt: skip


def test_every_rule_of_a_policy_is_evaluated() -> None:
    """Each field of the policy in turn refuses: none of them is left out."""
    accepts = Policy.default(frozenset({bytes(48)}))
    accepts.evaluate(FACTS)
    for field in fields(Policy):
        with pytest.raises(PolicyError, match="always"):
            replace(accepts, **{field.name: Refuses()}).evaluate(FACTS)
