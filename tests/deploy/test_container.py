"""What can be said of the containers without building one; a build's output is in deploy/results/container.txt."""

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from adytum.attestation.policy.policy import Policy
from adytum.inference.core.config import Config, parse
from tests.support import ROOT

FOLDER = ROOT / "deploy" / "container"
CONTAINERFILE = (FOLDER / "Containerfile").read_text()
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "deploy" / "compose.yaml").read_text())


def stages() -> dict[str, str]:
    """The text of each stage, by name."""
    found = re.split(r"(?m)^FROM (\S+) AS (\S+)$", CONTAINERFILE)
    return {
        name: f"FROM {base}\n{text}" for base, name, text in zip(found[1::3], found[2::3], found[3::3], strict=True)
    }


def build(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(FOLDER / "build.sh"), *arguments],
        env={"PATH": "/usr/bin:/bin", **environment},
        capture_output=True,
        text=True,
    )


def test_every_stage_comes_from_the_pinned_base() -> None:
    assert re.search(r"(?m)^ARG BASE$", CONTAINERFILE), "BASE must have no default: a tag moves"
    names = set(stages())
    for text in stages().values():
        base = text.split()[1]
        assert base == "${BASE}" or base in names


@pytest.mark.parametrize("target", ["client", "cpu", "gpu"])
def test_a_target_runs_as_nobody_in_particular(target: str) -> None:
    text = stages()[target]
    users = re.findall(r"(?m)^USER (\S+)$", text if "USER" in text else stages()["runtime"])
    assert users[-1] == "10001:10001"
    assert "HEALTHCHECK" not in re.sub(r"(?m)^#.*$", "", CONTAINERFILE)


def test_the_engines_version_is_the_projects() -> None:
    project = (ROOT / "pyproject.toml").read_text()
    (wanted,) = re.findall(r'gpu = \["(vllm==[^"]+)"\]', project)
    assert wanted in stages()["engine-gpu"]


def test_no_secret_and_no_weight_gets_into_the_context() -> None:
    ignore = (FOLDER / "Containerfile.dockerignore").read_text().split()
    copied = {word for line in re.findall(r"(?m)^COPY (?!--from)(.*)$", CONTAINERFILE) for word in line.split()[:-1]}
    assert "*" in ignore
    for name in copied:
        assert f"!{name.split('/')[0]}" in ignore, name
    assert "!var" not in ignore


@pytest.mark.parametrize(
    ("arguments", "environment", "said"),
    [
        ((), {}, "usage"),
        (("arm",), {}, "usage"),
        (("cpu",), {}, "by its digest"),
        (("cpu",), {"BASE": "docker.io/library/debian:bookworm-slim"}, "by its digest"),
        (("cpu",), {"BASE": "debian@sha256:abc"}, "skopeo"),
        (("cpu",), {"BASE": "localhost/debian-base"}, "base.sh"),
    ],
)
def test_a_build_without_a_pinned_base_is_refused(
    arguments: tuple[str, ...], environment: dict[str, str], said: str
) -> None:
    done = build(*arguments, **environment)
    assert done.returncode == 2
    assert said in done.stderr


def test_compose_publishes_the_proxy_on_loopback_only() -> None:
    backend, proxy = COMPOSE["services"]["backend"], COMPOSE["services"]["proxy"]
    assert backend["ports"] == ["127.0.0.1:9876:9876"]
    assert "ports" not in proxy
    assert proxy["network_mode"] == "service:backend"
    for service in (backend, proxy):
        assert service["read_only"] is True
        assert service["user"] == "10001:10001"
        assert service["cap_drop"] == ["ALL"]
        for volume in service["volumes"]:
            source, _, mode = volume.split(":")
            assert mode == "ro"
            assert source == "../var/models" or (ROOT / "deploy" / source).exists()


@pytest.mark.slow
@pytest.mark.skipif(
    shutil.which("docker-compose") is None, reason="docker-compose is not installed (Debian: apt-get install)"
)
def test_docker_compose_takes_the_file_and_asks_for_the_base() -> None:
    command = ["docker-compose", "--file", str(ROOT / "deploy" / "compose.yaml"), "config"]
    environment = {name: value for name, value in os.environ.items() if name not in ("BASE", "PYTHONPATH")}
    base = f"debian@sha256:{'ab' * 32}"
    done = subprocess.run(command, env={**environment, "BASE": base}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    read = yaml.safe_load(done.stdout)["services"]["backend"]
    assert read["build"]["args"]["BASE"] == base
    assert (Path(read["build"]["context"]) / read["build"]["dockerfile"]).is_file()
    without_base = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert without_base.returncode != 0
    assert "deploy/container/README.md" in without_base.stderr


def without(config: Config, *paths: str) -> Any:
    document = config.model_dump(mode="json")
    for path in paths:
        section, _, name = path.partition(".")
        items = document[section] if isinstance(document[section], list) else [document[section]]
        for item in items:
            del item[name]
    return document


def test_composes_configuration_is_the_demos_but_for_paths_and_the_sandbox() -> None:
    demo = parse((ROOT / "deploy" / "config" / "demo.toml").read_bytes())
    own = parse((FOLDER / "dev.toml").read_bytes())
    changed = ("server.replica", "engines.python", "engines.runtime_directory", "engines.sandbox")
    changed += ("models.source", "models.manifest")
    assert without(demo, *changed) == without(own, *changed)
    assert own.engines.sandbox == "none"
    assert [Path(model.source).parent for model in own.models] == [Path("/models")] * 3
    policy = Policy.from_toml(FOLDER / "dev-policy.toml")
    assert policy.sandbox.accepted == frozenset({"none"})
    command = COMPOSE["services"]["proxy"]["command"]
    assert f"--upstream=http://127.0.0.1:{own.server.port}" in command
