"""Each ```sh block of these documents runs as it stands, in order, in a folder with what a build leaves there."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.unit.launch.support import write_machine
from tests.unit.launch.test_launch import toml

pytestmark = pytest.mark.slow

pytest.importorskip("sevsnpmeasure", reason="needs sev-snp-measure: pip install 'adytum[deploy]'")

ROOT = Path(__file__).parents[2]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Small files with a build's names; measurements of a first and of a second version."""
    at = tmp_path / "folder"
    at.mkdir()
    config = write_machine(at, gpus={"devices": ["0000:21:00.0"], "admin_tool": "/opt/gpu-admin-tools/t.py"})
    toml(config, at / "vm.toml")
    for name in ("backend.toml", "backend-0.2.0.toml", "adytum-h100.raw", "adytum-h100-0.2.0.raw"):
        (at / name).write_text(name)
    shutil.copytree(Path(__file__).parent / "hosts/genoa-h100", at / "recorded-host", symlinks=True)
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, module in (("adytum", "-m adytum.inference"), ("python", "")):
        (programs / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" {module} "$@"\n')
        (programs / name).chmod(0o755)
    return at


def run(folder: Path, block: str) -> str:
    environment = {
        "PATH": f"{folder.parent / 'bin'}:{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
        "HOME": str(folder),
    }
    done = subprocess.run(
        ["sh", "-eu", "-c", block], cwd=folder, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, f"{block}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def blocks(document: str) -> list[str]:
    found = re.findall(r"^```sh\n(.*?)^```$", (ROOT / document).read_text(), re.MULTILINE | re.DOTALL)
    assert found
    return found


def test_measuring_and_updating(folder: Path) -> None:
    for block in blocks("docs/how-to/measurement.md"):
        run(folder, block)
    (folder / "cmdline").write_text("root=/dev/dm-0 roothash=01 swiotlb=32768\n")
    run(folder, blocks("docs/how-to/measurement.md")[0].replace("measurements.json", "measurements-0.2.0.json"))
    said = [run(folder, block) for block in blocks("docs/how-to/updates.md")]
    assert len(said) == 5
    assert "draining  0.1.0" in said[3]
    assert "draining" not in said[4]
    assert "current  0.2.0" in said[4]


def test_launching(folder: Path) -> None:
    said = [run(folder, block) for block in blocks("deploy/launch/README.md")]
    assert "kernel's" not in said[0] or "wrong" not in said[0]
    assert "sev-snp-guest" in said[1]
    assert (folder / "domain.xml").read_text().startswith("<domain")
