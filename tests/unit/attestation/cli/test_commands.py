"""A GPU's report together with NVIDIA's own verdict on it, through the command that takes both."""

import datetime
from pathlib import Path

import pytest

from adytum.attestation.cli import commands
from tests.unit.attestation.nvidia.rim_authority import FakeNras

CASE = "nvidia-gpu/h100-580.159.03"


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({}, "accepted"),
        ({"ueid": "1"}, "nras.device"),
        ({"measres": "fail"}, "nras.result"),
        ({"eat_nonce": "00" * 32}, "nras.nonce"),
    ],
)
def test_a_verdict_of_nvidias_service(changes: dict[str, object], code: str, vectors: Path) -> None:
    import json

    from adytum.attestation.core.certificates import load_all
    from tests.unit.attestation.nvidia.authority import NOW

    folder = vectors / CASE
    nonce = bytes.fromhex(json.loads((folder / "case.json").read_text())["nonce"])
    chain = (folder / "chain.pem").read_bytes()
    serial = str(load_all(chain, "it")[0].serial_number)
    service = FakeNras()
    verdict = service.answer(nonce, service.gpu(nonce, **{"ueid": serial, **changes}))
    now: datetime.datetime = NOW
    found = commands.gpu(
        (folder / "report.bin").read_bytes(), chain, nonce, [], [], (verdict, service.jwks()), None, now
    )
    assert found.code == code, found.reason
    assert ("nras.device" in [check.code for check in found.checks.passed]) is (code == "accepted")
