"""The GPUs' part of a document: its one form, and what several GPUs have to have in common."""

import base64
import contextlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adytum.attestation.core import strict
from adytum.attestation.core.checks import Checks
from adytum.attestation.core.errors import AttestationError, EvidenceError, Step, UnsupportedError, VerificationError
from adytum.attestation.core.limits import LIMITS
from adytum.attestation.core.trust import TrustRoots
from adytum.attestation.document.evidence import NO_GPUS
from adytum.attestation.document.facts import GpuFacts
from adytum.attestation.nvidia.bundle import GpuEvidence, encode_bundle, parse_bundle, verify_bundle
from tests.unit.attestation.nvidia.authority import NOW, Authority, FakeGpu
from tests.unit.attestation.nvidia.rim_authority import RimAuthority, good_answers
from tests.unit.attestation.nvidia.test_verify import DEVICE_OCSP, Real
from tests.unit.attestation.nvidia.test_verify_made import DRIVER, VBIOS

NVIDIA = Authority()
NONCE = bytes(range(32))
GPUS = [FakeGpu(NVIDIA) for _ in range(4)]
PPCIE = [f"h100-ppcie-590.12-gpu-{number}" for number in range(4)]

Change = Callable[[Any], object]


def evidence(
    gpu: FakeGpu, *, cc: str = "on", devtools: bool = False, multi_gpu: str = "none", nonce: bytes = NONCE
) -> GpuEvidence:
    return GpuEvidence(gpu.architecture, gpu.chain, gpu.report(nonce), cc, devtools, multi_gpu)


GOOD = encode_bundle([evidence(gpu) for gpu in GPUS])
ONE = encode_bundle([evidence(GPUS[0])])


def verified(bundle: bytes, *, nonce: bytes = NONCE, checks: Checks | None = None, roots: TrustRoots | None = None,
             **given: list[bytes]) -> tuple[GpuFacts, ...]:  # fmt: skip
    checks = Checks() if checks is None else checks
    return verify_bundle(bundle, nonce=nonce, roots=roots or NVIDIA.roots, now=NOW, checks=checks, **given)


def refused(*gpus: GpuEvidence) -> str:
    with pytest.raises(VerificationError) as caught:
        verified(encode_bundle(gpus))
    assert caught.value.step is Step.GPU
    return caught.value.code


def test_four_gpus() -> None:
    checks = Checks()
    found = verified(GOOD, checks=checks)
    assert len({item.key_sha256 for item in found}) == 4
    assert [item.cc_mode for item in found] == ["on"] * 4
    for place in range(4):
        said = [check.code for check in checks.passed if check.says.startswith(f"GPU {place}: ")]
        assert said == ["gpu.structure", "gpu.chain", "gpu.signature", "gpu.nonce", "gpu.fwid"]
    assert checks.passed[-1].code == "gpu.count"
    assert checks.passed[-1].says.startswith("4 different GPUs")


def test_everything_is_given_for_all() -> None:
    manifests = RimAuthority()
    rims = [manifests.rim(DRIVER), manifests.rim(VBIOS, version=GPUS[0].vbios_version)]
    above = NVIDIA.above("hopper")
    answers = [answer for gpu in GPUS for answer in good_answers((gpu.boot_rom, *above))[:1]]
    answers += good_answers(above) + good_answers(manifests.issuers)
    checks = Checks()
    roots = replace(NVIDIA.roots, nvidia_rim=manifests.roots)
    found = verified(GOOD, roots=roots, checks=checks, rims=rims, ocsp=answers)
    assert all(item.rims_checked and item.revocation_checked for item in found)
    assert [item.measurements_matched for item in found] == [40] * 4
    assert checks.not_given == []
    less = verified(GOOD, roots=roots, rims=rims, ocsp=answers[1:])
    assert [item.revocation_checked for item in less] == [False, True, True, True]


