"""Collecting through a virtual TPM: a real software TPM with a paravisor before it, and transports that misbehave."""

import contextlib
import hashlib
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from hypothesis import given, settings
from hypothesis import strategies as st

from adytum.attestation.core.checks import Checks
from adytum.attestation.core.errors import CollectionError
from adytum.attestation.vtpm.device import ATTESTATION_KEY, HCL_REPORT, USER_DATA, SnpVtpm, TpmDevice
from adytum.attestation.vtpm.evidence import VtpmReport, qualifying_data
from adytum.attestation.vtpm.hcl import HclReport
from adytum.attestation.vtpm.quote import ALL_PCRS, TpmQuote, verify_quote
from adytum.attestation.vtpm.tpm import AUTH_READ, AUTH_WRITE, HEADER, OWNER_READ, NvIndex, Tpm, TpmError, Transport
from tests.unit.attestation.vtpm.software_tpm import (
    Paravisor,
    SocketTpm,
    device_file,
    extend,
    is_defined,
    make_attestation_key,
    software_tpm,
    undefine,
)

BINDING = bytes(range(64))
SPARE = 0x01500000


class Time:
    """A clock that advances only while the code under test sleeps."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture(scope="module")
def swtpm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SocketTpm]:
    with software_tpm(tmp_path_factory.mktemp("tpm")) as tpm:
        yield tpm


@pytest.fixture(scope="module")
def attestation_key(swtpm: SocketTpm) -> rsa.RSAPublicKey:
    return make_attestation_key(swtpm)


@pytest.fixture
def fresh(swtpm: SocketTpm) -> SocketTpm:
    """Without the user data's index, as a machine starts."""
    for index in (USER_DATA, SPARE):
        if is_defined(swtpm, index):
            undefine(swtpm, index)
    return swtpm


def unsigned(report_data: bytes) -> bytes:
    """In place of the SNP report: the device hands it on and does not look at its signature."""
    return b"\x03" + bytes(0x4F) + report_data + bytes(1184 - 0x90)


def device(transport: Transport, time: Time) -> SnpVtpm:
    return SnpVtpm(lambda: (b"vcek", b"ask", b"ark"), transport, clock=time, sleep=time.sleep)


def test_a_report(fresh: SocketTpm, attestation_key: rsa.RSAPublicKey) -> None:
    time = Time()
    cpu = device(Paravisor(fresh, attestation_key, unsigned, time), time)
    evidence = cpu.report(BINDING)
    assert (evidence.provider, evidence.certificates) == ("sev-snp-vtpm", (b"vcek", b"ask", b"ark"))
    parts = VtpmReport.parse(evidence.report)
    hcl = HclReport.parse(parts.hcl)
    assert (hcl.user_data, hcl.whole, hcl.encoded) == (BINDING, True, parts.hcl)
    quote = verify_quote(parts.quote, parts.signature, parts.pcrs, hcl.attestation_key, Checks())
    assert quote.qualifying_data == hashlib.sha256(BINDING).digest() == qualifying_data(BINDING)
    assert parts.pcrs[17] == b"\xff" * 32
    assert time.now == 1000.0


def test_the_next_report_waits_for_the_paravisor(fresh: SocketTpm, attestation_key: rsa.RSAPublicKey) -> None:
    """Within two seconds it gives the last report again, with the last user data in it."""
    time = Time()
    paravisor = Paravisor(fresh, attestation_key, unsigned, time)
    cpu = device(paravisor, time)
    for binding in (BINDING, b"n" * 64, b"o" * 64):
        assert HclReport.parse(VtpmReport.parse(cpu.report(binding).report).hcl).user_data == binding
    assert 1004.0 <= time.now <= 1005.0
    assert paravisor.reports == 3


def test_another_program_writes_the_user_data(fresh: SocketTpm, attestation_key: rsa.RSAPublicKey) -> None:
    time = Time()

    class Intruder(Paravisor):
        def renew(self) -> None:
            self._tpm.nv_write(self._tpm.nv_index(USER_DATA), b"x" * 64)
            super().renew()

    with pytest.raises(CollectionError, match="other user data"):
        device(Intruder(fresh, attestation_key, unsigned, time), time).report(BINDING)
    assert 1010 <= time.now < 1011


