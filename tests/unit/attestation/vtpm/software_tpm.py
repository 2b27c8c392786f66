"""A software TPM (`swtpm`), and a paravisor in front of it that behaves as Azure's does."""

import base64
import hashlib
import json
import os
import shutil
import socket
import struct
import subprocess
import threading
import time
import tty
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import rsa

from adytum.attestation.core.errors import CollectionError
from adytum.attestation.vtpm.device import ATTESTATION_KEY, HCL_REPORT, USER_DATA
from adytum.attestation.vtpm.tpm import AUTH_READ, HEADER, OWNER, OWNER_READ, OWNER_WRITE, Tpm, TpmError, Transport

INDEX_SIZE = 2000
"""Of the report's index. Azure's has 2,600 bytes, this TPM takes 2,048."""
RENEWAL = 2.0
"""Seconds from one report to the next that the paravisor makes."""


class SocketTpm:
    """Carries commands to a TPM over a stream socket, as swtpm speaks."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(30)
        self._socket.connect(str(path))

    def exchange(self, command: bytes) -> bytes:
        self._socket.sendall(command)
        response = self._take(HEADER.size)
        return response + self._take(HEADER.unpack(response)[1] - HEADER.size)

    def _take(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            data += self._socket.recv(size - len(data))
        return data

    def close(self) -> None:
        self._socket.close()


@contextmanager
def software_tpm(folder: Path) -> Iterator[SocketTpm]:
    """A fresh TPM 2.0, started."""
    program = shutil.which("swtpm")
    if program is None:
        pytest.skip("the software TPM is not installed (apt-get install swtpm)")
    path = folder / "tpm.sock"
    process = subprocess.Popen(
        [program, "socket", "--tpm2", "--tpmstate", f"dir={folder}", "--server", f"type=unixio,path={path}",
         "--flags", "not-need-init,startup-clear"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        tpm = connected(path, process)
        try:
            yield tpm
        finally:
            tpm.close()
    finally:
        process.terminate()
        process.wait(10)


def connected(path: Path, process: subprocess.Popen[bytes]) -> SocketTpm:
    """As soon as it listens."""
    deadline = time.monotonic() + 30
    while True:
        try:
            return SocketTpm(path)
        except (FileNotFoundError, ConnectionRefusedError):
            assert process.poll() is None, "swtpm ended"
            assert time.monotonic() < deadline, "swtpm does not listen"
            time.sleep(0.01)


def make_attestation_key(transport: Transport) -> rsa.RSAPublicKey:
    """A restricted RSA signing key at the handle that Azure uses, made anew if one is there."""
    tpm = Tpm(transport)
    attributes = sum(1 << bit for bit in (1, 4, 5, 6, 16, 18))
    template = struct.pack(">HHIHHHHHIH", 1, 0x000B, attributes, 0, 0x0010, 0x0014, 0x000B, 2048, 0, 0)
    parameters = struct.pack(">HHH", 4, 0, 0) + struct.pack(">H", len(template)) + template + struct.pack(">HI", 0, 0)
    answer = tpm.run("CreatePrimary", 0x131, (OWNER,), parameters, authorized=1)
    (handle,) = struct.unpack_from(">I", answer)
    (size,) = struct.unpack_from(">H", answer, 8)
    modulus = answer[10 : 10 + size][-256:]
    tpm.run("EvictControl", 0x120, (OWNER, handle), struct.pack(">I", ATTESTATION_KEY), authorized=1)
    tpm.run("FlushContext", 0x165, (), struct.pack(">I", handle))
    return rsa.RSAPublicNumbers(65537, int.from_bytes(modulus, "big")).public_key()


def extend(transport: Transport, register: int, digest: bytes) -> None:
    """PCR_Extend of the SHA-256 bank."""
    Tpm(transport).run("PCR_Extend", 0x182, (register,), struct.pack(">IH", 1, 0x000B) + digest, authorized=1)


def undefine(transport: Transport, index: int) -> None:
    Tpm(transport).run("NV_UndefineSpace", 0x122, (OWNER, index), b"", authorized=1)


def is_defined(transport: Transport, index: int) -> bool:
    try:
        Tpm(transport).nv_index(index)
    except TpmError as error:
        if error.no_such_handle:
            return False
        raise
    return True


def jwk_number(value: int) -> str:
    return base64.urlsafe_b64encode(value.to_bytes((value.bit_length() + 7) // 8, "big")).rstrip(b"=").decode()


def runtime_data(key: rsa.RSAPublicKey, user_data: bytes | None) -> bytes:
    """As the paravisor writes it."""
    numbers = key.public_numbers()
    fields: dict[str, object] = {
        "keys": [
            {
                "kid": "HCLAkPub",
                "key_ops": ["sign"],
                "kty": "RSA",
                "e": jwk_number(numbers.e),
                "n": jwk_number(numbers.n),
            }
        ],
        "vm-configuration": {"secure-boot": True},
    }
    if user_data is not None:
        fields["user-data"] = user_data.hex().upper()
    return json.dumps(fields, separators=(",", ":")).encode()


def hcl_report(snp_report: bytes, runtime: bytes, *, hash_type: int = 1, report_type: int = 2) -> bytes:
    header = struct.pack("<4s7I", b"HCLA", 2, 1236 + len(runtime), 2, 0, 0, 0, 0)
    return (
        header + snp_report + struct.pack("<5I", 20 + len(runtime), 1, report_type, hash_type, len(runtime)) + runtime
    )


def hashed(runtime: bytes) -> bytes:
    return hashlib.sha256(runtime).digest().ljust(64, b"\x00")


class Paravisor:
    """Owns the report's index: makes a report when it is read, if the last one is two seconds old or older. It takes
    the user data at that time, and gives the old report again until then."""

    def __init__(
        self,
        transport: Transport,
        key: rsa.RSAPublicKey,
        sign: Callable[[bytes], bytes],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`sign` gives the SNP report for 64 bytes of report data."""
        self._transport = transport
        self._key = key
        self._sign = sign
        self._clock = clock
        self._made: float | None = None
        self.reads = 0
        self.reports = 0
        self._tpm = Tpm(transport)
        if not is_defined(transport, HCL_REPORT):
            self._tpm.nv_define(HCL_REPORT, INDEX_SIZE, OWNER_READ | AUTH_READ | OWNER_WRITE)

    def exchange(self, command: bytes) -> bytes:
        code, _, index = struct.unpack_from(">III", command, 6) if len(command) >= 18 else (0, 0, 0)
        if code == 0x14E and index == HCL_REPORT:
            self.reads += 1
            # A read begins at the offset zero, which ends the command.
            if command.endswith(b"\x00\x00") and (self._made is None or self._clock() - self._made >= RENEWAL):
                self.renew()
        return self._transport.exchange(command)

    def renew(self) -> None:
        self.reports += 1
        self._made = self._clock()
        user_data = bytes(64)
        if is_defined(self._transport, USER_DATA):
            index = self._tpm.nv_index(USER_DATA)
            if index.attributes & 1 << 29:  # Written
                user_data = self._tpm.nv_read(index)
        runtime = runtime_data(self._key, user_data.ljust(64, b"\x00"))
        report = hcl_report(self._sign(hashed(runtime)), runtime).ljust(INDEX_SIZE, b"\x00")
        # NV_Write takes 1,024 bytes at a time.
        for at in range(0, INDEX_SIZE, 1000):
            piece = report[at : at + 1000]
            parameters = struct.pack(">H", len(piece)) + piece + struct.pack(">H", at)
            self._tpm.run("NV_Write", 0x137, (OWNER, HCL_REPORT), parameters, authorized=1)


@contextmanager
def device_file(transport: Transport) -> Iterator[str]:
    """A path that speaks as a TPM's device file does: a terminal in raw mode, with the TPM behind it."""
    ours, theirs = os.openpty()
    tty.setraw(theirs)
    stop = threading.Event()

    def serve() -> None:
        while not stop.is_set():
            try:
                command = os.read(ours, 4096)
                while len(command) < HEADER.unpack_from(command)[1]:
                    command += os.read(ours, 4096)
                os.write(ours, transport.exchange(command))
            except (OSError, struct.error, CollectionError):
                return

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield os.ttyname(theirs)
    finally:
        stop.set()
        os.write(theirs, b"\x00")  # Ends the read, with something that is not a command.
        thread.join(5)
        os.close(theirs)
        os.close(ours)
