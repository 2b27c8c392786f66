"""Skips that the list does not name fail a strict run, in one process and with xdist; those that it names do not."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests import skips
from tests.support import ROOT

LISTED = '[[skip]]\ntests = "tests/"\nreason = "^no device"\nkind = "hardware"\nwhy = "few have it"\n'
SKIPPING = 'import pytest\n\ndef test_a():\n    pytest.skip("{}")\n\ndef test_b():\n    pass\n'
WORKERS = [
    pytest.param((), id="alone"),
    pytest.param(("-p", "xdist", "-n", "2"), id="xdist", marks=pytest.mark.slow),
]
MODULE = 'import pytest\n\npytest.skip("{}", allow_module_level=True)\n'


def run(folder: Path, source: str, *options: str) -> subprocess.CompletedProcess[str]:
    """pytest in a folder of its own with the plugin, that list and one file of tests."""
    tests = folder / "tests"
    tests.mkdir()
    (tests / "skips.py").write_text((ROOT / "tests" / "skips.py").read_text())
    (tests / "allowed_skips.toml").write_text(LISTED)
    (tests / "__init__.py").touch()
    (tests / "conftest.py").write_text('pytest_plugins = ("tests.skips",)\n')
    (tests / "test_it.py").write_text(source)
    (tests / "test_other.py").write_text("def test_c():\n    pass\n")
    command = [sys.executable, "-m", "pytest", "--rootdir", str(folder), "-c", "/dev/null", "tests", *options]
    # Without the other plugins it starts in a third of the time.
    environment = {"PATH": "/usr/bin:/bin", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment)


@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize("source", [SKIPPING, MODULE], ids=["test", "module"])
def test_a_skip_that_is_not_listed_fails_a_strict_run(tmp_path: Path, source: str, workers: tuple[str, ...]) -> None:
    done = run(tmp_path, source.format("swtpm is missing"), "--strict-skips", *workers)
    assert done.returncode == 1, done.stdout
    assert "skips that tests/allowed_skips.toml does not list" in done.stdout
    assert done.stdout.count("swtpm is missing") == 1, done.stdout


@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize("source", [SKIPPING, MODULE], ids=["test", "module"])
def test_a_skip_that_is_listed_passes(tmp_path: Path, source: str, workers: tuple[str, ...]) -> None:
    done = run(tmp_path, source.format("no device here"), "--strict-skips", *workers)
    assert done.returncode == 0, done.stdout
    assert "1 in tests/: few have it (hardware)" in done.stdout


def test_without_the_option_it_is_told_and_passes(tmp_path: Path) -> None:
    done = run(tmp_path, SKIPPING.format("swtpm is missing"))
    assert done.returncode == 0
    assert "skips that tests/allowed_skips.toml does not list" in done.stdout


def test_a_failure_stays_one(tmp_path: Path) -> None:
    assert run(tmp_path, "def test_a():\n    assert False\n", "--strict-skips").returncode == 1


@pytest.mark.parametrize(
    "change", [('kind = "hardware"', 'kind = "mood"'), ('why = "few have it"', 'why = ""'), ('"tests/"', '"nowhere/"')]
)
def test_a_malformed_list_is_refused(tmp_path: Path, change: tuple[str, str]) -> None:
    (tmp_path / "tests").mkdir()
    path = tmp_path / "tests" / "allowed_skips.toml"
    path.write_text(LISTED)
    assert len(skips.read(path)) == 1
    path.write_text(LISTED.replace(*change))
    with pytest.raises(pytest.UsageError):
        skips.read(path)
