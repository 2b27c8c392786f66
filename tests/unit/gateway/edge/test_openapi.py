"""docs/openapi.yaml and the gateway say the same: every route, every fixed answer, and under generated requests."""

import inspect
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import yaml

from adytum.inference.channel import ehbp, hpke, keyconfig, ohttp
from adytum.inference.channel.padding import Padding
from adytum.inference.core.config import parse
from adytum.inference.core.lifecycle import Lifecycle
from adytum.inference.gateway import failures
from adytum.inference.gateway.edge.app import GATEWAY_PATH, create_gateway
from adytum.inference.gateway.failures import Problem
from tests.support import ROOT, config_text, seal
from tests.unit.gateway.support import RunningGateway, running_gateway

FILE = ROOT / "docs" / "openapi.yaml"
DOCUMENT: dict[str, Any] = yaml.safe_load(FILE.read_text())
CHAT = "/v1/chat/completions"
BODY = {"model": "latest", "messages": [{"role": "user", "content": "hello"}]}
OHTTP = {"Content-Type": ohttp.CHUNKED.request}


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningGateway]:
    folder = tmp_path_factory.mktemp("openapi")
    with running_gateway(parse(config_text(port=0, runtime=folder).encode()), folder) as running:
        yield running


def described() -> set[tuple[str, str]]:
    methods = ("get", "put", "post", "delete", "options", "head", "patch", "trace")
    return {(method.upper(), path) for path, item in DOCUMENT["paths"].items() for method in item if method in methods}


def test_every_route_is_described_and_no_other() -> None:
    nothing = cast(Any, None)
    app = create_gateway(
        replica="{replica}",
        padding=Padding.PAD,
        lifecycle=Lifecycle(),
        model_states=dict,
        keys=nothing,
        evidence=nothing,
        admission=nothing,
        sealed=nothing,
    )
    inside = inspect.getclosurevars(app).nonlocals
    routes = {(method, route.path) for route in inside["app"].routes for method in route.methods} | set(inside["hot"])
    assert routes == described()


def test_every_fixed_answer_is_described() -> None:
    said = [value for value in vars(failures).values() if isinstance(value, Problem)]
    assert len(said) > 12
    everywhere = {
        status
        for path, method in {(path, method) for method, path in described()}
        for status in DOCUMENT["paths"][path][method.lower()]["responses"]
    }
    text = FILE.read_text()
    for problem in said:
        assert str(problem.status) in everywhere
        assert problem.type == "about:blank" or problem.type in text


def answer(
    gateway: RunningGateway, method: str, path: str, body: bytes = b"", headers: dict[str, str] | None = None
) -> tuple[int, dict[str, str], bytes]:
    """One request; its answer is one that the document has."""
    status, fields, wire = gateway.request(method, path, body, headers)
    named = path.partition("?")[0].replace("/demo", "/{replica}")
    response = DOCUMENT["paths"][named][method.lower()]["responses"][str(status)]
    if "$ref" in response:
        response = DOCUMENT["components"]["responses"][response["$ref"].rpartition("/")[2]]
    assert fields["content-type"].partition(";")[0] in response["content"], (method, path, status)
    for name in response.get("headers", {}):
        assert name.lower() in fields or status == 503, (method, path, status, name)
    return status, fields, wire


