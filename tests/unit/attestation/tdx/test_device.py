"""The TDX device over a directory that acts as configfs-tsm."""

from collections.abc import Callable
from pathlib import Path

import pytest

from adytum.attestation.core.checks import Checks
from adytum.attestation.core.errors import CollectionError
from adytum.attestation.tdx.device import Tdx
from adytum.attestation.tdx.verify import verify_tdx
from adytum.attestation.tsm.device import Tsm
from tests.unit.attestation.tdx.authority import NOW, Authority, changed
from tests.unit.attestation.tdx.configfs import configfs

INTEL = Authority()
BINDING = bytes(range(64))


def quote(inblob: bytes) -> bytes:
    return INTEL.quote(changed(report_data=inblob, tail=bytes(500)))


def test_from_the_device_to_the_verifier(tmp_path: Path) -> None:
    cpu = Tdx(Tsm(configfs(tmp_path, quote)))
    for binding in (BINDING, b"n" * 64):
        evidence = cpu.report(binding)
        assert (evidence.provider, evidence.certificates) == ("tdx", ())
        assert not evidence.report.endswith(bytes(500))
        proof = verify_tdx(evidence.report, collateral=None, roots=INTEL.roots, now=NOW, checks=Checks())
        assert proof.report_data == binding
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (lambda _: b"", "empty report"),
        (lambda _: b"x" * 5000, "no usable quote"),
        (lambda inblob: quote(inblob)[:-1000], "no usable quote"),
        (lambda inblob: INTEL.quote(changed(version=3, report_data=inblob)), "version 3"),
        (lambda _: quote(b"o" * 64), "other report data"),
    ],
    ids=["empty", "noise", "cut", "version", "other"],
)
def test_quotes_that_cannot_be_used(tmp_path: Path, answer: Callable[[bytes], bytes], says: str) -> None:
    with pytest.raises(CollectionError, match=says):
        Tdx(Tsm(configfs(tmp_path, answer))).report(BINDING)
    assert list(tmp_path.iterdir()) == []


def test_another_platform(tmp_path: Path) -> None:
    with pytest.raises(CollectionError, match="not from tdx_guest"):
        Tdx(Tsm(configfs(tmp_path, quote, "sev_guest"))).report(BINDING)


def test_a_machine_without_it(tmp_path: Path) -> None:
    with pytest.raises(CollectionError, match="cannot be used"):
        Tdx(Tsm(tmp_path / "none")).report(BINDING)


@pytest.mark.parametrize("size", [0, 63, 65])
def test_report_data_of_another_size(tmp_path: Path, size: int) -> None:
    with pytest.raises(CollectionError, match="64 bytes"):
        Tdx(Tsm(configfs(tmp_path, quote))).report(bytes(size))