def test_the_real_set_of_four(vectors: Path) -> None:
    """Under protected PCIe, so with switches between them that this version does not see."""
    reals = [Real.of(vectors, case) for case in PPCIE]
    assert len({real.nonce for real in reals}) == 1
    bundle = encode_bundle(
        [GpuEvidence("hopper", real.chain, real.report, "off", False, "protected-pcie") for real in reals]
    )
    checks = Checks()
    found = verify_bundle(bundle, nonce=reals[0].nonce, roots=TrustRoots(), now=DEVICE_OCSP, checks=checks)
    assert [item.cc_mode for item in found] == ["on"] * 4
    assert [item.protected_pcie for item in found] == [True] * 4
    assert [item.driver for item in found] == ["590.12"] * 4
    assert "gpu.switches" in [check.code for check in checks.not_given]
    with pytest.raises(VerificationError) as caught:
        verify_bundle(bundle, nonce=NONCE, roots=TrustRoots(), now=DEVICE_OCSP, checks=Checks())
    assert caught.value.code == "gpu.nonce"


@pytest.mark.parametrize(("case", "multi_gpu"), [(PPCIE[0], "none"), (PPCIE[0], "nvlink"),
                                                 ("h100-550.90.07-full", "protected-pcie")])  # fmt: skip
def test_a_state_that_the_real_gpu_contradicts(vectors: Path, case: str, multi_gpu: str) -> None:
    real = Real.of(vectors, case)
    bundle = encode_bundle([GpuEvidence("hopper", real.chain, real.report, "on", False, multi_gpu)])
    with pytest.raises(VerificationError) as caught:
        verify_bundle(bundle, nonce=real.nonce, roots=TrustRoots(), now=DEVICE_OCSP, checks=Checks())
    assert caught.value.code == "gpu.state"


@pytest.mark.parametrize(
    ("name", "mode", "count"),
    [
        ("multi_gpu_hopper", "protected-pcie", 4),
        ("hopper_evidence", "protected-pcie", 1),
        ("hopper_evidence_cert_hold", "none", 1),
    ],
)
def test_what_nvidia_s_own_tool_writes(vectors: Path, name: str, mode: str, count: int) -> None:
    """Its JSON has the same bytes in it: turned into a bundle, it verifies."""
    items = json.loads((vectors / "nvidia-gpu" / "serialized-json" / f"{name}.json").read_text())
    gpus = []
    for item in items:
        pem = base64.b64decode(item["certificate"])
        chain = tuple(base64.b64decode(b"".join(part.split(b"-----END")[0].split()))
                      for part in pem.split(b"-----BEGIN CERTIFICATE-----")[1:])  # fmt: skip
        gpus.append(GpuEvidence("hopper", chain, base64.b64decode(item["evidence"]), "on", False, mode))
    nonce = bytes.fromhex(items[0]["nonce"].removeprefix("0x"))
    found = verify_bundle(encode_bundle(gpus), nonce=nonce, roots=TrustRoots(), now=DEVICE_OCSP, checks=Checks())
    assert len(found) == len(items) == count


def test_a_real_switch_among_gpus(vectors: Path) -> None:
    gpu, switch = Real.of(vectors, "h100-550.90.07-full"), Real.of(vectors, "nvswitch-ls10")
    assert gpu.nonce == switch.nonce
    bundle = encode_bundle([GpuEvidence("hopper", item.chain, item.report, "on", False, "none")
                            for item in (gpu, switch)])  # fmt: skip
    with pytest.raises(UnsupportedError):
        verify_bundle(bundle, nonce=gpu.nonce, roots=TrustRoots(), now=DEVICE_OCSP, checks=Checks())


def test_one_forged_gpu_among_good_ones() -> None:
    """In every place; and what was checked before it stays noted, nothing of it passes for checked."""
    forger = FakeGpu(Authority())
    for place in range(4):
        gpus = [evidence(gpu) for gpu in GPUS]
        gpus[place] = evidence(forger)
        checks = Checks()
        with pytest.raises(VerificationError) as caught:
            verified(encode_bundle(gpus), checks=checks)
        assert caught.value.code == "gpu.chain.root"
        assert [check.code for check in checks.passed if check.says.startswith(f"GPU {place}")] == ["gpu.structure"]
        assert len([check for check in checks.passed if check.code == "gpu.signature"]) == place


