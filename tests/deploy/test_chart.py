"""The Helm chart, rendered by Helm's own Go library and checked against Kubernetes' schemas, without a cluster."""

import hashlib
import re
import shutil
import tomllib
from pathlib import Path
from typing import Any

import helm_python as helm
import kubernetes_validate
import pytest
import yaml

from adytum.inference.core.config import ConfigError, parse
from tests.support import ROOT

pytestmark = pytest.mark.slow

CHART = ROOT / "deploy" / "chart"
DIGEST = "sha256:" + "ab" * 32
CONFIG = (ROOT / "deploy" / "config" / "h100-llama.toml").read_text()
CONFIG = re.sub(r'(?m)^replica = "[^"]*"', 'replica = "@REPLICA@"', CONFIG)
VALUES: dict[str, Any] = {
    "replicas": 3,
    "image": {"repository": "registry.example.org/adytum-gpu", "digest": DIGEST},
    "config": CONFIG,
    "weights": {"claim": "weights"},
}
MONITORED = {"serviceMonitor": {"enabled": True, "forwarder": f"registry.example.org/socat@{DIGEST}"}}
# Kubernetes' oldest that the chart takes, and the newest that the package has schemas of.
VERSIONS = ("1.29", "1.37")


def render(values: dict[str, Any] | None = None, name: str = "llm", chart: Path = CHART) -> list[dict[str, Any]]:
    """The documents that Helm makes of the chart. Raises `HelmError`."""
    opened = helm.Chart.load(str(chart))
    try:
        merged = {**VALUES, **(values or {})}
        opened.validate_schema(opened.merge_values(merged))
        files = opened.render(merged, name=name, namespace="inference", is_install=True)
    finally:
        opened.close()
    found = []
    for path, text in sorted(files.items()):
        if path.endswith(".yaml"):
            found += [document for document in yaml.safe_load_all(text) if document]
    return found


def one(documents: list[dict[str, Any]], kind: str, name: str = "llm") -> dict[str, Any]:
    (found,) = [item for item in documents if item["kind"] == kind and item["metadata"]["name"] == name]
    return found


def pod(documents: list[dict[str, Any]]) -> dict[str, Any]:
    spec = one(documents, "StatefulSet")["spec"]["template"]["spec"]
    assert isinstance(spec, dict)
    return spec


def test_the_chart_has_the_projects_version() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert chart["version"] == chart["appVersion"] == project["version"]


def test_helm_has_nothing_to_complain_about() -> None:
    result = helm.lint(str(CHART), VALUES, strict=True)
    assert not [message for message in result.get("messages", []) if message.get("severity", 0) >= 2], result


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("extra", [{}, MONITORED, {"replicas": 1, "clients": [{"ipBlock": {"cidr": "10.0.0.0/8"}}]}])
def test_everything_fits_the_schemas_of_kubernetes(version: str, extra: dict[str, Any]) -> None:
    documents = render(extra)
    kinds = [document["kind"] for document in documents]
    assert {"ConfigMap", "Service", "StatefulSet", "NetworkPolicy", "PodDisruptionBudget"} <= set(kinds)
    for document in documents:
        # A custom resource has no schema in Kubernetes itself.
        if document["kind"] != "ServiceMonitor":
            kubernetes_validate.validate(document, version, strict=True)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("spec", "replicas"), "three"),
        (("spec", "template", "spec", "containers", 0, "readinessProbe", "httpGet", "prt"), 1),
        (("spec", "template", "spec", "runtimeClass"), "kata"),
        (("spec", "template", "spec", "securityContext", "runAsNonRoot"), "yes"),
    ],
)
def test_the_schemas_see_a_fault(path: tuple[Any, ...], value: Any) -> None:
    place: Any = one(render(), "StatefulSet")
    document = place
    for part in path[:-1]:
        place = place[part]
    place[path[-1]] = value
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(document, VERSIONS[-1], strict=True)


@pytest.mark.parametrize(
    "values",
    [
        {"image": {"repository": "registry.example.org/x", "digest": ""}},
        {"image": {"repository": "registry.example.org/x", "digest": "latest"}},
        {"config": ""},
        {"config": CONFIG.replace("@REPLICA@", "fixed")},
        {"weights": {"claim": ""}},
        {"runtimeClassName": "kata-qemu-nvidia-gpu"},
        {"runtimeClassName": "runc"},
        {"replicas": 0},
        {"port": 443},
        {"unknown": 1},
        {"serviceMonitor": {"enabled": True}},
    ],
)
def test_values_that_cannot_be_right_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(helm.HelmError):
        render(values)


@pytest.mark.parametrize("name", ["a.b", "1a"])
def test_a_release_whose_name_is_no_replicas_is_refused(name: str) -> None:
    with pytest.raises(helm.HelmError):
        render(name=name)


def test_each_replica_has_its_configuration_and_a_service_of_its_own() -> None:
    documents = render()
    files = one(documents, "ConfigMap")["data"]
    assert sorted(files) == ["llm-0.toml", "llm-1.toml", "llm-2.toml"]
    digests = set()
    for n in range(3):
        text = files[f"llm-{n}.toml"]
        config = parse(text.encode())
        assert config.server.replica == f"llm-{n}"
        assert config.sha256 == hashlib.sha256(text.encode()).digest()
        digests.add(config.sha256)
        service = one(documents, "Service", f"llm-{n}")["spec"]
        assert service["selector"]["statefulset.kubernetes.io/pod-name"] == f"llm-{n}"
    assert len(digests) == 3
    stateful = one(documents, "StatefulSet")["spec"]
    assert one(documents, "Service", stateful["serviceName"])["spec"]["clusterIP"] == "None"
    (backend,) = pod(documents)["containers"]
    assert backend["args"] == ["serve", "--config", "/etc/adytum/backends/$(POD_NAME).toml"]
    assert backend["env"][0]["valueFrom"]["fieldRef"]["fieldPath"] == "metadata.name"


