"""The GPUs through the real nvidia-ml-py and a stand-in for the driver's library, whose reports verify."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.serialization import Encoding

from adytum.attestation.core.checks import Checks
from adytum.attestation.core.errors import CollectionError, VerificationError
from adytum.attestation.nvidia.bundle import parse_bundle, verify_bundle
from adytum.attestation.nvidia.device import GpuInfo, NvidiaGpus
from tests.conftest import ROOT
from tests.unit.attestation.nvidia import nvml
from tests.unit.attestation.nvidia.authority import NOW, Authority, FakeGpu
from tests.unit.attestation.nvidia.nvml import Driver

NONCE = bytes(range(32))
FUNCTION_NOT_FOUND, NOT_SUPPORTED, NO_PERMISSION, LOST, UNKNOWN = 13, 3, 4, 15, 999
AMPERE = (7).to_bytes(4, "little")


@pytest.fixture(autouse=True)
def _library() -> None:
    nvml.load()


@pytest.fixture(scope="module")
def authority() -> Authority:
    return Authority()


@pytest.fixture(scope="module")
def gpu(authority: Authority) -> FakeGpu:
    return FakeGpu(authority)


@pytest.fixture
def driver(gpu: FakeGpu) -> Driver:
    return Driver([gpu])


@pytest.mark.parametrize("count", [1, 4])
def test_collects_evidence_that_verifies(authority: Authority, count: int) -> None:
    with Driver.of(authority, count):
        bundle = NvidiaGpus().collect(NONCE)
    found = verify_bundle(bundle, nonce=NONCE, roots=authority.roots, now=NOW, checks=Checks())
    assert len({gpu.key_sha256 for gpu in found}) == count
    assert {gpu.cc_mode for gpu in found} == {"on"}


def test_collects_blackwell(authority: Authority) -> None:
    with Driver([FakeGpu(authority, "blackwell")], multi_gpu=2):
        bundle = NvidiaGpus().collect(NONCE)
    (item,) = parse_bundle(bundle)
    assert (item.architecture, item.multi_gpu, item.cc_mode) == ("blackwell", "nvlink", "on")
    (found,) = verify_bundle(bundle, nonce=NONCE, roots=authority.roots, now=NOW, checks=Checks())
    assert found.architecture == "blackwell"


def test_evidence_is_for_its_nonce_only(authority: Authority, driver: Driver) -> None:
    with driver:
        bundle = NvidiaGpus().collect(bytes(32))
    with pytest.raises(VerificationError) as caught:
        verify_bundle(bundle, nonce=NONCE, roots=authority.roots, now=NOW, checks=Checks())
    assert caught.value.code == "gpu.nonce"


MODES = [
    # environment, cc, devtools, multi_gpu, mode
    (2, 1, 0, 0, "on"),
    (2, 1, 1, 0, "devtools"),
    (0, 0, 0, 0, "off"),
    (0, 0, 1, 0, "devtools"),
    (2, 0, 0, 1, "on"),
    (2, 0, 1, 1, "devtools"),
    (2, 1, 0, 2, "on"),
    (2, 0, 0, 2, "off"),
]


@pytest.mark.parametrize(("environment", "cc", "devtools", "multi_gpu", "mode"), MODES)
def test_mode(driver: Driver, environment: int, cc: int, devtools: int, multi_gpu: int, mode: str) -> None:
    driver.environment, driver.cc, driver.devtools, driver.multi_gpu = environment, cc, devtools, multi_gpu
    with driver:
        assert NvidiaGpus().mode() == mode


@pytest.mark.parametrize(("cc", "devtools", "mode"), [(1, 0, "on"), (1, 1, "devtools"), (0, 0, "off")])
def test_evidence_carries_the_state_that_the_driver_gives(
    authority: Authority, driver: Driver, cc: int, devtools: int, mode: str
) -> None:
    driver.cc, driver.devtools = cc, devtools
    with driver:
        bundle = NvidiaGpus().collect(NONCE)
    (found,) = verify_bundle(bundle, nonce=NONCE, roots=authority.roots, now=NOW, checks=Checks())
    assert found.cc_mode == mode


def test_a_driver_without_the_newer_question_is_asked_the_older(driver: Driver) -> None:
    driver.codes["settings"] = NOT_SUPPORTED
    with driver:
        assert NvidiaGpus().mode() == "on"
    assert "state" in driver.asked


def test_protected_pcie_needs_leave_and_names_the_switches(authority: Authority) -> None:
    gpu = FakeGpu(authority, feature_flag=2, opaque={21: b"\xaa"})
    with Driver([gpu], cc=0, multi_gpu=1):
        with pytest.raises(CollectionError, match="NVSwitches"):
            NvidiaGpus().collect(NONCE)
        bundle = NvidiaGpus(unattested_switches=True).collect(NONCE)
    checks = Checks()
    (found,) = verify_bundle(bundle, nonce=NONCE, roots=authority.roots, now=NOW, checks=checks)
    assert found.cc_mode == "on"
    assert "gpu.switches" in {check.code for check in checks.not_given}


@pytest.mark.parametrize(("stated", "flag", "status"), [(0, 2, b"\xaa"), (1, 0, b"\x55"), (0, 2, None), (1, 0, None)])
def test_a_state_that_a_gpu_contradicts_is_refused(
    authority: Authority, stated: int, flag: int, status: bytes | None
) -> None:
    gpu = FakeGpu(authority, feature_flag=flag, opaque={21: status})
    with Driver([gpu], multi_gpu=stated):
        bundle = NvidiaGpus(unattested_switches=True).collect(NONCE)
    with pytest.raises(VerificationError) as caught:
        verify_bundle(bundle, nonce=NONCE, roots=authority.roots, now=NOW, checks=Checks())
    assert caught.value.code == "gpu.state"


def test_ready_state(driver: Driver) -> None:
    with driver:
        gpus = NvidiaGpus()
        assert not gpus.ready()
        gpus.set_ready(True)
        assert gpus.ready()
        assert driver.ready == 1
        gpus.set_ready(False)
        assert driver.ready == 0


def test_a_ready_state_that_does_not_take_is_told(driver: Driver) -> None:
    driver.ready_sticks = False
    with driver, pytest.raises(CollectionError, match="were set ready and are not"):
        NvidiaGpus().set_ready(True)


def test_facts(driver: Driver) -> None:
    with driver:
        facts = NvidiaGpus().facts()
    good = GpuInfo(
        name=nvml.NAME,
        architecture="hopper",
        driver_version="550.90.07",
        vbios_version="96.00.9F.00.01",
        cc_mode="on",
        multi_gpu="none",
        ready=False,
        protected_kib=80 << 20,
        unprotected_kib=1 << 10,
    )
    assert facts == (good,)
    assert not [line for line in driver.asked if line.startswith("set-ready")]

    driver.codes |= {"ready": NOT_SUPPORTED, "memory": NOT_SUPPORTED}
    driver.results["architecture"] = AMPERE
    with driver:
        (facts,) = NvidiaGpus().facts()
    assert facts == replace(good, architecture="7", ready=None, protected_kib=None, unprotected_kib=None)


def _architecture(driver: Driver) -> None:
    driver.results["architecture"] = AMPERE


def _none(driver: Driver) -> None:
    driver.results["count"] = bytes(4)


def _many(driver: Driver) -> None:
    driver.results["count"] = (17).to_bytes(4, "little")


def _simulated(driver: Driver) -> None:
    driver.environment = 1


def _unknown_cc(driver: Driver) -> None:
    driver.cc = 2


def _unknown_devtools(driver: Driver) -> None:
    driver.devtools = 7


def _unknown_multi(driver: Driver) -> None:
    driver.multi_gpu = 3


def _other_nonce(driver: Driver) -> None:
    driver.results["report"] = driver.gpus[0].report(bytes(32))


def _cut_report(driver: Driver) -> None:
    driver.results["report"] = driver.gpus[0].report(NONCE)[:-1]


def _no_chain(driver: Driver) -> None:
    driver.results["certificates"] = b"-----BEGIN CERTIFICATE-----"


def _short_chain(driver: Driver) -> None:
    chain = driver.gpus[0].certificates[:4]
    driver.results["certificates"] = b"".join(certificate.public_bytes(Encoding.PEM) for certificate in chain)


WRONG: list[tuple[Callable[[Driver], None], str]] = [
    (_architecture, "architecture"),
    (_none, "lists no GPU"),
    (_many, "17 GPUs"),
    (_simulated, "simulated"),
    (_unknown_cc, "unknown state"),
    (_unknown_devtools, "unknown state"),
    (_unknown_multi, "unknown state"),
    (_other_nonce, "another nonce"),
    (_cut_report, "cannot be read"),
    (_no_chain, "cannot be read"),
    (_short_chain, "4 certificates"),
]


@pytest.mark.parametrize(("spoil", "says"), WRONG, ids=[spoil.__name__ for spoil, _ in WRONG])
def test_what_the_driver_gives_wrong_is_told(driver: Driver, spoil: Callable[[Driver], None], says: str) -> None:
    spoil(driver)
    with driver, pytest.raises(CollectionError, match=says):
        NvidiaGpus().collect(NONCE)


@pytest.mark.parametrize(("command", "size"), [("report", 0), ("report", 0x2001), ("certificates", 0x1401)])
def test_a_size_beyond_the_buffer_is_told(driver: Driver, command: str, size: int) -> None:
    driver.sizes[command] = size
    with driver, pytest.raises(CollectionError, match=f"filled {size} of"):
        NvidiaGpus().collect(NONCE)


@pytest.mark.parametrize("command", ["init", "settings", "count", "handle", "architecture", "certificates", "report"])
@pytest.mark.parametrize(
    ("code", "advice"), [(NO_PERMISSION, "as root"), (LOST, "restart"), (UNKNOWN, "dmesg"), (77, "dmesg")]
)
def test_every_failure_of_the_driver_says_what_to_do(driver: Driver, command: str, code: int, advice: str) -> None:
    driver.codes[command] = code
    with driver, pytest.raises(CollectionError, match=advice):
        NvidiaGpus().collect(NONCE)


@pytest.mark.parametrize("command", ["state", "settings"])
def test_no_state_is_no_mode(driver: Driver, command: str) -> None:
    driver.codes = {"settings": FUNCTION_NOT_FOUND, command: UNKNOWN}
    with driver, pytest.raises(CollectionError):
        NvidiaGpus().mode()


@pytest.mark.parametrize("command", ["ready", "set-ready"])
def test_a_ready_state_that_cannot_be_set_is_told(driver: Driver, command: str) -> None:
    driver.codes[command] = NO_PERMISSION
    with driver, pytest.raises(CollectionError, match="as root"):
        NvidiaGpus().set_ready(True)


@pytest.mark.parametrize("command", ["driver", "name", "vbios", "architecture", "memory"])
def test_facts_tell_a_failure(driver: Driver, command: str) -> None:
    driver.codes[command] = LOST
    with driver, pytest.raises(CollectionError, match="lost"):
        NvidiaGpus().facts()


def test_text_of_the_driver_that_cannot_be_read(driver: Driver) -> None:
    driver.results["name"] = b"\xff\xfe"
    with driver, pytest.raises(CollectionError, match="cannot be read"):
        NvidiaGpus().facts()


@pytest.mark.parametrize("size", [0, 31, 33])
def test_a_nonce_has_32_bytes(driver: Driver, size: int) -> None:
    with driver, pytest.raises(CollectionError, match="32 bytes"):
        NvidiaGpus().collect(bytes(size))


def test_without_a_driver() -> None:
    with pytest.raises(CollectionError, match="dmesg"):
        NvidiaGpus()


# What is loaded once stays: other libraries, and none, need a process of their own.
_PROGRAM = (
    "import json\n"
    "from adytum.attestation.core.errors import CollectionError\n"
    "from adytum.attestation.nvidia.device import NvidiaGpus\n"
    "try:\n"
    "    gpus = NvidiaGpus()\n"
    f"    print(json.dumps([gpus.mode(), len(gpus.collect(bytes.fromhex('{NONCE.hex()}')))]))\n"
    "except CollectionError as error:\n"
    "    print(json.dumps(str(error)))\n"
)


def _run(environment: dict[str, str]) -> object:
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return json.loads(done.stdout)


def test_the_library_is_found_as_a_driver_s_is(driver: Driver) -> None:
    with driver:
        found = _run(driver.environ())
        here = NvidiaGpus().collect(NONCE)
    assert found == ["on", len(here)]


def test_a_driver_from_before_modes_of_several_gpus(authority: Authority) -> None:
    gpu = FakeGpu(authority, driver_version="535.86.09", feature_flag=None, opaque={20: None})
    with Driver([gpu]) as driver:
        found = _run(driver.environ(settings=False))
        bundle = NvidiaGpus().collect(NONCE)
    assert "state" in driver.asked
    assert found == ["on", len(bundle)]


def test_without_the_library(tmp_path: Path) -> None:
    if Path("/dev/nvidiactl").exists():
        pytest.skip("this machine has an NVIDIA driver, so its library would be found")
    said = _run({"LD_LIBRARY_PATH": str(tmp_path)})
    assert "install the NVIDIA driver" in str(said)
