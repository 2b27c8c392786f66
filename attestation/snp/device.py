"""The SEV-SNP device inside the guest: reports through configfs-tsm, or through /dev/sev-guest if the kernel lacks it.

Linux, include/uapi/linux/sev-guest.h; AMD, "SEV Secure Nested Paging Firmware ABI Specification" (56860), 7.3, and
"Guest Hypervisor Communication Block Standardization" (56421), 4.1.8.
"""

import ctypes
import errno
import fcntl
import os
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal, Protocol

from adytum.attestation.core.certificates import load
from adytum.attestation.core.errors import CollectionError, EvidenceError
from adytum.attestation.document.evidence import CpuEvidence
from adytum.attestation.snp.report import SnpReport, tcb_levels
from adytum.attestation.snp.table import certificates
from adytum.attestation.snp.vek import Vek
from adytum.attestation.tsm.device import Tsm

PROVIDER = "sev-snp"
GUEST = Path("/dev/sev-guest")
GET_REPORT, GET_EXT_REPORT = 0xC0205300, 0xC0205302
_REPORT_DATA_SIZE = 64
_REQUEST = struct.Struct("<64sI28x")
_EXT_REQUEST = struct.Struct("<64sI28xQI4x")
_ARGUMENT = struct.Struct("<B7xQQQ")
_MESSAGE_VERSION = 1
_RESPONSE_SIZE = 4000
_REPORT_AT = 0x20
_EXIT_AT = 24
_VMM_INVALID_LENGTH, _VMM_BUSY = 1, 2
_PAGE = 4096
_TABLE_MAX = 16 * 1024
"""The most that the kernel passes on (SEV_FW_BLOB_MAX_SIZE), in whole pages."""
_TRIES, _PAUSE_S = 8, 0.25
_FIRMWARE = {
    0x16: "a parameter was refused: below a service module or paravisor the kernel needs configfs-tsm",
    0x27: "the guest's key was refused: restart the machine",
    0xFF: "the firmware was not asked",
}
"""The firmware's errors that a guest can meet (56860, status codes; 0xFF is the kernel's)."""


class Ioctl(Protocol):
    """`fcntl.ioctl`, as it is used here."""

    def __call__(self, descriptor: int, request: int, argument: bytearray, mutate: bool, /) -> int: ...


