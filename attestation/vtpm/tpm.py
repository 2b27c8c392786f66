"""The few TPM 2.0 commands that collecting evidence needs, over any transport. No IO of its own.

Command: tag u16, size u32, code u32, handles u32 each, authorizations (u32 size, then one per handle that needs it),
and parameters. Response: tag u16, size u32, code u32, and with authorizations the parameters' size u32, parameters.
Integers are big-endian (TCG, TPM 2.0 Library, Part 1, 18, and Part 3). All authorizations are the empty password, as
Azure's virtual TPM has it for its owner and its indexes.
"""

import struct
from dataclasses import dataclass
from typing import Protocol

from adytum.attestation.core.errors import CollectionError
from adytum.attestation.core.reader import Reader

OWNER = 0x40000001
OWNER_WRITE, AUTH_WRITE = 1 << 1, 1 << 2
OWNER_READ, AUTH_READ = 1 << 17, 1 << 18
RC_HANDLE = 0x8B
"""There is nothing at this handle (TPM_RC_HANDLE, with the handle's number masked out)."""
HEADER = struct.Struct(">HII")
LARGEST_RESPONSE = 4096
"""Bytes; the most that Linux's driver passes on."""
_NO_SESSIONS, _SESSIONS = 0x8001, 0x8002
_PASSWORD = struct.pack(">IHBH", 0x40000009, 0, 0, 0)
_SHA256, _RSASSA = 0x000B, 0x0014
_NV_BUFFER_MAX = 0x12C
_NV_BUFFER_SMALLEST = 512
_RETRY = frozenset({0x908, 0x90A, 0x922})
"""Yielded, testing, retry: the same command may be sent again."""
_TRIES = 5
_NV_LARGEST = 64 * 1024


class Transport(Protocol):
    """What carries commands to a TPM."""

    def exchange(self, command: bytes) -> bytes:
        """The response to one command. Raises `CollectionError`."""


class TpmError(CollectionError):
    """The TPM answered a command with an error."""

    def __init__(self, command: str, code: int) -> None:
        super().__init__(f"the TPM answered {command} with the code {code:#x}")
        self.code = code

    @property
    def no_such_handle(self) -> bool:
        """Whether there is nothing at the handle."""
        return self.code & 0xFF == RC_HANDLE


@dataclass(frozen=True)
class NvIndex:
    """One piece of the TPM's storage."""

    handle: int
    attributes: int
    size: int


