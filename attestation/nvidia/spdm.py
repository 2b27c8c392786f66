"""A GPU's attestation report: an SPDM 1.1 GET_MEASUREMENTS request and its response. Parsing only.

DMTF DSP0274, 1.1.0, tables 40 to 43; the opaque data is NVIDIA's. Integers are little-endian.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Self

from adytum.attestation.core.errors import EvidenceError
from adytum.attestation.core.reader import Reader

_REQUEST = bytes.fromhex("11e001ff")
_REQUEST_SIZE = 37
_RESPONSE = bytes.fromhex("1160")
_NONCE_SIZE = 32
_DMTF = 1
_RAW = 0x80
"""Bit of a measurement's type: the value is not a digest."""
_DIGEST_SIZE = 48
_SIGNATURE_SIZE = 96
_PADDING = 16
"""Bytes of zero that may follow the signature; a real report has one."""

_DRIVER_VERSION, _VBIOS_VERSION, _NVDEC0, _PROJECT, _PROJECT_SKU = 3, 6, 11, 17, 18
_CHIP_SKU, _FWID, _PPCIE, _SWITCH_GPU_PDIS, _CHIP_INFO, _FEATURE_FLAG = 15, 20, 21, 26, 35, 36
_FLAG_PPCIE = 2
_NVDEC0_ON, _NVDEC0_OFF = 0xAA, 0x55


@dataclass(frozen=True)
class GpuReport:
    """One report, parsed and not yet verified."""

    requester_nonce: bytes
    """32 bytes, from the request: the caller's. The response has another, the device's own."""
    measurements: Mapping[int, bytes]
    """By index from 1, 48 bytes each."""
    opaque: Mapping[int, bytes]
    """NVIDIA's fields by type. Unknown types are kept."""
    signed: bytes
    signature: bytes
    """r, then s, 48 bytes each, big-endian."""

    @classmethod
    def parse(cls, data: bytes) -> Self:
        """Reads a report by its lengths. Raises `EvidenceError`."""
        if len(data) < _REQUEST_SIZE or data[:4] != _REQUEST:
            raise EvidenceError("the GPU's report does not begin with an SPDM 1.1 request for all measurements")
        report = Reader(data, "the GPU's report")
        report.take(_REQUEST_SIZE)
        if report.take(2) != _RESPONSE:
            raise EvidenceError("the GPU's report has no SPDM 1.1 response with measurements")
        report.take(2)
        blocks, record = report.integer(1), report.sized(3)
        report.take(_NONCE_SIZE)
        opaque = report.sized(2)
        signed = data[: report.at]
        signature = report.take(_SIGNATURE_SIZE)
        rest = report.take(report.left)
        if len(rest) > _PADDING or any(rest):
            raise EvidenceError("the GPU's report has bytes after its signature")
        return cls(
            requester_nonce=data[4 : 4 + _NONCE_SIZE],
            measurements=_measurements(record, blocks),
            opaque=_opaque(opaque),
            signed=signed,
            signature=signature,
        )

    @property
    def is_switch(self) -> bool:
        """Whether an NVSwitch made it."""
        return _SWITCH_GPU_PDIS in self.opaque

    @property
    def driver_version(self) -> str:
        """Like 550.90.07."""
        return self._text(_DRIVER_VERSION)

    @property
    def vbios_version(self) -> str:
        """Like 96.00.9F.00.01."""
        raw = self.opaque.get(_VBIOS_VERSION, b"")
        if self.is_switch:
            return self._text(_VBIOS_VERSION)
        if len(raw) != 8:
            raise EvidenceError("the GPU's report does not state the VBIOS's version")
        low, high = raw[:4][::-1], raw[4:5]
        return ".".join(f"{byte:02X}" for byte in (*low, *high))

    @property
    def project(self) -> str:
        return self._text(_PROJECT)

    @property
    def project_sku(self) -> str:
        return self._text(_PROJECT_SKU)

    @property
    def chip_sku(self) -> str:
        return self._text(_CHIP_SKU)

    @property
    def chip_info(self) -> str | None:
        """Names the driver's manifest on Blackwell; None if the driver does not report it."""
        return self._text(_CHIP_INFO) if _CHIP_INFO in self.opaque else None

    @property
    def fwid(self) -> bytes | None:
        """48 bytes; None for drivers that do not report it (535, 545)."""
        found = self.opaque.get(_FWID)
        if found is not None and len(found) != _DIGEST_SIZE:
            raise EvidenceError("the GPU's report has a firmware id that is not 48 bytes")
        return found

    @property
    def nvdec0_on(self) -> bool:
        """Whether video decoder 0 runs. Only then does the manifest's index 35 apply."""
        found = self.opaque.get(_NVDEC0, b"")
        if len(found) < 1 or found[0] not in (_NVDEC0_ON, _NVDEC0_OFF) or any(found[1:]):
            raise EvidenceError("the GPU's report does not state whether its video decoder 0 is on")
        return found[0] == _NVDEC0_ON

    @property
    def protected_pcie(self) -> bool | None:
        """Whether the GPU is under protected PCIe; None for drivers that do not report it (535, Blackwell's)."""
        found = self.opaque.get(_PPCIE)
        if found is None:
            return None if self.feature_flag is None else self.feature_flag == _FLAG_PPCIE
        if found not in (b"\xaa", b"\x55"):
            raise EvidenceError("the GPU's report does not state whether it is under protected PCIe")
        return found == b"\xaa"

    @property
    def feature_flag(self) -> int | None:
        """0 one GPU passed through, 1 several, 2 protected PCIe; None if it is not reported."""
        found = self.opaque.get(_FEATURE_FLAG)
        return None if found is None else int.from_bytes(found, "little")

    def _text(self, kind: int) -> str:
        raw = self.opaque.get(kind, b"").rstrip(b"\0")
        if not raw or not all(0x21 <= byte < 0x7F for byte in raw):
            raise EvidenceError(f"the GPU's report lacks the text of its field {kind}")
        return raw.decode("ascii")


def _measurements(record: bytes, blocks: int) -> Mapping[int, bytes]:
    reader = Reader(record, "the record of the GPU's measurements")
    found: dict[int, bytes] = {}
    for _ in range(blocks):
        index, specification, size = reader.unpack("<BBH")
        kind, digest_size = reader.unpack("<BH")
        if specification != _DMTF or kind & _RAW or digest_size != _DIGEST_SIZE or size != digest_size + 3:
            raise EvidenceError(f"the GPU's measurement {index} is not a SHA-384 digest in DMTF's form")
        if index <= max(found, default=0):
            raise EvidenceError(f"the GPU's measurement {index} is repeated or out of order")
        found[index] = reader.take(digest_size)
    if reader.left or not found:
        raise EvidenceError("the GPU's measurements do not fill their record")
    return MappingProxyType(found)


def _opaque(data: bytes) -> Mapping[int, bytes]:
    reader = Reader(data, "the opaque data of the GPU's report")
    found: dict[int, bytes] = {}
    while reader.left:
        kind, size = reader.unpack("<HH")
        if kind in found:
            raise EvidenceError(f"the GPU's report has its field {kind} twice")
        found[kind] = reader.take(size)
    return MappingProxyType(found)
