"""What can be said of the virtual machine's image without building one; `make boot-test` boots it."""

import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

from adytum.inference.core.config import load
from tests.support import ROOT

FOLDER = ROOT / "deploy" / "image"
UNIT = ROOT / "deploy" / "units" / "adytum.service"
WORST = 4.5
"""`systemd-analyze security` gives 0 (locked up) to 10; what remains, and why: docs/how-to/image.md."""

with_systemd = pytest.mark.skipif(
    shutil.which("systemd-analyze") is None, reason="systemd-analyze is missing (systemd)"
)


def run(*command: str, text: str | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, input=text)


def exposure(unit: str, folder: Path) -> float:
    path = folder / "adytum.service"
    path.write_text(unit)
    found = run("systemd-analyze", "security", "--offline=true", str(path))
    return float(re.findall(r"Overall exposure level for adytum\.service: ([\d.]+)", found.stdout)[0])


@with_systemd
def test_the_unit_is_hardened(tmp_path: Path) -> None:
    text = UNIT.read_text()
    assert exposure(text, tmp_path) <= WORST
    # Each of these, once left out, is seen.
    for line in ("ProtectSystem=strict", "SystemCallFilter=@system-service @mount", "NoNewPrivileges=yes"):
        assert line in text
        assert exposure(text.replace(line, ""), tmp_path) > exposure(text, tmp_path)


@with_systemd
def test_systemd_understands_the_unit(tmp_path: Path) -> None:
    path = tmp_path / "adytum.service"
    path.write_text(UNIT.read_text().replace("/opt/adytum/gateway/bin/python", "/bin/true"))
    found = run("systemd-analyze", "verify", str(path))
    assert "adytum.service" not in found.stderr, found.stderr
    path.write_text(path.read_text().replace("LimitCORE=0", "LimitCoffee=0"))
    assert "LimitCoffee" in run("systemd-analyze", "verify", str(path)).stderr


def test_the_unit_leaves_no_core_and_enough_time_to_drain() -> None:
    text = UNIT.read_text()
    assert "LimitCORE=0" in text
    config = load(ROOT / "deploy" / "config" / "image-cpu.toml")
    assert int(re.findall(r"TimeoutStopSec=(\d+)", text)[0]) > config.server.drain_seconds
    assert "RuntimeDirectory=" + str(config.engines.runtime_directory).removeprefix("/run/") in text


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is missing")
@pytest.mark.parametrize(("script", "shell"), [("init", "dash"), ("build.sh", "bash"), ("customise.sh", "bash")])
def test_the_scripts_are_sound(script: str, shell: str) -> None:
    found = run("shellcheck", "--severity=warning", f"--shell={shell}", str(FOLDER / script))
    assert found.returncode == 0, found.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "usage"),
        (("arm", "deploy/config/image-cpu.toml", "OUT"), 'no profile "arm"'),
        (("cpu", "nowhere.toml", "OUT"), "there is no"),
    ],
)
def test_what_is_wrong_is_said(tmp_path: Path, arguments: tuple[str, ...], said: str) -> None:
    found = run(str(FOLDER / "build.sh"), *(str(tmp_path) if word == "OUT" else word for word in arguments))
    assert found.returncode != 0
    assert said in found.stdout + found.stderr


def test_every_package_of_the_gateway_is_pinned_by_its_hash() -> None:
    lines = [
        line for line in (ROOT / "deploy" / "requirements" / "gateway.txt").read_text().splitlines() if line[0] != "#"
    ]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[\w.]+ --hash=sha256:[0-9a-f]{64}", line) for line in lines)
    pinned = {re.split("==", line)[0].lower().replace("_", "-") for line in lines}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {re.split(r"[<>=\[]", name)[0].lower() for name in project["dependencies"]} <= pinned
    assert not {"vllm", "torch", "transformers"} & pinned


def test_the_profiles_share_all_but_their_packages() -> None:
    lists = {path.stem: path.read_text() for path in FOLDER.glob("*.packages")}
    assert set(lists) == {"common", "cpu", "h100"}
    everything = re.sub(r"(?m)#.*$", "", "\n".join(lists.values())).split()
    assert not [name for name in everything if re.search("ssh|getty|login|sudo", name)]
    assert "nvidia" not in lists["cpu"] + lists["common"].split("#")[0]


def test_nothing_is_kept_or_typed() -> None:
    """No swap, no writable file system but memory, no console to log in at."""
    mounts = [line.split() for line in (FOLDER / "root/etc/fstab").read_text().splitlines() if not line.startswith("#")]
    assert {fields[2] for fields in mounts} == {"tmpfs"}
    masked = (FOLDER / "customise.sh").read_text()
    for name in ("getty@.service", "serial-getty@.service", "emergency.service", "debug-shell.service"):
        assert name in re.findall(r"(?s)mask (.*?)\nln", masked)[0]
