"""What `pip install` gives a client: the wheel, in a fresh environment, beside a stranger's package `inference`.

Needs a package index, like every installation; without one the tests that install are skipped.
"""

import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from tests.support import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

CLIENT = {
    "adytum",
    "click",
    # The channel and the verifier.
    *("cffi", "cryptography", "lxml", "pycparser"),
    # The transport.
    *("anyio", "h11", "httpcore2", "httpx2", "idna", "truststore", "typing_extensions"),
    # The local proxy.
    *("aiohappyeyeballs", "aiohttp", "aiosignal", "attrs", "frozenlist", "multidict", "propcache", "yarl"),
}
"""All that a client installs: the list that an auditor reads. It grows only with a reason."""
STRANGER = "inference==1.8.3"
"""Roboflow's package on PyPI; its top-level package has the name that this project's folder has."""
ABSENT = ("uvloop", "fastapi", "starlette", "uvicorn", "pydantic", "pynvml", "prometheus_client", "sevsnpmeasure")


def run(*command: str | Path, check: bool = True) -> subprocess.CompletedProcess[str]:
    # Without this checkout on the path: only what is installed counts.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, check=check, timeout=300, env=environment
    )


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    # Setuptools writes beside its sources. `git archive` would leave out what is not committed yet.
    kept = run("git", "-C", ROOT, "ls-files", "-co", "--exclude-standard", "-z").stdout.split("\0")[:-1]
    for name in kept:
        if name.startswith(("tests/", "docs/")) or not os.path.lexists(ROOT / name):
            continue
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_symlink():
            (source / name).symlink_to((ROOT / name).readlink())
        else:
            (source / name).write_bytes((ROOT / name).read_bytes())
    done = run(sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", folder, source, check=False)
    if done.returncode != 0 and "No matching distribution found for setuptools" in done.stdout + done.stderr:
        pytest.skip("no package index can be reached")
    assert done.returncode == 0, done.stderr
    (found,) = folder.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def client(wheel: Path) -> Path:
    """The Python of a fresh environment with the wheel, and the stranger's package beside it."""
    venv = wheel.parent / "venv"
    run(sys.executable, "-m", "venv", venv)
    python = venv / "bin" / "python"
    done = run(python, "-m", "pip", "install", "--no-deps", STRANGER, check=False)
    if "No matching distribution found" in done.stderr:
        pytest.skip("no package index can be reached")
    run(python, "-m", "pip", "install", wheel)
    return python


def test_the_wheel_holds_one_package(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert {name.split("/")[0] for name in names} == {"adytum"}
    assert "adytum/py.typed" in names
    assert {"adytum/inference/channel/ohttp.py", "adytum/attestation/verifier/document.py"} <= names
    parts = {"/".join(name.split("/")[1:3]) for name in names}
    assert not [part for part in parts if part.startswith(("benchmarks", "tests", "deploy/demo", "deploy/image"))]
    modules = {name for name in names if name.endswith(".py")}
    shipped = {
        f"adytum/{path.relative_to(ROOT)}"
        for folder in ("attestation", "inference")
        for path in (ROOT / folder).rglob("*.py")
    }
    assert shipped <= modules


def test_a_client_installs_this_and_no_more(client: Path) -> None:
    listed = run(client, "-m", "pip", "list", "--format", "freeze").stdout.split()
    names = {line.partition("==")[0].lower().replace("-", "_") for line in listed}
    assert names - {"pip", "setuptools", "inference"} == CLIENT


def test_the_client_works_beside_a_strangers_package(client: Path) -> None:
    script = client.with_name("adytum")
    assert run(script, "--version").stdout == "adytum, version 0.2.0\n"
    code = """
import importlib.util, sys
import adytum.attestation.cli.main
import adytum.inference.cli.main
import adytum.inference.client.proxy.run
from adytum.attestation import Policy
from adytum.inference.client import AdytumTransport
transport = AdytumTransport(upstream="https://llm.example.org", policy=Policy.accept_simulated())
print(importlib.util.find_spec("inference").origin, adytum.__file__, *sorted(sys.modules))
"""
    stranger, ours, *modules = run(client, "-I", "-c", code).stdout.split()
    site = Path(sysconfig.get_path("purelib", vars={"base": str(client.parents[1])}))
    assert Path(stranger) == site / "inference" / "__init__.py"
    assert Path(ours) == site / "adytum" / "__init__.py"
    # Windows has neither uvloop nor `fcntl`, which devices import. (So does `subprocess`, if it is there.)
    assert not {"adytum.attestation.snp.device", *ABSENT} & set(modules)
    assert run(client, "-m", "adytum.attestation", "--help").stdout.startswith("usage: python -m adytum.attestation")


@pytest.mark.parametrize(
    ("command", "extra"),
    [
        (("serve", "--config", "deploy/config/demo.toml", "--check"), "server"),
        (("models", "plan", "--config", "deploy/config/h100.toml"), "server"),
        (("callers", "sign", "README.md", "--key", "README.md"), "server"),
        (("measure", "--firmware", "Makefile", "--kernel", "Makefile", "--append", "x", "--vcpus", "1"), "measure"),
    ],
    ids=["serve", "models", "callers", "measure"],
)
def test_what_needs_an_extra_names_it(client: Path, command: tuple[str, ...], extra: str) -> None:
    given = [str(ROOT / word) if (ROOT / word).is_file() else word for word in command]
    done = run(client.with_name("adytum"), *given, check=False)
    assert done.returncode != 0
    assert f"pip install 'adytum[{extra}]'" in done.stderr
    assert "Traceback" not in done.stderr
