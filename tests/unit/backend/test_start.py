"""`adytum serve` when it cannot serve: it names the step that failed and what to do, and exits with status 1."""

import datetime
import hashlib
import json
import socket
import ssl
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from adytum.inference.backend import start
from adytum.inference.core.config import parse
from adytum.inference.core.lifecycle import Lifecycle, Step
from adytum.inference.engine.weights import weights
from adytum.inference.gateway.edge import tls
from tests.support import ROOT, backend_command, config_text

pytestmark = pytest.mark.slow


def serve(config: str, folder: Path) -> subprocess.CompletedProcess[str]:
    path = folder / "backend.toml"
    path.write_text(config)
    return subprocess.run(backend_command(path), cwd=ROOT, capture_output=True, text=True, timeout=60)


def one_model(folder: Path, port: int = 0) -> str:
    """A configuration with one model folder of small files and its manifest; no engine can load it."""
    model = folder / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    (model / "model.safetensors").write_bytes(bytes(1000))
    weights.lock(model).save(model / weights.NAME)
    changes = {"python": f'"{sys.executable}"', "canary": '"off"'}
    text = config_text(port=port, runtime=folder / "run", changes=changes)
    text = text[: text.index("[[models]]")]
    text += f'[[models]]\nid = "demo/one"\ntask = "generate"\nsource = "{model}"\nmanifest = "{model / weights.NAME}"\n'
    return text


def test_the_steps_are_those_of_the_life_in_their_order() -> None:
    life = Lifecycle()
    for step, _ in start._STEPS:
        life.advance(step)
    assert life.serving
    assert [step for step, work in start._STEPS if work is None] == [Step.KEYS, Step.SELF_VERIFIED]


def test_changed_weights_stop_the_start_before_any_engine(tmp_path: Path) -> None:
    config = one_model(tmp_path)
    data = bytearray((tmp_path / "model" / "model.safetensors").read_bytes())
    data[500] ^= 1
    (tmp_path / "model" / "model.safetensors").write_bytes(data)
    done = serve(config, tmp_path)
    assert done.returncode == 1
    assert "WEIGHTS failed" in done.stderr
    assert "model.safetensors" in done.stderr
    assert "adytum models lock" in done.stderr
    assert "ENGINES\n" not in done.stderr


def test_an_engine_that_cannot_start_is_named_with_its_log(tmp_path: Path) -> None:
    done = serve(one_model(tmp_path), tmp_path)
    assert done.returncode == 1
    assert "ENGINES failed: demo/one" in done.stderr
    assert "demo-one.log" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_port_in_use(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        done = serve(one_model(tmp_path, taken.getsockname()[1]), tmp_path)
    assert done.returncode == 1
    assert "choose another server.port" in done.stderr


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('source = "', 'source = "nobody/nothing-', 'add revision = "<commit>"'),
        ('manifest = "', 'manifest = "/nowhere', "cannot read the manifest"),
        ('python = "', 'python = "/nowhere', "make engine-env"),
    ],
)
def test_what_is_missing_is_said(tmp_path: Path, old: str, new: str, said: str) -> None:
    done = serve(one_model(tmp_path).replace(old, new), tmp_path)
    assert done.returncode == 1
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_check_prints_the_digest_that_evidence_shows(tmp_path: Path) -> None:
    path = tmp_path / "backend.toml"
    path.write_text(one_model(tmp_path))
    command = [sys.executable, "-m", "adytum.inference", "serve", "--config", str(path), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0
    assert parse(path.read_bytes()).sha256.hex() in done.stdout


def test_lock_prints_the_root(tmp_path: Path) -> None:
    one_model(tmp_path)
    command = [sys.executable, "-m", "adytum.inference", "models", "lock", str(tmp_path / "model")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0
    assert done.stdout.strip() == json.loads((tmp_path / "model" / weights.NAME).read_text())["root"]


def test_a_generated_tls_key_serves_and_its_hash_is_of_the_key_that_the_client_sees() -> None:
    context, spki = tls.generated(("backend.example",), datetime.datetime.now(datetime.UTC))
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def answer() -> None:
            with context.wrap_socket(listening.accept()[0], server_side=True) as connection:
                connection.sendall(b"hello")

        thread = threading.Thread(target=answer)
        thread.start()
        unverified = ssl.create_default_context()
        unverified.check_hostname = False
        unverified.verify_mode = ssl.CERT_NONE
        raw = socket.create_connection(listening.getsockname())
        with unverified.wrap_socket(raw, server_hostname="backend.example") as client:
            assert client.recv(5) == b"hello"
            assert client.version() == "TLSv1.3"
            der = client.getpeercert(binary_form=True)
        thread.join(10)
    assert der is not None
    certificate = x509.load_der_x509_certificate(der)
    seen = certificate.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    assert hashlib.sha256(seen).digest() == spki
