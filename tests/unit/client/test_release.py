"""A client that requires a release: what its workspace records, and the commands of both sides."""

import json
import subprocess
import sys
import threading
from pathlib import Path

import httpx2
import pytest
from click.testing import CliRunner
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from adytum.attestation.policy.policy import Policy
from adytum.attestation.reference import release
from adytum.attestation.reference.measurements import Input, Measurements
from adytum.attestation.reference.release import Machine, Version
from adytum.inference.__main__ import main
from adytum.inference.client import workspace
from adytum.inference.client.errors import NotVerified, RequestRefused
from adytum.inference.client.transport import AdytumTransport
from tests.unit.client.support import Fake

KEY = Ed25519PrivateKey.from_private_bytes(b"\x01" * 32)
PUBLIC = KEY.public_key().public_bytes_raw()
NOTHING_MEASURED = bytes(48)


def publish(folder: Path, fake: Fake, sequence: int, name: str = "0.1.0", launch: bytes = NOTHING_MEASURED) -> Policy:
    """Publishes a release that describes `fake`, and returns a policy that requires it."""
    configuration = configuration_of(fake)
    data = release.encode(
        sequence, "2026-11-23", [Version(name, (), (Machine(2, "EPYC-v4", launch),), (configuration,))]
    )
    (folder / "release.json").write_bytes(data)
    (folder / "release.json.sig").write_bytes(release.sign(data, [KEY]))
    stated = f'release = {{ file = "release.json", keys = ["{PUBLIC.hex()}"], minimum = 1 }}'
    path = folder / "policy.toml"
    path.write_text(Policy.accept_simulated().to_toml().replace('release = "none"', stated))
    return Policy.from_toml(path)


def configuration_of(fake: Fake) -> bytes:
    transport = AdytumTransport(upstream=fake.url, policy=Policy.accept_simulated())
    return transport.verify().evidence.claims.configuration_sha256


def ask(fake: Fake, policy: Policy, workspace: Path | None) -> None:
    """Verifies once. Raises `NotVerified`."""
    transport = AdytumTransport(upstream=fake.url, policy=policy, workspace=workspace)
    transport.verify()


def test_the_workspace_refuses_an_older_release(fake: Fake, tmp_path: Path) -> None:
    workspace = tmp_path / "workspace"
    new, old = publish(tmp_path, fake, 8), publish(tmp_path, fake, 7)
    ask(fake, old, workspace)
    ask(fake, new, workspace)
    ask(fake, new, workspace)
    with pytest.raises(NotVerified, match="sequence 7, and 8 was accepted before"):
        ask(fake, old, workspace)
    assert json.loads((workspace / "releases.json").read_text())[fake.url]["sequence"] == 8
    assert (workspace / "releases.json").stat().st_mode & 0o777 == 0o600
    lines = [json.loads(line)["release"] for line in (workspace / "evidence.log").read_text().splitlines()]
    assert lines == [7, 8, 8]
    ask(fake, old, tmp_path / "another workspace")


def test_two_releases_of_one_sequence_are_told(fake: Fake, tmp_path: Path) -> None:
    one, other = publish(tmp_path, fake, 8), publish(tmp_path, fake, 8, name="0.1.1")
    ask(fake, one, tmp_path / "workspace")
    with pytest.raises(NotVerified, match="of another one"):
        ask(fake, other, tmp_path / "workspace")


def test_a_release_that_was_not_met_is_not_remembered(fake: Fake, tmp_path: Path) -> None:
    """Otherwise a later release, for another launch, would lock the client out."""
    ask(fake, publish(tmp_path, fake, 7), tmp_path / "workspace")
    with pytest.raises(NotVerified, match="claim release"):
        ask(fake, publish(tmp_path, fake, 9, launch=b"\x01" * 48), tmp_path / "workspace")
    ask(fake, publish(tmp_path, fake, 8), tmp_path / "workspace")


@pytest.mark.parametrize("damaged", ["", "{", "[]", '{"x": 1}', '{"x": {"sequence": "8", "sha256": ""}}'])
def test_a_damaged_memory_is_not_an_empty_one(fake: Fake, tmp_path: Path, damaged: str) -> None:
    policy = publish(tmp_path, fake, 8)
    ask(fake, policy, tmp_path / "workspace")
    (tmp_path / "workspace" / "releases.json").write_text(damaged)
    with pytest.raises(NotVerified, match="cannot be read"):
        ask(fake, policy, tmp_path / "workspace")


def test_clients_that_share_a_workspace_never_go_back(fake: Fake, tmp_path: Path) -> None:
    policies = [publish(tmp_path, fake, sequence) for sequence in range(1, 9)]
    refused: list[NotVerified] = []

    def one(policy: Policy) -> None:
        try:
            ask(fake, policy, tmp_path / "workspace")
        except NotVerified as error:
            refused.append(error)

    threads = [threading.Thread(target=one, args=(policy,)) for policy in policies]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert json.loads((tmp_path / "workspace" / "releases.json").read_text())[fake.url]["sequence"] == 8
    assert all("accepted before" in str(error) for error in refused)