def test_a_report_torn_while_it_is_read(fresh: SocketTpm, attestation_key: rsa.RSAPublicKey) -> None:
    time = Time()

    class Hasty(Paravisor):
        """Makes another report in the middle of the first read."""

        def exchange(self, command: bytes) -> bytes:
            code, _, index = struct.unpack_from(">III", command, 6) if len(command) >= 18 else (0, 0, 0)
            if (code, index, self.reads) == (0x14E, HCL_REPORT, 1) and not command.endswith(b"\x00\x00"):
                self._key = rsa.generate_private_key(65537, 2048).public_key()
                self.renew()
            return super().exchange(command)

    paravisor = Hasty(fresh, attestation_key, unsigned, time)
    hcl = HclReport.parse(VtpmReport.parse(device(paravisor, time).report(BINDING).report).hcl)
    assert hcl.whole
    assert paravisor.reads > 2


def test_no_report_that_can_be_read(fresh: SocketTpm, attestation_key: rsa.RSAPublicKey) -> None:
    time = Time()
    with pytest.raises(CollectionError, match="paravisor gave no report"):
        device(Paravisor(fresh, attestation_key, lambda _: b"", time), time).report(BINDING)
    with pytest.raises(CollectionError, match="other user data"):
        device(Paravisor(fresh, attestation_key, lambda _: bytes(1184), time), time).report(BINDING)


def test_no_paravisor(swtpm: SocketTpm, tmp_path: Path) -> None:
    """A machine with a TPM that is not a confidential VM of Azure."""
    with software_tpm(tmp_path) as plain, pytest.raises(TpmError) as caught:
        SnpVtpm(lambda: (), plain).report(BINDING)
    assert caught.value.no_such_handle
    assert "NV_ReadPublic" in str(caught.value)


def test_no_attestation_key(tmp_path: Path, attestation_key: rsa.RSAPublicKey) -> None:
    time = Time()
    with software_tpm(tmp_path) as other, pytest.raises(TpmError, match="Quote"):
        device(Paravisor(other, attestation_key, unsigned, time), time).report(BINDING)


def test_registers_that_change_while_quoted(fresh: SocketTpm, attestation_key: rsa.RSAPublicKey) -> None:
    time = Time()

    class Busy(Paravisor):
        times = 0

        def exchange(self, command: bytes) -> bytes:
            if HEADER.unpack_from(command)[2] == 0x158 and self.times:
                self.times -= 1
                extend(self._transport, 16, bytes([self.times]) * 32)
            return super().exchange(command)

    paravisor = Busy(fresh, attestation_key, unsigned, time)
    paravisor.times = 2
    parts = VtpmReport.parse(device(paravisor, time).report(BINDING).report)
    assert TpmQuote.parse(parts.quote).covers(parts.pcrs)
    assert paravisor.times == 0
    paravisor.times = 100
    with pytest.raises(CollectionError, match="changed each time"):
        device(paravisor, time).report(BINDING)


@pytest.mark.parametrize("size", [0, 63, 65])
def test_report_data_of_another_size(fresh: SocketTpm, size: int) -> None:
    with pytest.raises(CollectionError, match="64 bytes"):
        SnpVtpm(lambda: (), fresh).report(bytes(size))
    assert not is_defined(fresh, USER_DATA)


def test_an_index_of_another_size(fresh: SocketTpm) -> None:
    Tpm(fresh).nv_define(USER_DATA, 32, AUTH_READ | AUTH_WRITE)
    with pytest.raises(CollectionError, match="tpm2_nvundefine"):
        SnpVtpm(lambda: (), fresh).report(BINDING)


def test_certificates_that_are_not_there(fresh: SocketTpm, attestation_key: rsa.RSAPublicKey) -> None:
    time = Time()

    def none() -> tuple[bytes, ...]:
        raise CollectionError("not fetched yet")

    cpu = SnpVtpm(none, Paravisor(fresh, attestation_key, unsigned, time), clock=time, sleep=time.sleep)
    with pytest.raises(CollectionError, match="not fetched yet"):
        cpu.report(BINDING)


