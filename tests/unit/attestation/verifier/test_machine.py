"""Whole machines: the shipped devices over fake kernels and drivers, the vendors' cache over fake services that sign.

Rounds of collection go to the clients' verifier, with the production policy.
"""

import base64
import dataclasses
import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509 import ocsp

from adytum.attestation.collect.endorsements import VendorEndorsements
from adytum.attestation.collect.rounds import Collector, CpuDevice, GpuDevices, NoGpus
from adytum.attestation.collect.vendors import FetchFailed, Request, VendorCache
from adytum.attestation.core.checks import Checks
from adytum.attestation.core.errors import NotThereYet, PolicyError
from adytum.attestation.nvidia.device import NvidiaGpus
from adytum.attestation.snp.device import SevSnp
from adytum.attestation.tsm.device import Tsm
from adytum.attestation.verifier.document import verify
from tests.unit.attestation.nvidia import nvml
from tests.unit.attestation.nvidia.authority import Issuer
from tests.unit.attestation.nvidia.nvml import Driver
from tests.unit.attestation.nvidia.rim_authority import answer
from tests.unit.attestation.snp.authority import DAY, NOW, Processor
from tests.unit.attestation.snp.guest import FakeGuest, table
from tests.unit.attestation.support import CLAIMS
from tests.unit.attestation.tdx.configfs import configfs
from tests.unit.attestation.verifier.test_end_to_end import GENOA, NONCE, NVIDIA, RIMS, START, TRUST, manifests, policy


class Vendors:
    """AMD's and NVIDIA's services for one machine. `asked`: every address, in order."""

    def __init__(self, processor: Processor, issuers: list[Issuer]) -> None:
        self._processor = processor
        self._pairs = list(pairwise(issuers))
        self.asked: list[str] = []
        self.down = False

    def __call__(self, request: Request) -> bytes:
        self.asked.append(request.url)
        if self.down:
            raise FetchFailed("the vendor does not answer")
        if request.body is not None:
            return self._ocsp(request.body)
        path = request.url.split("/", 3)[3].partition("?")[0]
        vek, ask, ark = (x509.load_der_x509_certificate(der) for der in self._processor.certificates)
        if path.endswith("/crl"):
            return self._processor.crl()
        if path.endswith("/cert_chain"):
            return ask.public_bytes(Encoding.PEM) + ark.public_bytes(Encoding.PEM)
        if path == f"vcek/v1/{self._processor.product}/{self._processor.hwid.hex()}":
            return vek.public_bytes(Encoding.DER)
        if path.startswith("v1/rim/"):
            driver, vbios = manifests()
            rim = driver if "DRIVER" in path else vbios
            return json.dumps({"id": path[7:], "rim": base64.b64encode(rim).decode()}).encode()
        raise FetchFailed(f"404 for {path}")

    def _ocsp(self, body: bytes) -> bytes:
        wanted = ocsp.load_der_ocsp_request(body).serial_number
        for below, above in self._pairs:
            if below.certificate.serial_number == wanted:
                return answer(below.certificate, above, since=NOW - DAY / 24, until=NOW + DAY)
        raise FetchFailed("no such certificate")


def run(cpu: Callable[[VendorCache], CpuDevice], gpus: GpuDevices, count: int, vendors: Vendors) -> Checks:
    """Collects until nothing is missing, as a backend's start and its background task do, and verifies."""
    cache = VendorCache(vendors, clock=NOW.timestamp)
    collector = Collector(cpu(cache), gpus, VendorEndorsements(cache))
    claims = dataclasses.replace(
        CLAIMS, cc_mode="on" if count else "none", issued_at=START, keys_expire_at=START + 3600
    )
    for _ in range(6):
        try:
            document = collector.collect(claims, [NONCE]).document(NONCE)
            checks = Checks()
            given = {"nonce": NONCE, "policy": policy("sev-snp", count), "trust": TRUST, "now": NOW}
            found = verify(document, **given, checks=checks)  # type: ignore[arg-type]
            assert len(found.facts.gpus) == count
            return checks
        except (NotThereYet, PolicyError) as error:
            missing = error
        cache.refresh()
    raise AssertionError(f"still missing: {missing}")


def snp(tmp_path: Path, kind: str) -> Callable[[VendorCache], CpuDevice]:
    if kind == "configfs":
        tsm = Tsm(configfs(tmp_path, GENOA.report, "sev_guest"))
        return lambda cache: SevSnp(cache.amd_certificates, cache.amd_chain, tsm)
    device = tmp_path / "sev-guest"
    device.write_bytes(b"")
    vek, ask, ark = GENOA.certificates
    fake = FakeGuest(GENOA, table({"vcek": vek, "ask": ask, "ark": ark}) if kind == "host" else b"")
    return lambda cache: SevSnp(cache.amd_certificates, cache.amd_chain, Tsm(tmp_path / "absent"), device, fake)


@pytest.mark.parametrize("kind", ["configfs", "device", "host"])
def test_snp_alone(kind: str, tmp_path: Path) -> None:
    vendors = Vendors(GENOA, [])
    checks = run(snp(tmp_path, kind), NoGpus(), 0, vendors)
    assert checks.not_given == []
    # The host's own certificates save AMD's service the question; the list of revoked ones only AMD has.
    assert len(vendors.asked) == (1 if kind == "host" else 3)


@pytest.mark.parametrize("count", [1, 4])
def test_snp_with_gpus(count: int, tmp_path: Path) -> None:
    nvml.load()
    with Driver.of(NVIDIA, count) as driver:
        issuers: list[Issuer] = []
        for gpu in driver.gpus:
            issuers += [gpu.boot_rom, *NVIDIA.above(gpu.architecture)]
        vendors = Vendors(GENOA, [*issuers, *RIMS.issuers])
        checks = run(snp(tmp_path, "configfs"), NvidiaGpus(), count, vendors)
    assert checks.not_given == []
    assert sum(check.code == "gpu.measurements" for check in checks.passed) == count


def test_vendors_that_do_not_answer_delay_nobody_but_the_start(tmp_path: Path) -> None:
    """Evidence goes on with what is there; the policy says whether that is enough."""
    vendors = Vendors(GENOA, [])
    cache = VendorCache(vendors, clock=NOW.timestamp)
    collector = Collector(snp(tmp_path, "host")(cache), NoGpus(), VendorEndorsements(cache))
    vendors.down = True
    claims = dataclasses.replace(CLAIMS, issued_at=START, keys_expire_at=START + 3600)
    document = collector.collect(claims, [NONCE]).document(NONCE)
    cache.refresh()
    with pytest.raises(PolicyError) as refused:
        verify(document, nonce=NONCE, policy=policy("sev-snp", 0), trust=TRUST, now=NOW)
    assert refused.value.claim == "cpu_revocation"
    asked = len(vendors.asked)
    for _ in range(5):
        collector.collect(claims, [NONCE])
    assert len(vendors.asked) == asked, "a round of collection never fetches"
