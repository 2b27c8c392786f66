"""Parsing of GPU reports: the fields of real ones, and nothing but the package's errors for the rest."""

import contextlib
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adytum.attestation.core.errors import EvidenceError
from adytum.attestation.nvidia.spdm import GpuReport
from tests.unit.attestation.nvidia.authority import Authority, FakeGpu, block, blocks, opaque_fields, request, response

CASES = (
    "blackwell-gb100-575.32",
    "h100-535.86.09-rim-mismatch",
    "h100-550.90.07-full",
    "h100-560.00-badsig",
    "h100-570.124.03-rim-expired",
    "h100-570.86.10-cert-hold",
    "h100-580.159.03",
    "h100-580.95.05-trailing-byte",
    "h100-ppcie-590.12-gpu-0",
    "h100-ppcie-590.12-gpu-1",
    "h100-ppcie-590.12-gpu-2",
    "h100-ppcie-590.12-gpu-3",
    "nvswitch-ls10",
)
GPUS = tuple(case for case in CASES if not case.startswith("nvswitch"))
NONCE = bytes(range(32))
DIGEST = b"d" * 48
RECORD = blocks({1: DIGEST, 2: DIGEST})
OPAQUE = opaque_fields([(3, b"550.90.07\0")])
SIGNATURE = bytes(range(96))


def real_report(vectors: Path, case: str) -> bytes:
    return (vectors / "nvidia-gpu" / case / "report.bin").read_bytes()


def case_says(vectors: Path, case: str) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((vectors / "nvidia-gpu" / case / "case.json").read_text())
    return loaded


def made(record: bytes = RECORD, opaque: bytes = OPAQUE, *, count: int | None = None) -> bytes:
    """Not signed: parsing does not look at it."""
    return request(NONCE) + response(record, opaque, count=count) + SIGNATURE


def test_the_list_of_cases_is_complete(vectors: Path) -> None:
    assert {path.parent.name for path in (vectors / "nvidia-gpu").glob("*/case.json")} == set(CASES)


@pytest.mark.parametrize("case", GPUS)
def test_fields_of_real_reports(vectors: Path, case: str) -> None:
    says = case_says(vectors, case)
    report = GpuReport.parse(real_report(vectors, case))
    assert report.requester_nonce.hex() == says["nonce"]
    assert list(report.measurements) == list(range(1, 65))
    assert {len(value) for value in report.measurements.values()} == {48}
    assert report.driver_version == says["driver_version"]
    assert report.vbios_version == says["vbios_version"]
    assert (report.project, report.project_sku, report.chip_sku) == (
        says["project"], says["project_sku"], says["chip_sku"],
    )  # fmt: skip
    assert report.chip_info is None
    assert report.nvdec0_on == (says["nvdec0_status"] == "aa")
    assert (report.fwid is not None) == says["fwid_in_report"]
    flag = says["feature_flag"]
    assert report.feature_flag == (int.from_bytes(bytes.fromhex(flag), "little") if flag else None)
    assert report.protected_pcie == {"": None, "55": False, "aa": True}[says["ppcie_status"]]
    assert not report.is_switch
    assert len(report.signature) == 96


def test_fields_of_a_real_switch(vectors: Path) -> None:
    report = GpuReport.parse(real_report(vectors, "nvswitch-ls10"))
    assert report.is_switch
    assert len(report.measurements) == 31
    assert report.vbios_version == "96.10.55.00.01"
    with pytest.raises(EvidenceError, match="field 3"):
        _ = report.driver_version


def test_the_nonce_is_the_request_s_and_not_the_device_s(vectors: Path) -> None:
    data = real_report(vectors, "h100-550.90.07-full")
    report = GpuReport.parse(data)
    record = int.from_bytes(data[42:45], "little")
    device = data[45 + record : 45 + record + 32]
    assert report.requester_nonce == data[4:36]
    assert report.requester_nonce != device


def test_the_signature_is_found_by_lengths_not_from_the_end(vectors: Path) -> None:
    data = real_report(vectors, "h100-580.95.05-trailing-byte")
    report = GpuReport.parse(data)
    assert report.signed + report.signature + b"\0" == data
    assert data[-96:] != report.signature


@pytest.mark.parametrize("size", range(1, 17))
def test_zero_bytes_behind_the_signature(size: int) -> None:
    assert GpuReport.parse(made() + bytes(size)) == GpuReport.parse(made())


@pytest.mark.parametrize("tail", [bytes(17), b"\1", b"\0\1", bytes(15) + b"\x80", b"\n", made()])
def test_other_bytes_behind_the_signature(tail: bytes) -> None:
    with pytest.raises(EvidenceError, match="after its signature"):
        GpuReport.parse(made() + tail)


@pytest.mark.parametrize("case", ["h100-550.90.07-full", "nvswitch-ls10"])
def test_every_truncation_of_a_real_report(vectors: Path, case: str) -> None:
    data = real_report(vectors, case)
    for size in range(len(data)):
        with pytest.raises(EvidenceError):
            GpuReport.parse(data[:size])