def test_one_gpu_with_another_nonce() -> None:
    assert refused(evidence(GPUS[0]), evidence(GPUS[1], nonce=bytes(32))) == "gpu.nonce"


def test_one_gpu_twice() -> None:
    """With two signatures, so that the bytes differ; and with the same ones."""
    once = evidence(GPUS[0])
    assert once != evidence(GPUS[0])
    assert refused(once, evidence(GPUS[1]), evidence(GPUS[0])) == "gpu.duplicate"
    assert refused(once, once) == "gpu.duplicate"


def test_another_architecture_than_stated() -> None:
    hopper, blackwell = evidence(GPUS[0]), evidence(FakeGpu(NVIDIA, "blackwell"))
    assert refused(replace(hopper, architecture="blackwell")) == "gpu.architecture"
    assert refused(replace(blackwell, architecture="hopper")) == "gpu.architecture"
    assert verified(encode_bundle([blackwell]))[0].architecture == "blackwell"


def test_two_architectures() -> None:
    assert refused(evidence(GPUS[0]), evidence(FakeGpu(NVIDIA, "blackwell"))) == "gpu.architecture"


@pytest.mark.parametrize(
    ("cc", "devtools", "multi_gpu", "mode"),
    [
        ("on", False, "none", "on"),
        ("off", False, "none", "off"),
        ("on", True, "none", "devtools"),
        ("off", True, "none", "devtools"),
        ("on", False, "nvlink", "on"),
        ("off", False, "nvlink", "off"),
        ("off", False, "protected-pcie", "on"),
        ("on", False, "protected-pcie", "on"),
        ("off", True, "protected-pcie", "devtools"),
    ],
)
def test_modes(cc: str, devtools: bool, multi_gpu: str, mode: str) -> None:
    """That a report verifies says nothing about the mode: it is off where the guest read off."""
    gpu = FakeGpu(NVIDIA, feature_flag=2 if multi_gpu == "protected-pcie" else 1)
    found = verified(encode_bundle([evidence(gpu, cc=cc, devtools=devtools, multi_gpu=multi_gpu)]))
    assert [item.cc_mode for item in found] == [mode]


@pytest.mark.parametrize(("flag", "multi_gpu"), [(2, "none"), (2, "nvlink"), (0, "protected-pcie"),
                                                 (1, "protected-pcie")])  # fmt: skip
def test_a_state_that_the_gpu_contradicts(flag: int, multi_gpu: str) -> None:
    assert refused(evidence(FakeGpu(NVIDIA, feature_flag=flag), multi_gpu=multi_gpu)) == "gpu.state"


def test_a_driver_that_does_not_report_protected_pcie() -> None:
    gpu = FakeGpu(NVIDIA, feature_flag=None)
    assert verified(encode_bundle([evidence(gpu, multi_gpu="protected-pcie")]))[0].cc_mode == "on"


@pytest.mark.parametrize("state", [{"cc": "off"}, {"devtools": True}, {"multi_gpu": "nvlink"}])
def test_states_that_differ(state: dict[str, Any]) -> None:
    assert refused(evidence(GPUS[0]), replace(evidence(GPUS[1]), **state)) == "gpu.state"


# The one form


def test_what_is_encoded_is_what_is_read() -> None:
    gpus = tuple(evidence(gpu, devtools=True, multi_gpu="nvlink") for gpu in GPUS)
    data = encode_bundle(gpus)
    assert parse_bundle(data) == gpus
    assert encode_bundle(parse_bundle(data)) == data
    assert [sorted(item) for item in json.loads(data)] == [["architecture", "certificates", "report", "state"]] * 4


def test_no_gpus_is_no_bundle() -> None:
    """A caller that needs GPUs is not satisfied by an empty list."""
    with pytest.raises(ValueError, match="1 to 16"):
        encode_bundle([])
    with pytest.raises(EvidenceError, match="1 to 16"):
        verified(NO_GPUS)
    with pytest.raises(EvidenceError, match="1 to 16"):
        parse_bundle(b"[]")


