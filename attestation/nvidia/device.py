"""The machine's GPUs through NVIDIA's management library (NVML): their reports, certificates, state and readiness."""

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType

from cryptography.hazmat.primitives.serialization import Encoding

from adytum.attestation.core.certificates import load_all
from adytum.attestation.core.errors import CollectionError, EvidenceError
from adytum.attestation.core.limits import LIMITS
from adytum.attestation.document.binding import NONCE_SIZE
from adytum.attestation.nvidia.bundle import GpuEvidence, encode_bundle
from adytum.attestation.nvidia.chain import CHAIN_LENGTH
from adytum.attestation.nvidia.spdm import GpuReport

_ARCHITECTURES = {9: "hopper", 10: "blackwell"}
_MULTI_GPU = {0: "none", 1: "protected-pcie", 2: "nvlink"}
_PRODUCTION = 2
_ON = {0: False, 1: True}
_ADVICE = {
    3: "these GPUs or their driver do not support it; confidential computing needs Hopper or later, driver 535.86 or "
    "later, and the mode switched on by the host",
    4: "this process lacks the permission; run it as root, with /dev/nvidiactl and the GPUs' device files",
    6: "the GPU has disappeared; restart the virtual machine",
    9: "the NVIDIA driver is not loaded; look for the reason in `dmesg`",
    10: "the driver did not answer in time; look at `dmesg` and restart the virtual machine",
    12: "libnvidia-ml.so.1 is missing; install the NVIDIA driver in the guest",
    13: "the NVIDIA driver is too old; install 535.86 or later",
    15: "the GPU is lost; restart the virtual machine",
    16: "the GPU needs a reset; restart the virtual machine",
    18: "the driver's library and its kernel module are of different versions; restart the virtual machine",
}
"""By NVML's error code."""


@dataclass(frozen=True)
class CcState:
    """Confidential computing as the driver reports it, for all GPUs together."""

    cc: bool
    """The driver's ccFeature. Off under protected PCIe."""
    devtools: bool
    multi_gpu: str
    """none, protected-pcie or nvlink."""
    production: bool
    """False if confidential computing is off, or simulated by the driver."""

    @property
    def mode(self) -> str:
        """on, off or devtools."""
        if self.devtools:
            return "devtools"
        return "on" if self.cc or self.multi_gpu == "protected-pcie" else "off"


@dataclass(frozen=True)
class GpuInfo:
    """What the driver reports about one GPU; none of it is signed."""

    name: str
    architecture: str
    """hopper, blackwell, or NVML's number of another architecture."""
    driver_version: str
    vbios_version: str
    cc_mode: str
    multi_gpu: str
    ready: bool | None
    """Whether the GPU accepts work; None if the driver cannot tell."""
    protected_kib: int | None
    """Memory that confidential computing protects; None if the driver does not report it."""
    unprotected_kib: int | None