def test_what_a_client_gets_is_described(gateway: RunningGateway) -> None:
    sealed = seal(ohttp.RequestSealer(ohttp.CHUNKED, gateway.configuration()), BODY)
    assert answer(gateway, "POST", GATEWAY_PATH, sealed, OHTTP)[0] == 200
    assert answer(gateway, "POST", GATEWAY_PATH, sealed, OHTTP)[0] == 409
    whole = seal(ohttp.RequestSealer(ohttp.WHOLE, gateway.configuration()), BODY, media=ohttp.WHOLE)
    one = GATEWAY_PATH + "/demo"
    assert answer(gateway, "POST", one, whole, {"Content-Type": ohttp.WHOLE.request})[0] == 200
    assert answer(gateway, "POST", one, whole, {"Content-Type": "text/plain"})[0] == 415
    assert answer(gateway, "POST", GATEWAY_PATH, os.urandom(40), OHTTP)[0] == 422
    assert answer(gateway, "POST", GATEWAY_PATH, b"", OHTTP)[0] == 400
    assert answer(gateway, "POST", CHAT, json.dumps(BODY).encode())[0] == 400
    for path in ("/healthz", "/readyz", GATEWAY_PATH, one, "/.well-known/hpke-keys", "/v1/models"):
        assert answer(gateway, "GET", path)[0] == 200
    assert answer(gateway, "GET", f"/.well-known/attestation?nonce={'0a' * 32}")[0] == 200
    assert answer(gateway, "GET", "/.well-known/attestation")[0] == 400


@pytest.mark.parametrize(
    ("body", "status"), [(BODY, 200), (BODY | {"stream": True}, 200), ({}, 400), (BODY | {"model": "x"}, 404)]
)
def test_what_a_client_of_ehbp_gets_is_described(gateway: RunningGateway, body: dict[str, Any], status: int) -> None:
    key = keyconfig.KeyConfiguration.decode(gateway.request("GET", "/.well-known/hpke-keys")[2]).public_key
    enc, context = hpke.setup_sender(ehbp.SUITE, key, b"ehbp request")
    frame = context.seal(json.dumps(body).encode())
    headers = {"Ehbp-Encapsulated-Key": enc.hex(), "Content-Type": "application/json"}
    found, fields, _ = answer(gateway, "POST", CHAT, len(frame).to_bytes(4, "big") + frame, headers)
    assert found == status
    assert "ehbp-response-nonce" in fields


@pytest.mark.parametrize("path", [CHAT, GATEWAY_PATH, "/healthz", "/.well-known/attestation"])
def test_a_wrong_method_is_told_the_right_ones(gateway: RunningGateway, path: str) -> None:
    status, fields, _ = gateway.request("DELETE", path)
    assert status == 405
    assert set(fields["allow"].split(", ")) == {method for method, known in described() if known == path}


# Generated requests.


def schemathesis(gateway: RunningGateway, document: Path, examples: int) -> subprocess.CompletedProcess[str]:
    # Not that every request which fits the description is accepted: no generated bytes were sealed to our key.
    command = [
        *(sys.executable, "-m", "schemathesis.cli", "run", str(document), "--url", gateway.url, "--no-color"),
        *("--checks", "all", "--exclude-checks", "positive_data_acceptance", "--phases", "examples,coverage,fuzzing"),
        *("--max-examples", str(examples), "--generation-deterministic", "--warnings", "off"),
    ]
    environment = os.environ | {"SCHEMATHESIS_HOOKS": "tests.unit.gateway.edge.schemathesis_hooks"}
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=240)


@pytest.mark.slow
def test_generated_requests_get_described_answers(gateway: RunningGateway) -> None:
    ran = schemathesis(gateway, FILE, int(os.environ.get("SCHEMATHESIS_EXAMPLES", "50")))
    assert ran.returncode == 0, ran.stdout[-5000:] + ran.stderr[-2000:]
    assert "14 selected / 14 total" in ran.stdout
    assert "Fuzzing (in" in ran.stdout


@pytest.mark.slow
def test_an_answer_that_is_not_described_is_found(gateway: RunningGateway, tmp_path: Path) -> None:
    text = FILE.read_text()
    line = '        "422": {$ref: "#/components/responses/UnknownKey"}\n'
    assert text.count(line) == 1
    (tmp_path / "openapi.yaml").write_text(text.replace(line, ""))
    ran = schemathesis(gateway, tmp_path / "openapi.yaml", 20)
    assert ran.returncode == 1
    assert "Undocumented status code" in ran.stdout
