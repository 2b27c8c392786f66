"""What the vendors signed about the devices of one piece of evidence, from the cache in `vendors`."""

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from typing import TypeVar

from adytum.attestation.collect.vendors import VendorCache
from adytum.attestation.core.certificates import load
from adytum.attestation.core.errors import CollectionError
from adytum.attestation.document.evidence import NO_GPUS, Collateral, CpuEvidence
from adytum.attestation.snp.vek import Vek

T = TypeVar("T")


class VendorEndorsements:
    """Collateral from the cache. What is not there yet is omitted: each client's policy decides whether it needs it."""

    def __init__(self, cache: VendorCache) -> None:
        self._cache = cache

    def collateral(self, cpu: CpuEvidence, gpu: bytes) -> Collateral:
        """For one CPU's evidence and one GPU bundle. Raises `EvidenceError` if these cannot be read."""
        crls: tuple[bytes, ...] = ()
        if cpu.provider.startswith("sev-snp"):
            product = Vek.parse(load(cpu.certificates[0], "the VEK")).product
            crls = tuple(_there(partial(self._cache.amd_crl, product)))
        rims, ocsp = ((), ()) if gpu == NO_GPUS else self._gpus(gpu)
        return Collateral(crls=crls, rims=rims, ocsp=ocsp)

    def _gpus(self, bundle: bytes) -> tuple[tuple[bytes, ...], tuple[bytes, ...]]:
        from adytum.attestation.nvidia.bundle import parse_bundle
        from adytum.attestation.nvidia.ocsp import ocsp_request
        from adytum.attestation.nvidia.rim import Rim, rim_ids
        from adytum.attestation.nvidia.spdm import GpuReport

        rims: dict[str, bytes] = {}
        requests: dict[bytes, None] = {}
        for gpu in parse_bundle(bundle):
            chain = [load(der, "a GPU's certificate") for der in gpu.certificates]
            for certificate, issuer in pairwise(chain[1:]):
                requests[ocsp_request(certificate, issuer)] = None
            for name in rim_ids(GpuReport.parse(gpu.report), gpu.architecture):
                for data in _there(partial(self._cache.rim, name)):
                    rims[name] = data
                    for certificate, issuer in pairwise(Rim.parse(data).chain):
                        requests[ocsp_request(certificate, issuer)] = None
        answers = [answer for request in requests for answer in _there(partial(self._cache.ocsp, request))]
        return tuple(rims.values()), tuple(answers)


def _there(get: Callable[[], T]) -> Iterator[T]:
    """What `get` returns, or nothing while the cache does not have it."""
    with contextlib.suppress(CollectionError):
        yield get()