def test_the_configuration_is_one_that_the_backend_takes_and_a_broken_one_is_seen() -> None:
    broken = CONFIG.replace('padding = "pad"', 'padding = "none"')
    with pytest.raises(ConfigError):
        parse(one(render({"config": broken}), "ConfigMap")["data"]["llm-0.toml"].encode())


def test_a_pod_is_a_virtual_machine_with_a_gpu_in_cc_mode() -> None:
    spec = pod(render())
    assert spec["runtimeClassName"] == "kata-qemu-nvidia-gpu-snp"
    assert spec["nodeSelector"] == {"nvidia.com/cc.ready.state": "true"}
    assert spec["containers"][0]["resources"]["limits"]["nvidia.com/pgpu"] == "1"
    other = pod(render({"gpu": {"resource": "nvidia.com/GH100_H100_80GB", "count": 1}}))
    assert "nvidia.com/GH100_H100_80GB" in other["containers"][0]["resources"]["limits"]


@pytest.mark.parametrize("values", [{}, MONITORED])
def test_containers_are_hardened(values: dict[str, Any]) -> None:
    spec = pod(render(values))
    assert spec["automountServiceAccountToken"] is False
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert not {"hostNetwork", "hostPID", "hostIPC"} & set(spec)
    for container in spec["containers"]:
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert re.search(r"@sha256:[0-9a-f]{64}$", container["image"])
    for volume in spec["volumes"]:
        assert not ({"hostPath"} & set(volume))
        assert volume.get("emptyDir", {"medium": "Memory"})["medium"] == "Memory"
    for mount in spec["containers"][0]["volumeMounts"]:
        assert mount.get("readOnly", False) == (mount["mountPath"] not in ("/run/adytum", "/tmp"))


def test_probes_ask_the_gateway_and_drain_fits_into_the_grace_period() -> None:
    documents = render({"drainSeconds": 100, "startSeconds": 101})
    spec = pod(documents)
    (backend,) = spec["containers"]
    asked = {name: backend[name]["httpGet"]["path"] for name in ("startupProbe", "livenessProbe", "readinessProbe")}
    assert asked == {"startupProbe": "/healthz", "livenessProbe": "/healthz", "readinessProbe": "/readyz"}
    assert spec["terminationGracePeriodSeconds"] == 130
    assert backend["startupProbe"]["failureThreshold"] * backend["startupProbe"]["periodSeconds"] >= 101


def test_the_network_is_the_gateways_port_and_nothing_else() -> None:
    policy = one(render(), "NetworkPolicy")["spec"]
    assert policy["policyTypes"] == ["Ingress", "Egress"]
    assert policy["egress"] == []
    assert policy["ingress"] == [{"ports": [{"port": "gateway", "protocol": "TCP"}]}]
    (backend,) = pod(render())["containers"]
    assert [port["name"] for port in backend["ports"]] == ["gateway"]
    peers = [{"namespaceSelector": {"matchLabels": {"a": "b"}}}]
    assert one(render({"clients": peers}), "NetworkPolicy")["spec"]["ingress"][0]["from"] == peers


def test_monitoring_is_all_there_or_not_at_all() -> None:
    assert not [item for item in render() if "metrics" in item["metadata"]["name"] or item["kind"] == "ServiceMonitor"]
    documents = render(MONITORED)
    monitor, service = one(documents, "ServiceMonitor")["spec"], one(documents, "Service", "llm-metrics")
    assert monitor["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()
    assert monitor["endpoints"][0]["port"] == service["spec"]["ports"][0]["name"]
    labels = one(documents, "StatefulSet")["spec"]["template"]["metadata"]["labels"]
    assert service["spec"]["selector"].items() <= labels.items()
    peers = [{"podSelector": {"matchLabels": {"app": "prometheus"}}}]
    rendered = render({"serviceMonitor": {**MONITORED["serviceMonitor"], "scrapers": peers}})
    policy = one(rendered, "NetworkPolicy")
    kubernetes_validate.validate(policy, VERSIONS[-1], strict=True)
    assert [(rule["ports"][0]["port"], rule.get("from")) for rule in policy["spec"]["ingress"]] == [
        ("gateway", None),
        ("metrics", peers),
    ]


def test_every_selector_finds_the_pods() -> None:
    documents = render(MONITORED)
    labels = one(documents, "StatefulSet")["spec"]["template"]["metadata"]["labels"]
    assert one(documents, "PodDisruptionBudget")["spec"]["selector"]["matchLabels"].items() <= labels.items()
    assert one(documents, "NetworkPolicy")["spec"]["podSelector"]["matchLabels"].items() <= labels.items()
    for service in (item for item in documents if item["kind"] == "Service"):
        own = {key: value for key, value in service["spec"]["selector"].items() if "pod-name" not in key}
        assert own.items() <= labels.items()


def test_a_fault_in_a_template_is_seen(tmp_path: Path) -> None:
    shutil.copytree(CHART, tmp_path / "chart")
    path = tmp_path / "chart" / "templates" / "statefulset.yaml"
    path.write_text(path.read_text().replace('include "adytum.selector"', 'include "adytum.selecter"', 1))
    with pytest.raises(helm.HelmError):
        render(chart=tmp_path / "chart")
