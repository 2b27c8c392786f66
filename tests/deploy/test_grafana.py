"""Dashboard and alerts ask only for what the backend says, and each alert fires where it should and nowhere else."""

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from adytum.inference.core.config import parse
from adytum.inference.gateway.accounting.telemetry import GAUGES, LABELS
from tests.support import ROOT, config_text
from tests.unit.gateway.support import running_gateway

pytestmark = pytest.mark.slow

FOLDER = ROOT / "deploy" / "grafana"
DASHBOARD: dict[str, Any] = json.loads((FOLDER / "adytum.json").read_text())
RULES: list[dict[str, Any]] = yaml.safe_load((FOLDER / "alerts.yaml").read_text())["groups"][0]["rules"]
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
QUERIES = [
    *(target["expr"] for panel in PANELS for target in panel["targets"]),
    *(item["query"]["query"] for item in DASHBOARD["templating"]["list"] if item["type"] == "query"),
    *(rule["expr"] for rule in RULES),
]
# Prometheus's own: the target's labels, a histogram's, and whether a target answers.
_THEIRS = {"instance", "job", "le"}
_METRIC = re.compile(r"\b((?:adytum|process)_[a-z_]+)")
_NAMES = re.compile(r'(\w+)\s*(?:=~|!~|!=|=)\s*"')
_GROUPED = re.compile(r"\b(?:by|on|without|ignoring)\s*\(([^)]*)\)")


def unknown(query: str, said: set[str]) -> Iterator[str]:
    """Metrics and labels in a query that no backend has."""
    yield from (metric for metric in _METRIC.findall(query) if metric not in said)
    labels = set(_NAMES.findall(query)) | {
        name.strip() for group in _GROUPED.findall(query) for name in group.split(",")
    }
    if found := re.match(r"label_values\(\w+, (\w+)\)", query):
        labels.add(found[1])
    yield from labels - LABELS - _THEIRS


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """Names of all series that a backend can have, from the page that one shows; and `up`."""
    folder = tmp_path_factory.mktemp("metrics")
    with running_gateway(parse(config_text(port=0, runtime=folder).encode()), folder) as gateway:
        page = gateway.telemetry.page().decode()
    names = {"up"}
    for family in text_string_to_metric_families(page):
        suffixes = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count")}.get(family.type, ("",))
        names.update(family.name + suffix for suffix in suffixes)
    # Looked up in the whole backend, of which this is a part.
    return names | set(GAUGES)


def test_every_query_asks_for_what_there_is(said: set[str]) -> None:
    assert len(QUERIES) > 30
    assert [(query, name) for query in QUERIES for name in unknown(query, said)] == []


@pytest.mark.parametrize(
    "query",
    [
        "adytum_nothing",
        'adytum_step{prompt="x"}',
        "sum by (user) (adytum_step)",
        "rate(adytum_requests[5m])",
        "label_values(adytum_step, prompt)",
    ],
)
def test_a_query_for_something_else_is_found(query: str, said: set[str]) -> None:
    assert list(unknown(query, said))


def test_every_metric_of_ours_is_on_the_dashboard(said: set[str]) -> None:
    shown = {metric for query in QUERIES for metric in _METRIC.findall(query)}
    ours = {name for name in said if name.startswith("adytum_") and not name.endswith(("_sum", "_count"))}
    # It counts the gateway's view; the engine's own is shown.
    assert ours - shown == {"adytum_engine_requests"}


def test_panels_are_whole() -> None:
    numbers = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(numbers)) == len(numbers)
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert place["x"] + place["w"] <= 24
        assert not cells & taken, panel["title"]
        taken |= cells
    for panel in PANELS:
        assert panel["description"].endswith("."), panel["title"]
        assert panel["datasource"]["uid"] == "${source}"


def test_alerts_say_what_to_do() -> None:
    for rule in RULES:
        assert rule["labels"]["severity"] in ("page", "ticket")
        assert set(rule["annotations"]) == {"summary", "runbook"}
        for named in re.findall(r"docs/[\w/-]+\.md", rule["annotations"]["runbook"]):
            assert (ROOT / named).exists()


def promtool(*arguments: str, cwd: Path = FOLDER) -> subprocess.CompletedProcess[str]:
    tool = shutil.which("promtool")
    if tool is None:
        pytest.skip("promtool is not installed (Debian: apt-get install prometheus)")
    return subprocess.run([tool, *arguments], cwd=cwd, capture_output=True, text=True)


def test_each_alert_fires_and_stays_quiet_in_a_test() -> None:
    cases = [case["name"] for case in yaml.safe_load((FOLDER / "alerts_test.yaml").read_text())["tests"]]
    assert sorted(cases) == sorted(f"{rule['alert']} {way}" for rule in RULES for way in ("fires", "stays quiet"))


def test_prometheus_takes_the_rules() -> None:
    checked = promtool("check", "rules", "alerts.yaml")
    assert checked.returncode == 0, checked.stderr
    assert f"{len(RULES)} rules found" in checked.stdout
    tested = promtool("test", "rules", "alerts_test.yaml")
    assert tested.returncode == 0, tested.stdout


def test_a_changed_rule_fails_its_test(tmp_path: Path) -> None:
    text = (FOLDER / "alerts.yaml").read_text()
    (tmp_path / "alerts.yaml").write_text(
        text.replace("adytum_key_expires_seconds < 30", "adytum_key_expires_seconds < -9000")
    )
    shutil.copy(FOLDER / "alerts_test.yaml", tmp_path)
    assert promtool("test", "rules", "alerts_test.yaml", cwd=tmp_path).returncode == 1