def test_the_device_file(fresh: SocketTpm, attestation_key: rsa.RSAPublicKey) -> None:
    time = Time()
    with device_file(Paravisor(fresh, attestation_key, unsigned, time)) as path:
        parts = VtpmReport.parse(device(TpmDevice(path), time).report(BINDING).report)
    assert HclReport.parse(parts.hcl).user_data == BINDING


def test_no_device_file(tmp_path: Path) -> None:
    for path in (tmp_path / "tpm", tmp_path):
        with pytest.raises(CollectionError, match="cannot be used"):
            TpmDevice(str(path)).exchange(b"")


def test_a_device_file_that_ends(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"")
    with pytest.raises(CollectionError, match="whole response"):
        TpmDevice(str(path)).exchange(b"")


def test_storage(fresh: SocketTpm) -> None:
    tpm = Tpm(fresh)
    tpm.nv_define(SPARE, 1500, AUTH_READ | AUTH_WRITE)
    index = tpm.nv_index(SPARE)
    assert (index.size, index.attributes & (AUTH_READ | AUTH_WRITE)) == (1500, AUTH_READ | AUTH_WRITE)
    with pytest.raises(TpmError):
        tpm.nv_read(index)  # Not written yet.
    tpm.nv_write(index, b"abc" * 100)
    with pytest.raises(CollectionError, match="cannot be written"):
        tpm.nv_write(NvIndex(SPARE, OWNER_READ, 64), b"")
    with pytest.raises(CollectionError, match="cannot be read"):
        tpm.nv_read(NvIndex(SPARE, AUTH_WRITE, 64))
    with pytest.raises(CollectionError, match="more than"):
        tpm.nv_read(NvIndex(SPARE, AUTH_READ, 0xFFFFF))
    read = tpm.nv_read(index)
    assert len(read) == 1500
    assert read.startswith(b"abc" * 100)


def test_registers(swtpm: SocketTpm) -> None:
    before = Tpm(swtpm).pcrs(ALL_PCRS)
    assert len(before) == 24
    extend(swtpm, 5, b"d" * 32)
    after = Tpm(swtpm).pcrs(ALL_PCRS)
    assert after[5] == hashlib.sha256(before[5] + b"d" * 32).digest()
    assert after[:5] + after[6:] == before[:5] + before[6:]
    assert Tpm(swtpm).pcrs((0x000B, b"\x20\x00\x01")) == (after[5], after[16])


def test_a_bank_that_is_not_there() -> None:
    """A TPM selects nothing of a bank that it does not keep."""
    body = struct.pack(">II", 1, 1) + struct.pack(">HB", 0x000B, 3) + bytes(3) + struct.pack(">I", 0)
    transport = Answers(lambda _: HEADER.pack(0x8001, HEADER.size + len(body), 0) + body)
    with pytest.raises(CollectionError, match="does not have all registers"):
        Tpm(transport).pcrs(ALL_PCRS)


class Answers:
    """A TPM that answers by a function of the command."""

    def __init__(self, answer: Callable[[bytes], bytes]) -> None:
        self._answer = answer
        self.asked = 0

    def exchange(self, command: bytes) -> bytes:
        self.asked += 1
        return self._answer(command)


def coded(code: int) -> bytes:
    return HEADER.pack(0x8001, HEADER.size, code)


@pytest.mark.parametrize(("code", "asked"), [(0x922, 5), (0x908, 5), (0x90A, 5), (0x98E, 1), (0x18B, 1), (0x100, 1)])
def test_codes(code: int, asked: int) -> None:
    transport = Answers(lambda _: coded(code))
    with pytest.raises(TpmError) as caught:
        Tpm(transport).nv_index(SPARE)
    assert (caught.value.code, transport.asked) == (code, asked)
    assert caught.value.no_such_handle == (code == 0x18B)


def test_busy_at_first(fresh: SocketTpm) -> None:
    busy = [coded(0x922)] * 3
    transport = Answers(lambda command: busy.pop() if busy else fresh.exchange(command))
    assert len(Tpm(transport).pcrs(ALL_PCRS)) == 24
    assert transport.asked >= 6


