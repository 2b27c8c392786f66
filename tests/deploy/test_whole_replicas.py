"""Three whole backends with vLLM behind HAProxy: one is killed under load. Minutes; `make deploy-test` runs it."""

import os
import shutil
import sys
import time
from pathlib import Path

import httpx2
import pytest

from tests.system.cluster import NAMES, ROGUE, Load, running_cluster, wait_for

pytestmark = [
    pytest.mark.skipif("CLOISTER_DEPLOY_TEST" not in os.environ, reason="minutes long: make deploy-test"),
    pytest.mark.skipif(shutil.which("haproxy") is None, reason="haproxy is not installed (apt-get install haproxy)"),
    pytest.mark.timeout(900),
]


def test_a_whole_backend_is_killed_under_load(tmp_path: Path) -> None:
    with running_cluster(tmp_path, whole=True) as cluster:
        with cluster.proxy(*(cluster.url(name) for name in (*NAMES, ROGUE))) as url:
            models = httpx2.get(f"{url}/v1/models", timeout=30).json()
            assert [item["id"] for item in models["data"]] == ["demo/llama-awq", "latest"]
            load = Load(url, {"max_tokens": 60})
            with load.running():
                time.sleep(8)
                shares = {name: len(replica.asked) for name, replica in cluster.replicas.items()}
                cluster.replicas["alpha"].kill()
                assert load.broken == []
                at, when = len(load.done), time.monotonic()
                time.sleep(8)
                after = len(load.done) - at
                assert after > 8, load.broken[-3:]
                cluster.replicas["alpha"].start()
                back = time.monotonic() - when
                seen = len(cluster.replicas["alpha"].asked)
                wait_for(lambda: len(cluster.replicas["alpha"].asked) > seen, cluster.log, 60)
        asked = {name: len(replica.asked) for name, replica in cluster.replicas.items()}
        said = (
            f"before the kill {shares}; in the 8 s after it {after} answers; alpha served again after {back:.0f} s; "
            f"in all {len(load.done)} answers, {len(load.broken)} broken, engines asked {asked}"
        )
        # Kept in deploy/results/replicas.txt.
        sys.stdout.write("\n".join([said, *(f"broken: {reason[-300:]}" for _, reason in load.broken[:10]), ""]))
        assert all(shares.values())
        # What died with alpha has no record, so this is a bound; the scripted engines count exactly.
        assert len(load.done) <= sum(asked.values()) <= len(load.done) + len(load.broken)
        assert len(load.broken) <= 8
        assert [line for line in cluster.served(f"replica_{ROGUE}") if line[0] == "POST"] == []
