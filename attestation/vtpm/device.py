"""The CPU device of a guest behind Azure's paravisor, which collects through the virtual TPM."""

import os
import threading
import time
from collections.abc import Callable

from adytum.attestation.core.errors import AttestationError, CollectionError, EvidenceError
from adytum.attestation.document.evidence import CpuEvidence
from adytum.attestation.vtpm.evidence import PROVIDER, VtpmReport, qualifying_data
from adytum.attestation.vtpm.hcl import HclReport
from adytum.attestation.vtpm.quote import ALL_PCRS, TpmQuote
from adytum.attestation.vtpm.tpm import (
    AUTH_READ,
    AUTH_WRITE,
    HEADER,
    LARGEST_RESPONSE,
    OWNER_READ,
    OWNER_WRITE,
    NvIndex,
    Tpm,
    TpmError,
    Transport,
)

HCL_REPORT = 0x01400001
"""NV index of the report. Reading it makes the paravisor write a new one, at most every two seconds."""
USER_DATA = 0x01400002
"""NV index of the 64 bytes that the next report carries. The guest defines it if it is missing."""
ATTESTATION_KEY = 0x81000003
"""Persistent handle of the key that the report calls HCLAkPub."""
_REPORT_DATA_SIZE = 64
_PATIENCE = 10.0
"""Seconds to wait for a report that carries the user data; the paravisor may take two or three."""
_PAUSE = 0.25
_QUOTES = 5
"""A program that extends a register between reading and quoting costs one try."""


class TpmDevice:
    """A TPM as a device file. The kernel's resource manager (`tpmrm0`) lets several programs use one TPM."""

    def __init__(self, path: str = "/dev/tpmrm0") -> None:
        self._path = path

    def __repr__(self) -> str:
        return f"TpmDevice({self._path})"

    def exchange(self, command: bytes) -> bytes:
        """One command and its response. Nothing that the commands need outlives the open file."""
        try:
            device = os.open(self._path, os.O_RDWR | os.O_CLOEXEC | os.O_NOCTTY)
            try:
                if os.write(device, command) != len(command):
                    raise CollectionError(f"{self._path} did not accept a whole command")
                response = os.read(device, LARGEST_RESPONSE)
                while len(response) < HEADER.size or len(response) < HEADER.unpack_from(response)[1]:
                    more = os.read(device, LARGEST_RESPONSE)
                    if not more or len(response) > LARGEST_RESPONSE:
                        raise CollectionError(f"{self._path} did not return a whole response")
                    response += more
                return response
            finally:
                os.close(device)
        except OSError as error:
            raise CollectionError(
                f"the TPM at {self._path} cannot be used ({error.strerror}); is this a confidential VM of Azure, and "
                "is the user in the group tss?"
            ) from error


class SnpVtpm:
    """SEV-SNP reports and quotes of the virtual TPM. One report takes a few seconds; calls wait for each other."""

    provider = PROVIDER

    def __init__(
        self,
        certificates: Callable[[], tuple[bytes, ...]],
        transport: Transport | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """`certificates` returns this machine's VCEK, ASK and ARK, DER, fetched before. It raises `CollectionError`
        while they are missing."""
        self._certificates = certificates
        self._tpm = Tpm(transport or TpmDevice())
        self._clock = clock
        self._sleep = sleep
        # The whole machine shares one place for user data.
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return "SnpVtpm()"

    def report(self, report_data: bytes) -> CpuEvidence:
        """Evidence that carries `report_data`, 64 bytes: in the SNP report, and by its hash in the quote."""
        if len(report_data) != _REPORT_DATA_SIZE:
            raise CollectionError(f"report data has {_REPORT_DATA_SIZE} bytes")
        with self._lock:
            self._tpm.nv_write(self._user_data_index(), report_data)
            hcl = self._hcl_report(report_data)
            quote, signature, pcrs = self._quote(report_data)
        return CpuEvidence(PROVIDER, VtpmReport(hcl, quote, signature, pcrs).encode(), self._certificates())

    def _user_data_index(self) -> NvIndex:
        try:
            index = self._tpm.nv_index(USER_DATA)
        except TpmError as error:
            if not error.no_such_handle:
                raise
            self._tpm.nv_define(USER_DATA, _REPORT_DATA_SIZE, OWNER_WRITE | AUTH_WRITE | OWNER_READ | AUTH_READ)
            index = self._tpm.nv_index(USER_DATA)
        if index.size != _REPORT_DATA_SIZE:
            raise CollectionError(
                f"the TPM's index {USER_DATA:#x} has {index.size} bytes instead of {_REPORT_DATA_SIZE}; undefine it "
                f"(tpm2_nvundefine -C o {USER_DATA:#x})"
            )
        return index

    def _hcl_report(self, report_data: bytes) -> bytes:
        """Reads until a report carries `report_data`. Within two seconds the paravisor returns its last report again,
        and a report that is replaced while it is read in pieces is torn."""
        deadline = self._clock() + _PATIENCE
        while True:
            try:
                hcl = HclReport.parse(self._tpm.nv_read(self._tpm.nv_index(HCL_REPORT)))
                if hcl.user_data == report_data and hcl.whole:
                    return hcl.encoded
                reason = "its report carries other user data; does another program write it?"
            except CollectionError:
                raise
            except AttestationError as error:
                reason = str(error)
            if self._clock() >= deadline:
                raise CollectionError(f"the paravisor gave no report with this data in {_PATIENCE:.0f} s: {reason}")
            self._sleep(_PAUSE)

    def _quote(self, report_data: bytes) -> tuple[bytes, bytes, tuple[bytes, ...]]:
        for _ in range(_QUOTES):
            pcrs = self._tpm.pcrs(ALL_PCRS)
            message, signature = self._tpm.quote(ATTESTATION_KEY, qualifying_data(report_data), ALL_PCRS)
            try:
                covered = TpmQuote.parse(message).covers(pcrs)
            except EvidenceError as error:
                raise CollectionError(f"the TPM gave no readable quote: {error}") from error
            if covered:
                return message, signature, pcrs
        raise CollectionError("the TPM's registers changed each time they were quoted")
