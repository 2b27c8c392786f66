"""A pytest plugin: which tests may skip, and that no other one does.

`tests/allowed_skips.toml` lists the tests that may skip, the reason they give, and why that is acceptable. Any other
skip fails the run if `--strict-skips` or the environment variable CI is set. Otherwise a package that is missing on a
CI machine would switch tests off unseen.
"""

import os
import re
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

KINDS = ("hardware", "boot", "minutes")
"""What an allowed skip may be about."""
FROM_WORKERS = "skipped_modules"


@dataclass(frozen=True)
class Allowed:
    """An entry of the list."""

    tests: str
    reason: re.Pattern[str]
    kind: str
    why: str

    def covers(self, nodeid: str, reason: str) -> bool:
        return nodeid.startswith(self.tests) and self.reason.search(reason) is not None


def read(path: Path) -> list[Allowed]:
    """The entries of the list. Raises `pytest.UsageError` if one is malformed."""
    found = []
    for entry in tomllib.loads(path.read_text())["skip"]:
        if set(entry) != {"tests", "reason", "kind", "why"} or entry["kind"] not in KINDS or not entry["why"]:
            raise pytest.UsageError(f"{path}: not an entry: {entry}")
        if not (path.parent.parent / entry["tests"]).exists():
            raise pytest.UsageError(f"{path}: {entry['tests']} does not exist")
        found.append(Allowed(entry["tests"], re.compile(entry["reason"]), entry["kind"], entry["why"]))
    return found


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--strict-skips",
        action="store_true",
        default=bool(os.environ.get("CI")),
        help="fail if a test skips that tests/allowed_skips.toml does not list (default if CI is set)",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Skips(config, read(Path(__file__).with_name("allowed_skips.toml"))), "skips")


class Skips:
    """Collects the skips of a run, in one process or in xdist's workers, and judges them."""

    def __init__(self, config: pytest.Config, allowed: list[Allowed]) -> None:
        self._config = config
        self._allowed = allowed
        self._modules: list[tuple[str, str]] = []
        self._unlisted: list[tuple[str, str]] = []
        self._counts: dict[Allowed, int] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.skipped and not hasattr(report, "wasxfail"):
            self._judge(report.nodeid, _reason(report))

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.skipped:
            self._modules.append((report.nodeid, _reason(report)))

    # xdist passes the reports of tests on to its controller, but not those of modules that were skipped at collection.
    # Every worker collects every module, so the workers' lists are equal.
    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        self._modules = [tuple(item) for item in getattr(node, "workeroutput", {}).get(FROM_WORKERS, self._modules)]

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if hasattr(self._config, "workeroutput"):
            self._config.workeroutput[FROM_WORKERS] = self._modules
            return
        for nodeid, reason in self._modules:
            self._judge(nodeid, reason)
        if self._unlisted and self._config.getoption("strict_skips") and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self._counts:
            terminalreporter.section("allowed skips")
            for entry, count in self._counts.items():
                terminalreporter.line(f"{count} in {entry.tests}: {entry.why} ({entry.kind})")
        if self._unlisted:
            strict = self._config.getoption("strict_skips")
            terminalreporter.section("skips that tests/allowed_skips.toml does not list", red=strict, yellow=not strict)
            for nodeid, reason in self._unlisted:
                terminalreporter.line(f"{nodeid}: {reason}")

    def _judge(self, nodeid: str, reason: str) -> None:
        entry = next((item for item in self._allowed if item.covers(nodeid, reason)), None)
        if entry is None:
            self._unlisted.append((nodeid, reason))
        else:
            self._counts[entry] = self._counts.get(entry, 0) + 1


def _reason(report: pytest.TestReport | pytest.CollectReport) -> str:
    """The text that the skip was given."""
    text = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    return text.removeprefix("Skipped: ")