@pytest.mark.parametrize(
    ("record", "count", "match"),
    [
        (b"", 0, "do not fill"),
        (RECORD, 1, "do not fill"),
        (RECORD, 3, "ends before it is complete"),
        (RECORD[:-1], 2, "ends before it is complete"),
        (RECORD + b"\0", 2, "do not fill"),
        (block(1, DIGEST) + block(1, DIGEST), 2, "repeated or out of order"),
        (block(2, DIGEST) + block(1, DIGEST), 2, "repeated or out of order"),
        (block(0, DIGEST), 1, "repeated or out of order"),
        (block(1, DIGEST, specification=0), 1, "not a SHA-384 digest"),
        (block(1, DIGEST, specification=2), 1, "not a SHA-384 digest"),
        (block(1, DIGEST, kind=0x81), 1, "not a SHA-384 digest"),
        (block(1, DIGEST, size=50), 1, "not a SHA-384 digest"),
        (block(1, DIGEST, size=52), 1, "not a SHA-384 digest"),
        (block(1, DIGEST[:32]), 1, "not a SHA-384 digest"),
        (block(1, DIGEST + b"d"), 1, "not a SHA-384 digest"),
        (block(1, b""), 1, "not a SHA-384 digest"),
    ],
)
def test_malformed_measurements(record: bytes, count: int, match: str) -> None:
    with pytest.raises(EvidenceError, match=match):
        GpuReport.parse(made(record, count=count))


@pytest.mark.parametrize(
    ("opaque", "match"),
    [
        (opaque_fields([(3, b"1.2"), (3, b"1.2")]), "field 3 twice"),
        (opaque_fields([(999, b""), (999, b"x")]), "field 999 twice"),
        (OPAQUE + b"\0", "ends before it is complete"),
        (OPAQUE + struct.pack("<HH", 4, 1), "ends before it is complete"),
        (OPAQUE[:-1], "ends before it is complete"),
    ],
)
def test_malformed_opaque_data(opaque: bytes, match: str) -> None:
    with pytest.raises(EvidenceError, match=match):
        GpuReport.parse(made(opaque=opaque))


def test_unknown_and_missing_fields_are_tolerated() -> None:
    report = GpuReport.parse(made(opaque=opaque_fields([(999, b"new"), (255, b"")])))
    assert dict(report.opaque) == {999: b"new", 255: b""}
    assert (report.fwid, report.feature_flag, report.chip_info, report.protected_pcie) == (None, None, None, None)
    assert GpuReport.parse(made(opaque=b"")).opaque == {}


READS: dict[str, Callable[[GpuReport], object]] = {
    "driver": lambda report: report.driver_version,
    "vbios": lambda report: report.vbios_version,
    "nvdec0": lambda report: report.nvdec0_on,
    "project": lambda report: report.project,
    "project_sku": lambda report: report.project_sku,
    "chip_sku": lambda report: report.chip_sku,
    "chip_info": lambda report: report.chip_info,
    "fwid": lambda report: report.fwid,
    "ppcie": lambda report: report.protected_pcie,
}


@pytest.mark.parametrize(
    ("name", "kind", "values"),
    [
        ("driver", 3, [None, b"", b"\0\0", b"550 90", b"550\x1b", b"550\0.90", b"\xff"]),
        ("vbios", 6, [None, b"", bytes(7), bytes(9), b"96.00.9F.00.01"]),
        ("nvdec0", 11, [None, b"", b"\0", b"\xab", b"\xaa\1"]),
        ("project", 17, [None, b"\0", b"1\n"]),
        ("project_sku", 18, [None, b"\0", b"1\n"]),
        ("chip_sku", 15, [None, b"\0", b"1\n"]),
        ("chip_info", 35, [b"", b"\0", b"GB 100"]),
        ("fwid", 20, [b"", bytes(47), bytes(49)]),
        ("ppcie", 21, [b"", b"\0", b"\xab", b"\xaa\0"]),
    ],
)
def test_fields_that_do_not_say_what_they_should(name: str, kind: int, values: list[bytes | None]) -> None:
    for value in values:
        fields = [] if value is None else [(kind, value)]
        report = GpuReport.parse(made(opaque=opaque_fields(fields)))
        with pytest.raises(EvidenceError):
            READS[name](report)


def test_fields_of_a_made_report() -> None:
    gpu = FakeGpu(Authority(), driver_version="600.1", vbios_version="97.00.AB.0C.FF", nvdec0_on=True, feature_flag=2,
                  opaque={35: b"GB102\0", 21: b"\xaa"})  # fmt: skip
    report = GpuReport.parse(gpu.report(NONCE))
    assert (report.driver_version, report.vbios_version, report.chip_info) == ("600.1", "97.00.AB.0C.FF", "GB102")
    assert (report.nvdec0_on, report.feature_flag, report.protected_pcie) == (True, 2, True)
    assert (report.fwid, report.requester_nonce) == (gpu.fwid, NONCE)
    assert report.measurements == gpu.measurements


@pytest.mark.parametrize("at", [0, 1, 2, 3, 37, 38])
def test_another_request_or_response(at: int) -> None:
    data = bytearray(made())
    data[at] ^= 1
    with pytest.raises(EvidenceError, match=r"SPDM 1\.1"):
        GpuReport.parse(bytes(data))


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=400), st.sampled_from([0, 37, 45]))
def test_only_evidence_errors_escape(data: bytes, keep: int) -> None:
    with contextlib.suppress(EvidenceError):
        report = GpuReport.parse(made()[:keep] + data)
        for read in READS.values():
            with contextlib.suppress(EvidenceError):
                read(report)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 40), st.binary(max_size=50)), max_size=8, unique_by=lambda pair: pair[0]))
def test_any_opaque_data_is_read_or_refused(fields: list[tuple[int, bytes]]) -> None:
    report = GpuReport.parse(made(opaque=opaque_fields(fields)))
    assert dict(report.opaque) == dict(fields)
    for read in READS.values():
        with contextlib.suppress(EvidenceError):
            read(report)