class NvidiaGpus:
    """All GPUs that the driver lists. Implements `collect.GpuDevices`.

    `unattested_switches`: under protected PCIe the GPUs communicate through NVSwitches that see their traffic, and this
    version cannot attest those. So collection is refused there, unless the caller accepts evidence without them. Either
    way verification notes `gpu.switches` as not checked.
    """

    def __init__(self, *, unattested_switches: bool = False) -> None:
        """Opens the library. Raises `CollectionError`."""
        self._unattested_switches = unattested_switches
        try:
            import pynvml  # type: ignore[import-not-found, import-untyped, unused-ignore]
        except ImportError as error:
            raise CollectionError(
                "the Python package nvidia-ml-py is not installed; run: pip install 'adytum[server]'"
            ) from error
        self._nvml: ModuleType = pynvml
        with self._asking("to open the driver's library"):
            pynvml.nvmlInit()

    def __repr__(self) -> str:
        return "NvidiaGpus()"

    def collect(self, nonce: bytes) -> bytes:
        """The bundle of every GPU's evidence on a 32-byte nonce. Raises `CollectionError`."""
        if len(nonce) != NONCE_SIZE:
            raise CollectionError(f"a nonce has {NONCE_SIZE} bytes")
        state = self.state()
        if state.mode != "off" and not state.production:
            raise CollectionError("the driver reports that its confidential computing is simulated")
        if state.multi_gpu == "protected-pcie" and not self._unattested_switches:
            raise CollectionError(
                "the GPUs are under protected PCIe, where NVSwitches carry traffic between them, "
                "and this version cannot attest NVSwitches yet; pass single GPUs through instead"
            )
        devices = self._devices()
        if not devices:
            raise CollectionError("the driver lists no GPU; pass one through to this machine, or configure none")
        return encode_bundle([self._evidence(device, place, nonce, state) for place, device in enumerate(devices)])

    def mode(self) -> str:
        """on, off or devtools, as the driver reports it now. Raises `CollectionError`."""
        return self.state().mode

    def state(self) -> CcState:
        """The state of confidential computing. Raises `CollectionError`."""
        nvml = self._nvml
        settings = nvml.c_nvmlSystemConfComputeSettings_v1_t()
        settings.version = nvml.nvmlSystemConfComputeSettings_v1
        with self._asking("for the state of confidential computing"):
            try:
                # The binding returns the code unchecked.
                code = nvml.nvmlSystemGetConfComputeSettings(ctypes.byref(settings))
            except nvml.NVMLError as error:
                code = error.value
            multi_gpu = settings.multiGpuMode
            if code in (nvml.NVML_ERROR_FUNCTION_NOT_FOUND, nvml.NVML_ERROR_NOT_SUPPORTED):
                # A driver older than the multi-GPU modes.
                settings, multi_gpu = nvml.nvmlSystemGetConfComputeState(), 0
            elif code != nvml.NVML_SUCCESS:
                raise nvml.NVMLError(code)
        # An unknown number could be a mode that protects less.
        if settings.ccFeature not in _ON or settings.devToolsMode not in _ON or multi_gpu not in _MULTI_GPU:
            raise CollectionError("the driver reports an unknown state of confidential computing; use a later version")
        return CcState(
            cc=_ON[settings.ccFeature],
            devtools=_ON[settings.devToolsMode],
            multi_gpu=_MULTI_GPU[multi_gpu],
            production=settings.environment == _PRODUCTION,
        )

    def ready(self) -> bool:
        """Whether the GPUs accept work. Raises `CollectionError`."""
        with self._asking("whether the GPUs are ready"):
            return bool(self._nvml.nvmlSystemGetConfComputeGpusReadyState())

    def set_ready(self, ready: bool) -> None:
        """Lets the GPUs accept work, or stops them. Raises `CollectionError`, also if it had no effect."""
        with self._asking("to set the GPUs ready" if ready else "to set the GPUs not ready"):
            self._nvml.nvmlSystemSetConfComputeGpusReadyState(int(ready))
        if self.ready() != ready:
            raise CollectionError(f"the GPUs were set {'' if ready else 'not '}ready and are not")

    def facts(self) -> tuple[GpuInfo, ...]:
        """What the driver reports about each GPU; changes nothing. Raises `CollectionError`."""
        nvml, state = self._nvml, self.state()
        with self._asking("for its version"):
            driver = nvml.nvmlSystemGetDriverVersion()
        try:
            ready = self.ready()
        except CollectionError:
            ready = None
        found = []
        for place, device in enumerate(self._devices()):
            with self._asking(f"about GPU {place}"):
                architecture = nvml.nvmlDeviceGetArchitecture(device)
                name, vbios = nvml.nvmlDeviceGetName(device), nvml.nvmlDeviceGetVbiosVersion(device)
                try:
                    sizes = nvml.nvmlDeviceGetConfComputeMemSizeInfo(device)
                except (nvml.NVMLError_NotSupported, nvml.NVMLError_FunctionNotFound):
                    sizes = None
            found.append(
                GpuInfo(
                    name=name,
                    architecture=_ARCHITECTURES.get(architecture, str(architecture)),
                    driver_version=driver,
                    vbios_version=vbios,
                    cc_mode=state.mode,
                    multi_gpu=state.multi_gpu,
                    ready=ready,
                    protected_kib=None if sizes is None else sizes.protectedMemSizeKib,
                    unprotected_kib=None if sizes is None else sizes.unprotectedMemSizeKib,
                )
            )
        return tuple(found)

    def _devices(self) -> Sequence[object]:
        with self._asking("for the GPUs"):
            count = self._nvml.nvmlDeviceGetCount()
            if count > LIMITS.gpus:
                raise CollectionError(f"the driver lists {count} GPUs; evidence has room for {LIMITS.gpus}")
            return [self._nvml.nvmlDeviceGetHandleByIndex(place) for place in range(count)]

    def _evidence(self, device: object, place: int, nonce: bytes, state: CcState) -> GpuEvidence:
        nvml = self._nvml
        with self._asking(f"for the evidence of GPU {place}"):
            number = nvml.nvmlDeviceGetArchitecture(device)
            certificates = nvml.nvmlDeviceGetConfComputeGpuCertificate(device)
            answer = nvml.nvmlDeviceGetConfComputeGpuAttestationReport(device, nonce)
        if number not in _ARCHITECTURES:
            raise CollectionError(
                f"GPU {place} is of an architecture (number {number}) that this version cannot attest"
            )
        pem = _filled(certificates.attestationCertChain, certificates.attestationCertChainSize)
        report = _filled(answer.attestationReport, answer.attestationReportSize)
        try:
            chain = load_all(pem, f"the certificates of GPU {place}")
            requested = GpuReport.parse(report).requester_nonce
        except EvidenceError as error:
            raise CollectionError(f"GPU {place} gave evidence that cannot be read: {error}") from error
        if len(chain) != CHAIN_LENGTH:
            raise CollectionError(f"GPU {place} gave {len(chain)} certificates instead of {CHAIN_LENGTH}")
        if requested != nonce:
            raise CollectionError(f"GPU {place} gave a report for another nonce than the one requested")
        return GpuEvidence(
            architecture=_ARCHITECTURES[number],
            certificates=tuple(certificate.public_bytes(Encoding.DER) for certificate in chain),
            report=report,
            cc="on" if state.cc else "off",
            devtools=state.devtools,
            multi_gpu=state.multi_gpu,
        )

    @contextmanager
    def _asking(self, what: str) -> Iterator[None]:
        try:
            yield
        except self._nvml.NVMLError as error:
            advice = _ADVICE.get(error.value, "look for the reason in `dmesg`")
            raise CollectionError(f"the NVIDIA driver was asked {what} and failed ({error}): {advice}") from error
        except UnicodeDecodeError as error:
            raise CollectionError(f"the NVIDIA driver was asked {what} and gave text that cannot be read") from error


def _filled(buffer: "ctypes.Array[ctypes.c_uint8]", size: int) -> bytes:
    """The part of a fixed buffer that the driver filled, by its own account. Raises `CollectionError`."""
    if not 0 < size <= len(buffer):
        raise CollectionError(f"the driver reports that it filled {size} of {len(buffer)} bytes")
    return bytes(buffer[:size])
