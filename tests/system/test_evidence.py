"""The evidence of a running backend says what it runs."""

import datetime
import hashlib
import json
import os
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from adytum.attestation.core.errors import AttestationError, PolicyError
from adytum.attestation.core.trust import TrustRoots
from adytum.attestation.policy.policy import Policy
from adytum.attestation.verifier.document import VerifiedEvidence, verify
from adytum.inference.channel import keyconfig
from adytum.inference.gateway.edge.app import GATEWAY_PATH
from tests.conftest import RunningBackend
from tests.support import ROOT


def verified(backend: RunningBackend, policy: Policy, nonce: bytes | None = None) -> VerifiedEvidence:
    nonce = nonce or os.urandom(32)
    with urllib.request.urlopen(f"{backend.url}/.well-known/attestation?nonce={nonce.hex()}") as answer:
        assert answer.headers["content-type"] == "application/json"
        document = answer.read()
    return verify(document, nonce=nonce, policy=policy, trust=TrustRoots(), now=datetime.datetime.now(datetime.UTC))


def test_the_claims_are_what_runs(backend: RunningBackend) -> None:
    claims = verified(backend, Policy.from_toml(backend.policy_path)).claims
    assert claims.configuration_sha256 == hashlib.sha256(backend.config_path.read_bytes()).digest()
    assert claims.key_configurations == backend.wire.request("GET", GATEWAY_PATH)[2]
    assert keyconfig.decode_list(claims.key_configurations)
    assert claims.ehbp_key_configuration == backend.wire.request("GET", "/.well-known/hpke-keys")[2]
    assert backend.wire.request("GET", claims.gateway_path)[2] == claims.key_configurations
    assert (claims.padding, claims.cc_mode, claims.tls_spki_sha256) == ("pad", "none", None)
    assert {model.id for model in claims.models} == {backend.llama, backend.gemma, backend.e5}
    for model in claims.models:
        folder = ROOT / "var" / "models" / model.id.removeprefix("demo/")
        manifest = json.loads((folder / "adytum-manifest.json").read_text())
        assert model.weights_root.hex() == manifest["root"]
        weights = next(item for item in manifest["files"] if "model.safetensors" in item.values())
        assert hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest() in weights.values()


def test_a_policy_for_hardware_refuses_it(backend: RunningBackend) -> None:
    with pytest.raises(PolicyError) as refused:
        verified(backend, Policy.default(frozenset({bytes(48)})))
    assert refused.value.claim == "cpu"


def test_another_clients_document_is_refused(backend: RunningBackend) -> None:
    nonce = os.urandom(32)
    document = backend.wire.request("GET", f"/.well-known/attestation?nonce={nonce.hex()}")[2]
    now = datetime.datetime.now(datetime.UTC)
    policy = Policy.from_toml(backend.policy_path)
    with pytest.raises(AttestationError):
        verify(document, nonce=os.urandom(32), policy=policy, trust=TrustRoots(), now=now)
    assert verify(document, nonce=nonce, policy=policy, trust=TrustRoots(), now=now)


def test_no_canary_of_ours_reached_the_backends_log_or_an_engines(backend: RunningBackend) -> None:
    logs = [backend.log_path, *(path.parent.with_suffix(".log") for path in backend.sockets.values())]
    for log in logs:
        text = log.read_text()
        assert text
        assert backend.api_key not in text
        assert "marzipan" not in text
    for path in backend.sockets.values():
        assert path.parent.stat().st_mode & 0o777 == 0o700


def test_a_policy_from_the_running_backend_accepts_it(backend: RunningBackend, tmp_path: Path) -> None:
    path = tmp_path / "policy.toml"
    command = [
        sys.executable,
        "-m",
        "adytum.inference",
        "policy",
        "init",
        "--upstream",
        backend.url,
        "--out",
        str(path),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "")
    assert "simulated" in done.stderr
    made = Policy.from_toml(path)
    assert made.models.roots != "any"
    assert made.configuration.accepted == {hashlib.sha256(backend.config_path.read_bytes()).digest()}
    fetch = [sys.executable, "-m", "adytum.attestation", "fetch", backend.url, "--policy", str(path)]
    assert subprocess.run(fetch, cwd=ROOT, capture_output=True, text=True, timeout=60).returncode == 0
    nowhere = [*command[:-3], "http://127.0.0.1:1", "--out", str(path)]
    refused = subprocess.run(nowhere, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert refused.returncode == 1
    assert "no evidence came" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_the_process_that_holds_the_keys_leaves_no_core_dump(backend: RunningBackend) -> None:
    limits = Path(f"/proc/{backend.process.pid}/limits").read_text()
    (line,) = (line for line in limits.splitlines() if line.startswith("Max core file size"))
    assert line.split()[4:6] == ["0", "0"]
    # Not dumpable: the process's files in /proc belong to root, whichever user runs it.
    assert Path(f"/proc/{backend.process.pid}/environ").stat().st_uid == 0