COMMANDS: list[Callable[[Tpm], object]] = [
    lambda tpm: tpm.nv_index(SPARE),
    lambda tpm: tpm.nv_read(NvIndex(SPARE, AUTH_READ, 100)),
    lambda tpm: tpm.nv_write(NvIndex(SPARE, AUTH_WRITE, 100), b"x"),
    lambda tpm: tpm.pcrs(ALL_PCRS),
    lambda tpm: tpm.quote(ATTESTATION_KEY, b"q", ALL_PCRS),
]


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(COMMANDS), st.binary(max_size=64), st.booleans())
def test_only_our_errors_escape(command: Callable[[Tpm], object], body: bytes, framed: bool) -> None:
    """Invariant: whatever a TPM answers, a command gives a value or `CollectionError`, and ends."""
    response = HEADER.pack(0x8002, HEADER.size + len(body), 0) + body if framed else body
    transport = Answers(lambda _: response)
    with contextlib.suppress(CollectionError):
        command(Tpm(transport))
    assert transport.asked <= 30


def test_responses_cut_anywhere(fresh: SocketTpm, attestation_key: rsa.RSAPublicKey) -> None:
    """Every response of a real TPM, cut at every place with its size set right: never an error of another type."""
    Tpm(fresh).nv_define(SPARE, 100, AUTH_READ | AUTH_WRITE)
    Tpm(fresh).nv_write(NvIndex(SPARE, AUTH_WRITE, 100), bytes(100))
    for command in COMMANDS:
        whole: list[bytes] = []

        def keep(data: bytes, whole: list[bytes] = whole) -> bytes:
            whole.append(fresh.exchange(data))
            return whole[-1]

        command(Tpm(Answers(keep)))
        for place, response in enumerate(whole):
            for size in range(len(response)):
                cut = response[:2] + struct.pack(">I", size) + response[6:size] if size >= 6 else response[:size]
                answers = iter([*whole[:place], cut])
                transport = Answers(lambda _, answers=answers: next(answers, coded(0x100)))  # type: ignore[misc]
                try:
                    command(Tpm(transport))
                except CollectionError:
                    continue
                # Not read: the authorization after the parameters, empty for a password, and an index's name.
                assert response[:2] == b"\x80\x02" or command is COMMANDS[0]


def answered(parameters: bytes) -> bytes:
    body = struct.pack(">I", len(parameters)) + parameters
    return HEADER.pack(0x8002, HEADER.size + len(body), 0) + body


def test_answers_to_other_questions() -> None:
    """A response of another size than it says, a quote by another method, less of an index than was asked for."""
    good = answered(struct.pack(">H", 1) + b"m" + struct.pack(">HHH", 0x0014, 0x000B, 1) + b"s")
    assert Tpm(Answers(lambda _: good)).quote(1, b"", ALL_PCRS) == (b"m", b"s")
    with pytest.raises(CollectionError, match="the size that it states"):
        Tpm(Answers(lambda _: good + b"\x00")).quote(1, b"", ALL_PCRS)
    for scheme, algorithm in ((0x0016, 0x000B), (0x0014, 0x0004)):
        other = answered(struct.pack(">H", 1) + b"m" + struct.pack(">HHH", scheme, algorithm, 1) + b"s")
        with pytest.raises(CollectionError, match="another scheme"):
            Tpm(Answers(lambda _, other=other: other)).quote(1, b"", ALL_PCRS)  # type: ignore[misc]
    none = HEADER.pack(0x8001, HEADER.size + 9, 0) + struct.pack(">BII", 0, 6, 0)
    for size, says in ((99, "less of an index"), (101, "less of an index")):
        index = answered(struct.pack(">H", size) + bytes(size))
        transport = Answers(lambda command, index=index: index if command[9] == 0x4E else none)  # type: ignore[misc]
        with pytest.raises(CollectionError, match=says):
            Tpm(transport).nv_read(NvIndex(SPARE, AUTH_READ, 100))


def test_a_failure_that_is_not_a_missing_index(fresh: SocketTpm) -> None:
    with pytest.raises(TpmError) as caught:
        SnpVtpm(lambda: (), Answers(lambda _: coded(0x101))).report(BINDING)
    assert caught.value.code == 0x101
    assert "NV_ReadPublic" in str(caught.value)