def test_more_gpus_than_a_machine_has() -> None:
    item = evidence(GPUS[0])
    assert len(parse_bundle(encode_bundle([item] * LIMITS.gpus))) == LIMITS.gpus
    with pytest.raises(ValueError, match="1 to 16"):
        encode_bundle([item] * (LIMITS.gpus + 1))
    with pytest.raises(EvidenceError, match="1 to 16"):
        parse_bundle(strict.encode([item.value()] * (LIMITS.gpus + 1)))


def item_with(name: str, value: object) -> Change:
    return lambda item: item.update({name: value})


def state_with(name: str, value: object) -> Change:
    return lambda item: item["state"].update({name: value})


CERTIFICATES: list[object] = ["", None, {}, [], [1], ["="], ["AA"], ["AA=="] * 9]
STATES: list[object] = [None, [], "on", {}, {"cc": "on"}]


@pytest.mark.parametrize(
    "change",
    [
        *(item_with("architecture", value) for value in ("ampere", "Hopper", "", None, 9, ["hopper"])),
        *(item_with("certificates", value) for value in CERTIFICATES),
        *(item_with("report", value) for value in (None, 1, "A", "AB==", "AA==\n", "A" * 90_000)),
        *(item_with("state", value) for value in STATES),
        *(state_with("cc", value) for value in ("On", "devtools", True, None, 1)),
        *(state_with("devtools", value) for value in ("false", 0, 1, None)),
        *(state_with("multi_gpu", value) for value in ("ppcie", "", 0, None, False)),
        *(lambda item, name=name: item.pop(name) for name in ("architecture", "certificates", "report", "state")),
        *(lambda item, name=name: item["state"].pop(name) for name in ("cc", "devtools", "multi_gpu")),
        item_with("name", "H100"),
        state_with("ready", True),
    ],
)
def test_other_fields(change: Change) -> None:
    value = json.loads(ONE)
    change(value[0])
    with pytest.raises(EvidenceError):
        verified(strict.encode(value))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"null",
        b"{}",
        b"[{}]",
        b"[[]]",
        b"[null]",
        b'["x"]',
        ONE + b"\n",
        b" " + ONE,
        ONE + ONE,
        ONE.replace(b",", b", ", 1),
        ONE[:-1] + b",]",
        ONE.replace(b'{"architecture":"hopper",', b'{"architecture":"hopper","architecture":"hopper",', 1),
        ONE.replace(b'"architecture":"hopper",', b"", 1).replace(b'"report"', b'"architecture":"hopper","report"', 1),
        b"[" * 100_000,
        b"\xff" + ONE,
        b"[" + b"1," * 600_000 + b"1]",
    ],
)
def test_another_form(data: bytes) -> None:
    with pytest.raises(EvidenceError):
        verified(data)


def test_every_truncation() -> None:
    for size in range(0, len(ONE), 5):
        with pytest.raises(EvidenceError):
            parse_bundle(ONE[:size])


@pytest.mark.slow
def test_no_byte_may_change() -> None:
    """One bit of every 29th byte, and of the first 40 and the last 60, where architecture and state stand."""
    accepted = []
    for at in sorted({*range(0, len(ONE), 29), *range(40), *range(len(ONE) - 60, len(ONE))}):
        data = bytearray(ONE)
        data[at] ^= 1
        try:
            verified(bytes(data))
        except AttestationError:
            continue
        accepted.append(at)
    assert accepted == []


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_only_our_errors_escape(data: st.DataObject) -> None:
    bundle = bytearray(ONE)
    at = data.draw(st.integers(0, len(bundle) - 1))
    bundle[at : at + data.draw(st.integers(0, 8))] = data.draw(st.binary(max_size=8))
    with contextlib.suppress(AttestationError):
        verified(bytes(bundle))
        assert bytes(bundle) == ONE


@settings(max_examples=150, deadline=None)
@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=8),
                    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
                        st.sampled_from(["architecture", "certificates", "report", "state", "cc", "x"]), inner,
                        max_size=4)))  # fmt: skip
def test_any_json_is_no_bundle(value: object) -> None:
    with contextlib.suppress(EvidenceError):
        parse_bundle(strict.encode(value))
        pytest.fail("it was read")