class SevSnp:
    """AMD SEV-SNP.

    Certificates that the host does not send, or sends for other firmware, come from AMD. `vendor` returns VCEK, ASK and
    ARK (DER) for a report. `chain` returns ASK and ARK, or ASVK and ARK, for a product and kind of key: providers send
    their VLEK alone. Both raise `CollectionError` until they have them.
    """

    provider = PROVIDER

    def __init__(
        self,
        vendor: Callable[[SnpReport], tuple[bytes, ...]],
        chain: Callable[[str, Literal["vcek", "vlek"]], tuple[bytes, ...]],
        tsm: Tsm | None = None,
        guest: Path = GUEST,
        ioctl: Ioctl = fcntl.ioctl,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._vendor = vendor
        self._chain = chain
        self._tsm = tsm or Tsm()
        self._guest = guest
        self._ioctl = ioctl
        self._sleep = sleep

    def __repr__(self) -> str:
        return "SevSnp()"

    def report(self, report_data: bytes) -> CpuEvidence:
        """A report that carries `report_data`, 64 bytes, with its certificates. Raises `CollectionError`."""
        if len(report_data) != _REPORT_DATA_SIZE:
            raise CollectionError(f"report data has {_REPORT_DATA_SIZE} bytes")
        if self._tsm.present:
            found = self._tsm.report(report_data, "sev_guest")
            report, table = found.outblob, found.auxblob
        elif self._guest.exists():
            report, table = self._from_guest(report_data)
        else:
            raise CollectionError(
                f"this machine has neither configfs-tsm nor {self._guest}: is it an SEV-SNP guest, with the kernel's "
                "sev-guest module loaded? Behind Azure's paravisor set evidence.cpu to sev-snp-vtpm"
            )
        # A fault of this machine is found here, and not by every client.
        try:
            parsed = SnpReport.parse(report)
            given = certificates(table, parsed.signing_key)
            vek = Vek.parse(load(given[0], "the host's VEK certificate")) if given else None
        except EvidenceError as error:
            raise CollectionError(f"the machine gave no usable evidence: {error}") from error
        if parsed.report_data != report_data:
            raise CollectionError("the machine gave a report for other report data")
        if vek is None or not _fits(parsed, vek):
            given = self._vendor(parsed)
        elif len(given) == 1:
            given += self._chain(vek.product, vek.kind)
        return CpuEvidence(PROVIDER, report, given)

    def _from_guest(self, report_data: bytes) -> tuple[bytes, bytes]:
        """(report, certificate table), through the extended request. The table may be empty."""
        try:
            descriptor = os.open(self._guest, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise CollectionError(f"{self._guest} cannot be opened ({error.strerror}); run as root") from error
        try:
            table = bytearray(_PAGE)
            while True:
                request = bytearray(_EXT_REQUEST.pack(report_data, 0, _address(table), len(table)))
                report = self._ask(descriptor, GET_EXT_REPORT, request)
                if report is not None:
                    return report, bytes(table) if any(table) else b""
                # The host has more certificates than fit: the kernel wrote their size into the request.
                size = _EXT_REQUEST.unpack(request)[3]
                if not len(table) < size <= _TABLE_MAX:
                    break
                table = bytearray(-(-size // _PAGE) * _PAGE)
            # More than the kernel passes on. The report can be requested without the host's certificates.
            report = self._ask(descriptor, GET_REPORT, bytearray(_REQUEST.pack(report_data, 0)))
            if report is None:
                raise CollectionError("the host insists on certificates with a report that was requested without them")
            return report, b""
        finally:
            os.close(descriptor)

    def _ask(self, descriptor: int, code: int, request: bytearray) -> bytes | None:
        """The report, or None if the host's certificates need a larger buffer. Waits while the host is busy."""
        for attempt in range(_TRIES):
            response = bytearray(_RESPONSE_SIZE)
            argument = bytearray(_ARGUMENT.pack(_MESSAGE_VERSION, _address(request), _address(response), 0))
            failed: OSError | None = None
            try:
                self._ioctl(descriptor, code, argument, True)
            except OSError as error:
                failed = error
            exit_info = int.from_bytes(argument[_EXIT_AT : _EXIT_AT + 8], "little")
            firmware, host = exit_info & 0xFFFFFFFF, exit_info >> 32
            if host == _VMM_INVALID_LENGTH:
                return None
            if host == _VMM_BUSY:
                self._sleep(_PAUSE_S * 2**attempt)
                continue
            if failed is not None or firmware or host:
                raise CollectionError(
                    f"{self._guest} gave no report: {_reason(failed)}; "
                    f"firmware error {_firmware(firmware)}, host error {host:#x}"
                )
            status, size = struct.unpack_from("<II", response)
            if status or _REPORT_AT + size > len(response):
                raise CollectionError(f"the firmware gave no report: status {_firmware(status)}")
            return bytes(response[_REPORT_AT : _REPORT_AT + size])
        raise CollectionError("the host stays busy; it limits how often the platform signs")


def _fits(report: SnpReport, vek: Vek) -> bool:
    """Whether the certificate is for this report. After a firmware update a host may still send the old certificate,
    which clients would refuse."""
    if report.signing_key != vek.kind or report.product not in (None, vek.product):
        return False
    return tcb_levels(vek.product, report.reported_tcb) == vek.tcb


def _firmware(number: int) -> str:
    return f"{number:#x} ({_FIRMWARE[number]})" if number in _FIRMWARE else f"{number:#x}"


def _reason(failed: OSError | None) -> str:
    if failed is None:
        return "the kernel reported no error"
    if failed.errno == errno.ENOTTY:
        return "the kernel gave up its key after an earlier error, and the machine has to be restarted"
    return failed.strerror or type(failed).__name__


def _address(buffer: bytearray) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(buffer))
