"""What the tests of the vendors' cache share: a cache before fake vendors, with a clock to turn."""

import datetime
import struct
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from adytum.attestation.collect.vendors import Request, VendorCache, https
from adytum.attestation.core.errors import CollectionError
from adytum.attestation.nvidia.ocsp import ocsp_request
from adytum.attestation.snp.report import SIZE, SnpReport
from tests.unit.attestation.vendors import START, Server, Vendors, ocsp_pair

MINUTE, HOUR, DAY = 60.0, 3600.0, 86_400.0
T0 = START.timestamp()
CPUID = {"Milan": (0x19, 0x01, 0x01), "Genoa": (0x19, 0x11, 0x01), "Turin": (0x1A, 0x02, 0x01)}
CHIP = bytes(range(1, 65))


def report(product: str, *, version: int = 3, key: int = 0, chip: bytes = CHIP) -> SnpReport:
    """A report as far as the vendors' addresses are made of it: CPUID, chip and the TCB 1, 2, .. 8."""
    data = bytearray(SIZE)
    struct.pack_into("<IIQ", data, 0, version, 0, 1 << 17)
    struct.pack_into("<II", data, 0x30, 0, 1)
    struct.pack_into("<I", data, 0x48, key << 2)
    data[0x180:0x188] = bytes(range(1, 9))
    if version > 2:
        data[0x188:0x18B] = bytes(CPUID[product])
    data[0x1A0:0x1E0] = chip[:8] + bytes(56) if product == "Turin" else chip
    return SnpReport.parse(bytes(data))


@dataclass
class Clock:
    now: float = T0

    def __call__(self) -> float:
        return self.now


@dataclass
class Case:
    """A cache before fake vendors, with a clock to turn."""

    vendors: Vendors
    server: Server
    clock: Clock = field(default_factory=Clock)
    timeout: float = 5.0

    def __post_init__(self) -> None:
        url = self.server.url
        self.cache = VendorCache(self.fetch, self.clock, amd=url, azure=url, nvidia_rim=url, nvidia_ocsp=url)

    def fetch(self, request: Request) -> bytes:
        return https(request, self.timeout)

    def wait(self, seconds: float) -> None:
        """Time passes, and the background task runs once. The vendors go with the time."""
        self.clock.now += seconds
        self.vendors.now = datetime.datetime.fromtimestamp(self.clock.now, datetime.UTC)
        self.cache.refresh()

    @property
    def paths(self) -> list[str]:
        return [path for _, path in self.vendors.asked]


def ocsp_der() -> bytes:
    leaf, issuer = ocsp_pair()
    return ocsp_request(leaf.certificate, issuer.certificate)


GETTERS: dict[str, tuple[str, Callable[[VendorCache], object]]] = {
    "chain": ("/vcek/v1/Milan/cert_chain", lambda cache: cache.amd_chain("Milan", "vcek")),
    "vlek-chain": ("/vlek/v1/Genoa/cert_chain", lambda cache: cache.amd_chain("Genoa", "vlek")),
    "crl": ("/vcek/v1/Turin/crl", lambda cache: cache.amd_crl("Turin")),
    "vcek": ("/vcek/v1/Milan/0102", lambda cache: cache.amd_certificates(report("Milan"))),
    "azure": ("/metadata/THIM/amd/certification", lambda cache: cache.azure_certificates()),
    "ocsp": ("/", lambda cache: cache.ocsp(ocsp_der())),
}


def missing(get: Callable[[], object]) -> str:
    with pytest.raises(CollectionError) as caught:
        get()
    return str(caught.value)
