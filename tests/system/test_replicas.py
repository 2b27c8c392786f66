"""Replicas behind HAProxy: one is killed under load, a rogue fourth gets nothing, nothing is computed twice.

The replicas' engines are scripted and write down what they were asked; the clients are real proxies. `make deploy-test`
does the same with whole backends and vLLM.
"""

import base64
import json
import os
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest

from adytum.attestation.policy.policy import Policy
from adytum.inference.client.session import SEALED_HEADERS, Upstream
from tests.system.cluster import (
    CHAT,
    CLIENTS,
    MODEL,
    NAMES,
    ROGUE,
    SHIPPED,
    Cluster,
    Load,
    Replica,
    certificate,
    running_cluster,
    streams,
    wait_for,
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        shutil.which("haproxy") is None, reason="haproxy is not installed (Debian: apt-get install haproxy)"
    ),
]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with running_cluster(tmp_path_factory.mktemp("replicas")) as found:
        yield found


def judge(cluster: Cluster, load: Load, before: dict[str, int], in_progress: int) -> None:
    """Nothing twice, nothing lost without a word, nothing for the rogue."""
    asked = Counter(name for replica in cluster.replicas.values() for name in replica.asked[before[replica.name] :])
    assert [name for name, count in asked.items() if count > 1] == []
    assert [name for name in load.done if asked[name] != 1] == []
    # Those that the killed replica had; no other request failed.
    assert len(load.broken) <= in_progress, load.broken
    assert cluster.rogue.asked == []
    assert [line for line in cluster.served(f"replica_{ROGUE}") if line[0] == "POST"] == []


def counts(cluster: Cluster) -> dict[str, int]:
    return {name: len(replica.asked) for name, replica in cluster.replicas.items()}


def kill_in_the_middle(replica: Replica, log: Path) -> str:
    """Ends it while its engine works on a request without an answered byte. Returns the request's name."""
    seen = len(replica.asked)
    found: list[str] = []

    def working() -> bool:
        found[:] = [name for name in replica.asked[seen:] if not streams(name)]
        return bool(found)

    wait_for(working, log, every=0.005)
    replica.kill()
    return found[-1]


@pytest.mark.slow
def test_a_replica_is_killed_under_load_and_comes_back(cluster: Cluster) -> None:
    before = counts(cluster)
    with cluster.proxy(*(cluster.url(name) for name in (*NAMES, ROGUE))) as url:
        load = Load(url)
        with load.running():
            wait_for(lambda: all(now > before[name] for name, now in counts(cluster).items()), cluster.log)
            wait_for(lambda: len(load.done) > 2 * CLIENTS, cluster.log)
            name = kill_in_the_middle(cluster.replicas["alpha"], cluster.log)
            killed, when = len(load.done), counts(cluster)
            wait_for(lambda: name in dict(load.broken), cluster.log)
            wait_for(lambda: len(load.done) > killed + 4 * CLIENTS, cluster.log)
            assert all(counts(cluster)[name] > when[name] for name in ("beta", "gamma"))
            assert counts(cluster)["alpha"] == when["alpha"]
            cluster.replicas["alpha"].start()
            wait_for(lambda: counts(cluster)["alpha"] > when["alpha"] + 2, cluster.log)
        wait_for(lambda: httpx2.get(f"{url}/healthz", timeout=30).json()["upstreams"][0]["verified"], cluster.log)
        health = httpx2.get(f"{url}/healthz", timeout=30).json()
    judge(cluster, load, before, in_progress=CLIENTS)
    verified = {item["upstream"]: item["verified"] for item in health["upstreams"]}
    assert verified == {cluster.url(name): name != ROGUE for name in (*NAMES, ROGUE)}
    # It was looked at, and that was all.
    paths = {tuple(line[:2]) for line in cluster.served(f"replica_{ROGUE}")}
    assert paths - {("GET", "/readyz")} == {("GET", "/.well-known/attestation")}


@pytest.mark.slow
def test_a_client_of_the_common_name_goes_on_with_another_replica(cluster: Cluster) -> None:
    """It knows one address; the balancer's 422 makes it fetch keys again, and they are another replica's."""
    before = counts(cluster)
    with cluster.proxy(cluster.url()) as url:
        load = Load(url)
        with load.running():
            wait_for(lambda: len(load.done) > 2 * CLIENTS, cluster.log)
            now = counts(cluster)
            used = [name for name in NAMES if now[name] > before[name]]
            assert len(used) == 1
            name = kill_in_the_middle(cluster.replicas[used[0]], cluster.log)
            at = len(load.done)
            wait_for(lambda: name in dict(load.broken), cluster.log)
            wait_for(lambda: len(load.done) > at + 4 * CLIENTS, cluster.log)
    cluster.replicas[used[0]].start()
    wait_for(lambda: cluster.request("GET", "/readyz", used[0]).status_code == 200, cluster.log)
    after = counts(cluster)
    assert any(after[name] > now[name] for name in NAMES if name not in used)
    judge(cluster, load, before, in_progress=CLIENTS)
    # What failed had been sent. Those who came later were told at once, and heard nothing of it.
    assert [reason for _, reason in load.broken if re.search("status (503|422)", reason)] == []
    assert len([line for line in cluster.served("anyone") if line[:2] == ["GET", "/.well-known/attestation"]]) > 1


