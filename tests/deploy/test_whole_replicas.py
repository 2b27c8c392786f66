"""Three whole backends with vLLM behind HAProxy: one is killed under load. Minutes; `make deploy-test` runs it."""

import os
import shutil
import sys
import time
from collections import Counter
from pathlib import Path

import httpx2
import pytest

from tests.system.cluster import NAMES, ROGUE, Cluster, Load, running_cluster, wait_for

pytestmark = [
    pytest.mark.skipif("ADYTUM_DEPLOY_TEST" not in os.environ, reason="minutes long: make deploy-test"),
    pytest.mark.skipif(shutil.which("haproxy") is None, reason="haproxy is not installed (apt-get install haproxy)"),
    pytest.mark.timeout(900),
    pytest.mark.engine,
    pytest.mark.slow,
]


def counts(cluster: Cluster) -> dict[str, int]:
    return {name: len(replica.asked) for name, replica in cluster.replicas.items()}


def test_a_whole_backend_is_killed_under_load(tmp_path: Path) -> None:
    with running_cluster(tmp_path, whole=True) as cluster:
        with cluster.proxy(*(cluster.url(name) for name in (*NAMES, ROGUE))) as url:
            models = httpx2.get(f"{url}/v1/models", timeout=30).json()
            assert [item["id"] for item in models["data"]] == ["demo/llama-awq", "latest"]
            load = Load(url, {"max_tokens": 60})
            started = time.monotonic()
            with load.running():
                wait_for(lambda: len(load.done) >= 60 and all(counts(cluster).values()), cluster.log)
                assert load.broken == []
                shares, at, when = counts(cluster), len(load.done), time.monotonic()
                cluster.replicas["alpha"].kill()
                wait_for(lambda: len(load.done) >= at + 60, cluster.log)
                after = time.monotonic() - when
                cluster.replicas["alpha"].start()
                back, seen = time.monotonic() - when, counts(cluster)["alpha"]
                wait_for(lambda: counts(cluster)["alpha"] > seen + 5, cluster.log)
            took = time.monotonic() - started
        asked = counts(cluster)
        posts = [line[1:] for name in NAMES for line in cluster.served(f"replica_{name}") if line[0] == "POST"]
        rogue = Counter(tuple(line) for line in cluster.served(f"replica_{ROGUE}"))
        # Kept in deploy/results/replicas.txt.
        said = [
            f"{at} answers before alpha was killed, records of them by replica {shares}",
            f"60 more in the {after:.1f} s after the kill; alpha was ready again after {back:.0f} s, and was used",
            f"in {took:.0f} s {len(load.done)} answers and {len(load.broken)} broken ones; records of answers {asked}",
            f"sealed requests through HAProxy, by path and status: {dict(Counter(map(tuple, posts)))}",
            f"the rogue replica was asked: {dict(rogue)}",
            *(f"broken: {reason[-300:]}" for _, reason in load.broken[:10]),
        ]
        sys.stdout.write("\n".join(["", *said, ""]))
        # What died with alpha has no record, so this is a bound; the scripted engines count exactly.
        assert len(load.done) <= sum(asked.values()) <= len(load.done) + len(load.broken)
        assert len(load.broken) <= 8
        assert [line for line in rogue if line[0] == "POST"] == []