def test_a_workspace_that_another_program_holds_is_waited_for_and_then_refused(
    fake: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = publish(tmp_path, fake, 8)
    (tmp_path / "workspace").mkdir()
    code = "import sqlite3, sys; sqlite = sqlite3.connect(sys.argv[1]); sqlite.execute('BEGIN IMMEDIATE')"
    command = [sys.executable, "-uc", f"{code}; print('held'); input()", tmp_path / "workspace" / ".releases.lock"]
    other = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert other.stdout is not None
    assert other.stdout.readline() == b"held\n"
    monkeypatch.setattr(workspace, "LOCK_SECONDS", 0.1)
    with pytest.raises(RequestRefused, match="cannot be written"):
        ask(fake, policy, tmp_path / "workspace")
    monkeypatch.setattr(workspace, "LOCK_SECONDS", 10)
    threading.Timer(0.3, other.kill).start()  # A lock does not outlive the program that holds it.
    ask(fake, policy, tmp_path / "workspace")
    assert other.wait(5) < 0
    assert (tmp_path / "workspace" / ".releases.lock").read_bytes() == b""


def test_nothing_is_sent_to_a_backend_of_no_release(fake: Fake, tmp_path: Path) -> None:
    policy = publish(tmp_path, fake, 8, launch=b"\x01" * 48)
    transport = AdytumTransport(upstream=fake.url, policy=policy)
    with httpx2.Client(transport=transport, base_url=fake.url) as client, pytest.raises(httpx2.ConnectError):
        client.post("/v1/chat/completions", json={"model": "fake/chat", "messages": []})
    assert fake.requests == 0


def run(*arguments: str | Path) -> str:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result.output


def refused(*arguments: str | Path) -> str:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code in (1, 2), result.output
    assert isinstance(result.exception, SystemExit)
    return result.output


def measured(path: Path, launch: bytes) -> Path:
    given = Input(1, bytes(32))
    found = Measurements("sev-snp-measure 0.0.13", given, given, None, "", "EPYC-v4", 1, 0x30000, {4: launch})
    path.write_bytes(found.encode())
    return path


def test_the_commands_from_the_old_version_to_the_new(tmp_path: Path) -> None:
    at = tmp_path.joinpath
    public = run("release", "key", at("key.pem")).strip()
    at("old.toml").write_text("old"), at("new.toml").write_text("new"), at("new.raw").write_bytes(b"image")
    old, new = measured(at("old.json"), b"\x0a" * 48), measured(at("new.json"), b"\x0b" * 48)
    key = ("--key", at("key.pem"))
    run("release", "make", "--name", "1", "--sequence", "1", "--measurements", old, "--config", at("old.toml"), *key, "--out", at("r1.json"))  # fmt: skip  # noqa: E501
    second = ("release", "make", "--name", "2", "--measurements", new, "--config", at("new.toml"), "--image", at("new.raw"), *key)  # fmt: skip  # noqa: E501
    said = run(*second, "--sequence", "2", "--draining", at("r1.json"), "--out", at("r2.json"))
    # Both measurements are accepted while the old version drains, and the command reports it.
    assert "current  2" in said
    assert "draining  1" in said
    assert "0a" * 48 in said
    assert "0b" * 48 in said
    said = run(*second, "--sequence", "3", "--out", at("r3.json"))
    assert "draining" not in said
    assert "0a" * 48 not in said

    run("release", "verify", at("r2.json"), "--key", public, "--measurements", old, "--measurements", new)
    run("release", "verify", at("r3.json"), "--key", public, "--minimum", "3", "--image", at("new.raw"))
    assert "the policy wants 4" in refused("release", "verify", at("r3.json"), "--key", public, "--minimum", "4")
    assert "not in the release" in refused("release", "verify", at("r3.json"), "--key", public, "--measurements", old)
    assert "not one of the release" in refused("release", "verify", at("r3.json"), "--key", public, "--image", old)
    assert "no signature" in refused("release", "verify", at("r3.json"), "--key", "03" * 32)
    assert "hexadecimal" in refused("release", "verify", at("r3.json"), "--key", "key")
    assert "must be higher" in refused(*second, "--sequence", "1", "--draining", at("r1.json"), "--out", at("r4.json"))  # fmt: skip  # noqa: E501
    run("release", "key", at("stranger.pem"))
    assert "no signature" in refused(*second[:-1], at("stranger.pem"), "--sequence", "4", "--draining", at("r1.json"), "--out", at("r4.json"))  # fmt: skip  # noqa: E501
    assert "not overwritten" in refused("release", "key", at("key.pem"))
    assert "PEM" in refused(*second[:-1], at("new.toml"), "--sequence", "4", "--out", at("r4.json"))
    assert not at("r4.json").exists()

    run("policy", "init", "--release", at("r2.json"), "--release-key", public, "--out", at("policy.toml"))
    required = Policy.from_toml(at("policy.toml")).release.required
    assert required != "none"
    assert (required.minimum, required.file) == (2, "r2.json")
    assert {v.name for v in required.release.versions} == {"1", "2"}
    assert "go together" in refused("policy", "init", "--release", at("r2.json"))
    assert "give --upstream" in refused("policy", "init")
    assert "no signature" in refused("policy", "init", "--release", at("r2.json"), "--release-key", "03" * 32)


def test_a_policy_from_a_backend_and_its_measurements_have_to_agree(fake: Fake, tmp_path: Path) -> None:
    good, bad = measured(tmp_path / "good", NOTHING_MEASURED), measured(tmp_path / "bad", b"\x01" * 48)
    run("policy", "init", "--upstream", fake.url, "--measurements", good, "--out", tmp_path / "policy.toml")
    assert Policy.from_toml(tmp_path / "policy.toml").measurement.accepted == {NOTHING_MEASURED}
    ask(fake, Policy.from_toml(tmp_path / "policy.toml"), None)
    assert "launch measurement" in refused("policy", "init", "--upstream", fake.url, "--measurements", bad)
    publish(tmp_path, fake, 8, launch=b"\x01" * 48)
    said = refused("policy", "init", "--upstream", fake.url, "--release", tmp_path / "release.json", "--release-key", PUBLIC.hex())  # fmt: skip  # noqa: E501
    assert "no version in the release 8" in said