def test_what_was_sealed_for_one_and_brought_to_another_is_opened_by_nobody(cluster: Cluster) -> None:
    """The balancer is not trusted: it may bring a request anywhere, the rogue one and the wrong replica among them."""
    upstream = Upstream(cluster.url("alpha"), policy=Policy.from_toml(cluster.policy))
    challenge = upstream.challenge()
    session = upstream.accept(challenge, cluster.request("GET", challenge.target, "alpha").content)
    body = {"model": MODEL, "messages": [{"role": "user", "content": "astray"}]}
    data, _ = session.seal("POST", CHAT, ((b"content-type", b"application/json"),), json.dumps(body).encode())
    assert session.gateway_path.endswith("/alpha")
    for name in ("beta", ROGUE):
        path = session.gateway_path.replace("alpha", name)
        answer = cluster.request("POST", path, content=data, **SEALED_HEADERS)
        assert answer.status_code == 422
        assert answer.json()["type"].endswith("#ohttp-key")
    assert not [one.name for one in (*cluster.replicas.values(), cluster.rogue) if "astray" in one.asked]
    answer = cluster.request("POST", session.gateway_path, content=data, **SEALED_HEADERS)
    assert answer.status_code == 200
    assert cluster.replicas["alpha"].asked.count("astray") == 1


def test_evidence_of_each_replica_is_reached_by_its_host_name(cluster: Cluster) -> None:
    for name in NAMES:
        document = cluster.request("GET", f"/.well-known/attestation?nonce={os.urandom(32).hex()}", name).text
        claims = json.loads(base64.b64decode(json.loads(document)["claims"]))
        assert claims["replica"] == name
        assert claims["gateway_path"] == f"/.well-known/ohttp-gateway/{name}"


@pytest.mark.parametrize(
    ("method", "path", "headers"),
    [
        ("GET", "/.well-known/ohttp-gateway", {}),
        ("POST", "/.well-known/ohttp-gateway", {"content-type": "message/ohttp-chunked-req"}),
        ("GET", "/.well-known/hpke-keys", {}),
        ("POST", CHAT, {"Ehbp-Encapsulated-Key": "00" * 32}),
    ],
)
def test_what_the_common_name_cannot_route_is_refused_there_and_taken_at_a_replicas(
    cluster: Cluster, method: str, path: str, headers: dict[str, str]
) -> None:
    refused = cluster.request(method, path, **headers)
    assert refused.status_code == 421
    assert refused.headers["content-type"] == "application/problem+json"
    assert "several replicas" in refused.json()["title"]
    assert cluster.request(method, path, "beta", **headers).status_code != 421


@pytest.mark.parametrize("name", ["omega", "anyone", "clients", "Alpha", ".."])
def test_a_name_that_is_no_replicas_means_fetch_the_keys_again_or_nothing(cluster: Cluster, name: str) -> None:
    answer = cluster.request("POST", f"/.well-known/ohttp-gateway/{name}")
    if name == "..":
        assert answer.status_code == 404
    else:
        assert answer.status_code == 422
        assert answer.json()["type"].endswith("#ohttp-key")


@pytest.mark.parametrize("name", ["haproxy.cfg", "passthrough.cfg"])
def test_haproxy_takes_the_shipped_configurations(name: str, tmp_path: Path) -> None:
    text = (SHIPPED / name).read_text().replace("/etc/haproxy/", f"{tmp_path}/")
    shutil.copytree(SHIPPED, tmp_path, dirs_exist_ok=True)
    certificate(tmp_path / "llm.example.org.pem")
    (tmp_path / name).write_text(text)
    checked = subprocess.run(["haproxy", "-c", "-f", str(tmp_path / name)], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr
    assert "WARNING" not in checked.stderr
    (tmp_path / name).write_text(text.replace("use_backend", "use_backnd"))
    assert subprocess.run(["haproxy", "-c", "-f", str(tmp_path / name)], capture_output=True).returncode == 1