class Tpm:
    """Speaks to one TPM. Every method raises `CollectionError`; a TPM's own error is a `TpmError`."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    def run(self, name: str, code: int, handles: tuple[int, ...], parameters: bytes, *, authorized: int = 0) -> bytes:
        """Runs one command, whose first `authorized` handles take the empty password. Returns the response's
        parameters, after the handle if the command returns one."""
        authorization = struct.pack(">I", len(_PASSWORD) * authorized) + _PASSWORD * authorized if authorized else b""
        body = struct.pack(f">{len(handles)}I", *handles) + authorization + parameters
        tag = _SESSIONS if authorized else _NO_SESSIONS
        command = HEADER.pack(tag, HEADER.size + len(body), code) + body
        for _ in range(_TRIES):
            response = self._transport.exchange(command)
            if len(response) < HEADER.size:
                raise CollectionError(f"the TPM's response to {name} is too short")
            tag, size, result = HEADER.unpack_from(response)
            if size != len(response):
                raise CollectionError(f"the TPM's response to {name} does not have the size that it states")
            if result == 0:
                return response[HEADER.size :]
            if result not in _RETRY:
                break
        raise TpmError(name, result)

    def nv_index(self, handle: int) -> NvIndex:
        """NV_ReadPublic."""
        public = _reader(_reader(self.run("NV_ReadPublic", 0x169, (handle,), b"")).sized(2))
        _, _, attributes = public.unpack(">IHI")
        public.sized(2)
        return NvIndex(handle, attributes, public.integer(2))

    def nv_define(self, handle: int, size: int, attributes: int) -> None:
        """NV_DefineSpace, under the owner, without a password of its own."""
        public = struct.pack(">IHIHH", handle, _SHA256, attributes, 0, size)
        self.run("NV_DefineSpace", 0x12A, (OWNER,), struct.pack(">H", 0) + _sized(public), authorized=1)

    def nv_read(self, index: NvIndex) -> bytes:
        """NV_Read of the whole index, in pieces of the size that the TPM accepts."""
        if index.size > _NV_LARGEST:
            raise CollectionError(f"the TPM's index {index.handle:#x} has {index.size} bytes, more than {_NV_LARGEST}")
        authority = self._authority(index, OWNER_READ, AUTH_READ, "read")
        piece = self._nv_piece()
        data = b""
        while len(data) < index.size:
            wanted = min(piece, index.size - len(data))
            answer = self._parameters(
                "NV_Read", 0x14E, (authority, index.handle), struct.pack(">HH", wanted, len(data))
            ).sized(2)
            if len(answer) != wanted:
                raise CollectionError("the TPM returned less of an index than was requested")
            data += answer
        return data

    def nv_write(self, index: NvIndex, data: bytes) -> None:
        """NV_Write from the index's beginning; `data` is at most 512 bytes."""
        authority = self._authority(index, OWNER_WRITE, AUTH_WRITE, "written")
        parameters = _sized(data) + struct.pack(">H", 0)
        self.run("NV_Write", 0x137, (authority, index.handle), parameters, authorized=1)

    def pcrs(self, selection: tuple[int, bytes]) -> tuple[bytes, ...]:
        """PCR_Read of all selected registers of one bank, in their order."""
        algorithm, wanted = selection[0], bytearray(selection[1])
        values: list[bytes] = []
        while any(wanted):
            reader = _reader(self.run("PCR_Read", 0x17E, (), _selection((algorithm, bytes(wanted)))))
            _, count = reader.unpack(">II")
            read = bytearray(len(wanted))
            for _ in range(count):
                bank, size = reader.unpack(">HB")
                bits = reader.take(size)
                if bank == algorithm and size == len(read):
                    read = bytearray(bits)
            count = reader.integer(4)
            if not any(read) or count != sum(byte.bit_count() for byte in read):
                raise CollectionError("the TPM does not have all registers of the SHA-256 bank")
            values += [reader.sized(2) for _ in range(count)]
            wanted = bytearray(asked & ~given for asked, given in zip(wanted, read, strict=True))
        return tuple(values)

    def quote(self, key: int, qualifying_data: bytes, selection: tuple[int, bytes]) -> tuple[bytes, bytes]:
        """Quote with RSASSA and SHA-256: the message (TPMS_ATTEST) and the signature's bytes."""
        parameters = _sized(qualifying_data) + struct.pack(">HH", _RSASSA, _SHA256) + _selection(selection)
        reader = self._parameters("Quote", 0x158, (key,), parameters)
        message = reader.sized(2)
        scheme, algorithm = reader.unpack(">HH")
        if (scheme, algorithm) != (_RSASSA, _SHA256):
            raise CollectionError("the TPM signed its quote with another scheme than RSASSA with SHA-256")
        return message, reader.sized(2)

    def _parameters(self, name: str, code: int, handles: tuple[int, ...], parameters: bytes) -> Reader:
        """The parameters of a command whose first handle is authorized and that returns no handle."""
        return _reader(_reader(self.run(name, code, handles, parameters, authorized=1)).sized(4))

    def _authority(self, index: NvIndex, by_owner: int, by_itself: int, verb: str) -> int:
        if index.attributes & by_owner:
            return OWNER
        if index.attributes & by_itself:
            return index.handle
        raise CollectionError(f"the TPM's index {index.handle:#x} cannot be {verb} with the empty password")

    def _nv_piece(self) -> int:
        """The most that one NV_Read may request, in bytes."""
        reader = _reader(self.run("GetCapability", 0x17A, (), struct.pack(">III", 6, _NV_BUFFER_MAX, 1)))
        _, _, count = reader.unpack(">BII")
        if count:
            found, value = reader.unpack(">II")
            if found == _NV_BUFFER_MAX and value:
                return int(min(value, LARGEST_RESPONSE // 2))
        return _NV_BUFFER_SMALLEST


def _reader(response: bytes) -> Reader:
    return Reader(response, "the TPM's response", order="big", error=CollectionError)


def _sized(data: bytes) -> bytes:
    return struct.pack(">H", len(data)) + data


def _selection(selection: tuple[int, bytes]) -> bytes:
    algorithm, bits = selection
    return struct.pack(">IHB", 1, algorithm, len(bits)) + bits
