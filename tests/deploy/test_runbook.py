"""deploy/README.md: its `sh` blocks run, its other commands exist, and every alert and step has its row."""

import re
import shlex
from pathlib import Path

import click
import pytest
import yaml

from adytum.deploy.launch.__main__ import main as launch
from adytum.deploy.weights.image import main as weights_image
from adytum.inference.__main__ import main as adytum
from adytum.inference.core.lifecycle import Step
from tests.deploy.test_commands_in_docs import ROOT, blocks, folder, run

pytestmark = pytest.mark.slow

__all__ = ["folder"]
RUNBOOK = "deploy/README.md"
TEXT = (ROOT / RUNBOOK).read_text()
GROUPS = {
    "adytum": adytum,
    "python -m adytum.deploy.launch": launch,
    "python -m adytum.deploy.weights.image": weights_image,
}


def rows(title: str) -> list[str]:
    """The names in the first column of the table under that heading."""
    part = TEXT.split(f"## {title}\n")[1].split("\n## ")[0]
    return re.findall(r"(?m)^\| `(\w+)` \|", part)


def commands() -> list[str]:
    found = re.findall(r"(?ms)^```text\n(.*?)^```$", TEXT)
    return [line for block in found for line in block.splitlines() if line]


def test_what_can_run_here_runs(folder: Path) -> None:
    said = [run(folder, block) for block in blocks(RUNBOOK)]
    assert len(said) == 4
    assert "wrong" not in said[0]
    assert "current  0.1.0" in said[1]
    assert "release = { file" in (folder / "policy.toml").read_text()
    assert "hospital-a" in said[2]
    assert b"hospital-a" in (folder / "callers.img").read_bytes()


@pytest.mark.parametrize("line", commands())
def test_what_cannot_run_here_exists(line: str) -> None:
    for name, group in GROUPS.items():
        if line.startswith(name + " "):
            words = shlex.split(line.removeprefix(name))
            _parses(group, words)
            return
    words = shlex.split(line)
    if words[:3] == ["python", "-m", "adytum.attestation"]:
        from adytum.attestation.cli.main import parser

        parser().parse_args(words[3:])
    elif words[0] != "curl":
        assert (ROOT / words[0]).is_file(), line
        assert (ROOT / "deploy/image" / f"{words[1]}.packages").is_file(), line


def _parses(command: click.Command, words: list[str]) -> None:
    """Walks into sub-commands; every option has to be known. Files need not exist."""
    while isinstance(command, click.Group):
        assert words, "a sub-command is missing"
        found = command.commands.get(words[0])
        assert found is not None, words
        command, words = found, words[1:]
    known = {name for parameter in command.params for name in parameter.opts}
    assert {word for word in words if word.startswith("--")} <= known, words
    arguments = [p for p in command.params if isinstance(p, click.Argument) and p.required]
    given = [word for word in words if not word.startswith("--")]
    assert len(given) >= len(arguments), words


def test_a_command_that_does_not_exist_is_seen() -> None:
    with pytest.raises(AssertionError):
        _parses(adytum, ["measure", "--colour", "red"])
    with pytest.raises(AssertionError):
        _parses(adytum, ["mesure"])


def test_every_alert_has_its_row() -> None:
    rules = yaml.safe_load((ROOT / "deploy/grafana/alerts.yaml").read_text())
    alerts = [rule["alert"] for group in rules["groups"] for rule in group["rules"]]
    assert len(alerts) > 10
    assert sorted(rows("What each alert means")) == sorted(alerts)


def test_every_step_of_the_start_has_its_row() -> None:
    assert rows("When a step of the start fails") == [step.value for step in Step]


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", TEXT):
        assert (ROOT / "deploy" / target).exists(), target
