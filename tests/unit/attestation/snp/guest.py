"""A fake /dev/sev-guest: reads and writes the kernel's real structures in memory, and signs for real.

Linux, include/uapi/linux/sev-guest.h.
"""

import ctypes
import errno
import os
import struct
from dataclasses import dataclass, field

from tests.unit.attestation.snp.authority import Processor

GET_REPORT, GET_EXT_REPORT = 0xC0205300, 0xC0205302
PAGE, LARGEST = 4096, 4 * 4096
"""The kernel refuses another size of the buffer for certificates."""


@dataclass
class FakeGuest:
    """Stands in for `fcntl.ioctl`. Every field is one thing that the platform may do."""

    processor: Processor
    table: bytes = b""
    """The host's certificates, as it lays them out."""
    busy: int = 0
    """Times that the host says it is busy before it answers."""
    firmware_error: int = 0
    host_error: int = 0
    status: int = 0
    kernel_error: int = 0
    always_too_small: bool = False
    asked: list[int] = field(default_factory=list)

    def __call__(self, descriptor: int, code: int, argument: bytearray, mutate: bool, /) -> int:
        assert os.fstat(descriptor)
        assert mutate
        assert code in (GET_REPORT, GET_EXT_REPORT)
        self.asked.append(code)
        version, request, response, exit_info = struct.unpack("<B7xQQQ", argument)
        assert (version, exit_info) == (1, 0)
        report_data, vmpl = struct.unpack("<64sI28x", ctypes.string_at(request, 96))
        assert vmpl == 0
        if self.kernel_error:
            raise OSError(self.kernel_error, os.strerror(self.kernel_error))
        if self.busy:
            self.busy -= 1
            return self._fail(argument, 0, 2)
        if self.firmware_error or self.host_error:
            return self._fail(argument, self.firmware_error, self.host_error)
        if self.always_too_small and code == GET_REPORT:
            return self._fail(argument, 0, 1)
        if code == GET_EXT_REPORT:
            address, size = struct.unpack("<QI4x", ctypes.string_at(request + 96, 16))
            if size > LARGEST or size % PAGE:
                raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
            if size < len(self.table) or self.always_too_small:
                # The host says how many pages it takes.
                wanted = size + 1 if self.always_too_small else len(self.table)
                ctypes.memmove(request + 104, struct.pack("<I", -(-wanted // PAGE) * PAGE), 4)
                return self._fail(argument, 0, 1)
            ctypes.memmove(address, self.table, len(self.table))
        report = self.processor.report(report_data)
        ctypes.memmove(response, struct.pack("<II24x", self.status, len(report)) + report, 32 + len(report))
        return 0

    @staticmethod
    def _fail(argument: bytearray, firmware: int, host: int) -> int:
        argument[24:32] = (host << 32 | firmware).to_bytes(8, "little")
        raise OSError(errno.EIO, os.strerror(errno.EIO))


def table(entries: dict[str, bytes]) -> bytes:
    """The host's certificate table: GUIDs in RFC 4122 byte order, then a zero entry, then the certificates."""
    guids = {
        "vcek": "63da758de6644564adc5f4b93be8accd",
        "vlek": "a8074bc2a25a483eaae639c045a0b8a1",
        "ask": "4ab7b379bbac4fe4a02f05aef327c782",
        "ark": "c0b406a4a803495297433fb6014cd0ae",
    }
    at = 24 * (len(entries) + 1)
    head, body = b"", b""
    for name, data in entries.items():
        head += bytes.fromhex(guids.get(name, name)) + struct.pack("<II", at + len(body), len(data))
        body += data
    return head + bytes(24) + body
