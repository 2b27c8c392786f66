"""The command line, in this process and once as a program; `fetch` against real HTTP servers on loopback."""

import contextlib
import http.server
import io
import json
import subprocess
import sys
import threading
import urllib.parse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from adytum.attestation.__main__ import main
from adytum.attestation.collect.rounds import Collector, NoEndorsements, NoGpus
from adytum.attestation.core.limits import LIMITS
from adytum.attestation.policy.policy import Policy
from adytum.attestation.simulated.device import SimulatedCpu
from tests.unit.attestation.support import NONCE, NONCES, ROOT, OddCpu, document, with_claims

AT = "2026-11-23T02:13:20Z"
"""`support.NOW`."""


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Runs a command in this process, which saves a second for each."""
    out, err = io.StringIO(), io.StringIO()
    words = [str(argument) for argument in arguments]
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = main(words)
        except SystemExit as ended:  # argparse, about usage.
            status = int(ended.code or 0)
    return subprocess.CompletedProcess(words, status, out.getvalue(), err.getvalue())


def run_program(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Runs a command as its user does."""
    return subprocess.run(
        [sys.executable, "-m", "adytum.attestation", *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.fixture
def evidence(tmp_path: Path) -> Path:
    path = tmp_path / "evidence.json"
    path.write_bytes(document())
    return path


@pytest.fixture
def policy(tmp_path: Path) -> Path:
    path = tmp_path / "policy.toml"
    path.write_text(Policy.accept_simulated().to_toml())
    return path


def verdict(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_verify(evidence: Path, policy: Path) -> None:
    done = run("verify", evidence, "--nonce", NONCE.hex(), "--policy", policy, "--time", AT)
    assert (done.returncode, done.stderr) == (0, "")
    found = verdict(done)
    assert (found["result"], found["code"]) == ("accepted", "accepted")
    assert [check["code"] for check in found["checks"]] == [
        "document.structure", "nonce", "simulated.report", "binding.report_data", "gpu.mode", "policy",
    ]  # fmt: skip
    assert found["evidence"]["replica"] == "alpha"
    assert found["evidence"]["models"][0] == {
        "id": "demo/llama", "task": "generate", "aliases": ["latest", "llama"], "weights_root": "11" * 32,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("nonce", "status"), [(NONCE, 0), (NONCES[0], 10), (b"a", 2)], ids=["its nonce", "another nonce", "short nonce"]
)
def test_the_program_says_the_same(evidence: Path, policy: Path, nonce: bytes, status: int) -> None:
    arguments = ("verify", evidence, "--nonce", nonce.hex(), "--policy", policy, "--time", AT)
    program, here = run_program(*arguments), run(*arguments)
    assert program.returncode == status
    assert (program.returncode, program.stdout, program.stderr) == (here.returncode, here.stdout, here.stderr)


def test_verify_refuses_with_step_code_and_status(evidence: Path, policy: Path) -> None:
    cases = [
        (("--nonce", NONCES[0].hex(), "--time", AT), "nonce.other", 1),
        (("--nonce", NONCE.hex(), "--time", AT, "--simulated-key", "00" * 32), "simulated.report", 2),
        (("--nonce", NONCE.hex(), "--time", "2026-11-23T02:30:00+00:00"), "policy.maximum_age_s", 5),
        (("--nonce", NONCE.hex(), "--time", "2020-01-01T00:00:00Z"), "simulated.report", 2),
    ]
    for arguments, code, passed in cases:
        done = run("verify", evidence, "--policy", policy, *arguments)
        found = verdict(done)
        assert (done.returncode, found["result"], found["code"]) == (10, "rejected", code)
        assert found["evidence"] == {}
        assert len(found["checks"]) == passed
        assert f"REJECTED ({code})" in done.stderr
        assert "Send nothing to this backend" in done.stderr
    evidence.write_bytes(evidence.read_bytes() + b"\n")
    done = run("verify", evidence, "--nonce", NONCE.hex(), "--policy", policy, "--time", AT)
    assert (done.returncode, verdict(done)["code"]) == (30, "malformed")
    evidence.write_bytes(document(cpu=OddCpu(provider="sgx")))
    done = run("verify", evidence, "--nonce", NONCE.hex(), "--policy", policy, "--time", AT)
    assert (done.returncode, verdict(done)["code"]) == (20, "unsupported")


def test_verify_refuses_by_policy_and_says_what_to_write(evidence: Path, policy: Path) -> None:
    policy.write_text(Policy.default(frozenset({bytes(48)})).to_toml())
    done = run("verify", evidence, "--nonce", NONCE.hex(), "--policy", policy, "--time", AT)
    assert (done.returncode, verdict(done)["code"]) == (10, "policy.cpu")
    assert 'cpu = ["simulated"]' in done.stderr


def test_verify_judges_now_unless_told(evidence: Path, policy: Path) -> None:
    old = Path(evidence.parent / "old.json")
    past = lambda: 1_600_000_000.0  # noqa: E731 - a clock
    claims = with_claims(issued_at=1_600_000_000, keys_expire_at=1_600_009_000)
    old.write_bytes(document(claims, SimulatedCpu(clock=past)))
    assert run("verify", old, "--nonce", NONCE.hex(), "--policy", policy).returncode == 10
    at = "2020-09-13T12:26:40Z"
    assert run("verify", old, "--nonce", NONCE.hex(), "--policy", policy, "--time", at).returncode == 0


def test_usage(evidence: Path, policy: Path, tmp_path: Path) -> None:
    nonce = ("--nonce", NONCE.hex())
    bad_policy = tmp_path / "bad.toml"
    bad_policy.write_text(policy.read_text().replace("padding =", "paddings ="))
    for arguments, words in (
        ((), "usage"),
        (("judge",), "invalid choice"),
        (("verify", evidence, *nonce), "--policy"),
        (("verify", evidence, "--policy", policy), "--nonce"),
        (("verify", evidence, "--nonce", "ab", "--policy", policy), "64 hexadecimal digits"),
        (("verify", evidence, "--nonce", NONCE.hex()[:-1] + " ", "--policy", policy), "64 hexadecimal digits"),
        (("verify", evidence, *nonce, "--policy", policy, "--time", "2026-11-23T02:13:20"), "time zone"),
        (("verify", evidence, *nonce, "--policy", policy, "--time", "noon"), "2026"),
        (("verify", tmp_path / "absent", *nonce, "--policy", policy), "cannot be read"),
        (("verify", evidence, *nonce, "--policy", tmp_path / "absent"), "cannot be read"),
        (("verify", evidence, *nonce, "--policy", bad_policy), "did you mean 'padding'?"),
        (("fetch", "file:///etc/hostname", "--policy", policy), "https://host:port"),
        (("fetch", "localhost", "--policy", policy), "https://host:port"),
        (("fetch", "http://[", "--policy", policy), "is not an address"),
    ):
        done = run(*arguments)
        assert (done.returncode, done.stdout) == (2, ""), (arguments, done.stderr)
        assert words in done.stderr
        assert "Traceback" not in done.stderr


def test_show_says_what_holds_and_what_was_not_checked(evidence: Path) -> None:
    evidence.write_bytes(document(with_claims(keys_expire_at=2**53 - 1)))
    done = run("show", evidence, "--time", AT)
    assert (done.returncode, done.stderr) == (0, "")
    assert "number 4 of the 7" in done.stdout
    assert "\u2713 the report is signed by a simulated CPU, which proves nothing about hardware" in done.stdout
    assert "not checked: whether you accept all this" in done.stdout
    assert "\u2717" not in done.stdout
    assert "\x1b" not in done.stdout, "colour is for terminals"
    evidence.write_bytes(document(with_claims(cc_mode="devtools")))
    done = run("show", evidence, "--time", AT)
    assert done.returncode == 10
    assert "\u2717 the claims state the GPUs' mode devtools" in done.stdout


@pytest.mark.parametrize(
    ("data", "status", "words"),
    [
        (b"{}", 30, "kind is unknown"),
        (b"", 0, ""),
        (b"\x02" + bytes(1183), 30, "signature algorithm"),
        (b"HCLA", 30, ""),
        (b"\x11\xe0", 30, "request"),
        (b"<a/>", 30, "not a software identity"),
        (b"-----BEGIN CERTIFICATE-----", 30, "certificates"),
        (b"-----BEGIN X509 CRL-----", 30, "revoked"),
        (b"\x04\x00\x02\x00\x81\x00\x00\x00", 30, ""),
        (b'{"not_checked":1}', 30, "verdict"),
        (Policy.accept_simulated().to_toml().encode(), 0, "every claim is decided"),
        (b"paddin = 1", 30, "unknown key"),
        (bytes(range(256)), 30, "kind is unknown"),
    ],
)
def test_show_takes_anything(data: bytes, status: int, words: str, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(data)
    done = run("show", path)
    if data:
        assert done.returncode == status, done.stdout
    assert words in done.stdout
    assert "Traceback" not in done.stderr


def test_show_reads_a_verdict_again(evidence: Path, policy: Path, tmp_path: Path) -> None:
    for arguments, status in (((), 0), (("--simulated-key", "00" * 32), 10)):
        path = tmp_path / "verdict.json"
        done = run("verify", evidence, "--nonce", NONCE.hex(), "--policy", policy, "--time", AT, *arguments)
        path.write_text(done.stdout)
        shown = run("show", path)
        assert (done.returncode, shown.returncode) == (status, status)
        assert "\u2713 the document follows its format" in shown.stdout


Handle = Callable[[http.server.BaseHTTPRequestHandler], None]


@contextmanager
def serving(handle: Handle) -> Iterator[str]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            handle(self)

        def log_message(self, *arguments: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def answer(handler: http.server.BaseHTTPRequestHandler, body: bytes, status: int = 200) -> None:
    handler.send_response(status)
    handler.end_headers()
    handler.wfile.write(body)


def attested(handler: http.server.BaseHTTPRequestHandler) -> None:
    import time

    url = urllib.parse.urlsplit(handler.path)
    assert url.path == "/.well-known/attestation"
    nonce = bytes.fromhex(urllib.parse.parse_qs(url.query)["nonce"][0])
    now = int(time.time())
    claims = with_claims(issued_at=now, keys_expire_at=now + 60)
    answer(handler, Collector(SimulatedCpu(), NoGpus(), NoEndorsements()).collect(claims, [nonce]).document(nonce))


def test_fetch(policy: Path, tmp_path: Path) -> None:
    out = tmp_path / "fetched.json"
    with serving(attested) as url:
        for address in (url, f"{url}/"):
            done = run("fetch", address, "--policy", policy, "--out", out)
            assert (done.returncode, done.stderr) == (0, "")
            assert verdict(done)["result"] == "accepted"
    nonce = verdict(done)["evidence"]["nonce"]
    again = run("verify", out, "--nonce", nonce, "--policy", policy)
    assert again.returncode == 0
    assert run("verify", out, "--nonce", NONCE.hex(), "--policy", policy).returncode == 10


def test_fetch_refuses_a_document_that_was_made_before(policy: Path, tmp_path: Path) -> None:
    out = tmp_path / "fetched.json"
    with serving(lambda handler: answer(handler, document())) as url:
        done = run("fetch", url, "--policy", policy, "--out", out)
    assert (done.returncode, verdict(done)["code"]) == (10, "nonce.other")
    assert out.exists()


def test_fetch_refuses_what_is_no_evidence(policy: Path) -> None:
    def redirect(handler: http.server.BaseHTTPRequestHandler) -> None:
        handler.send_response(302)
        handler.send_header("Location", "/elsewhere" if handler.path != "/elsewhere" else "/")
        handler.end_headers()

    def endless(handler: http.server.BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.end_headers()
        try:
            for _ in range(2 * LIMITS.document // 65536):
                handler.wfile.write(b" " * 65536)
        except OSError:
            pass

    cases: list[tuple[Handle, str]] = [
        (redirect, "status 302"),
        (endless, "larger than"),
        (lambda handler: answer(handler, b"", 503), "status 503"),
        (lambda handler: handler.wfile.write(b"nonsense\r\n\r\n"), "no evidence came"),
        (lambda handler: None, "no evidence came"),
    ]
    for handle, words in cases:
        with serving(handle) as url:
            done = run("fetch", url, "--policy", policy)
        assert (done.returncode, done.stdout) == (2, ""), words
        assert words in done.stderr
        assert "Traceback" not in done.stderr
    done = run("fetch", url, "--policy", policy)  # Nobody listens there any more.
    assert (done.returncode, done.stdout) == (2, "")
    for body in (b"<html>", b""):
        with serving(lambda handler, body=body: answer(handler, body)) as url:  # type: ignore[misc]
            done = run("fetch", url, "--policy", policy)
        assert (done.returncode, verdict(done)["code"]) == (30, "malformed")


def test_fetch_with_a_bad_policy_asks_nobody(policy: Path) -> None:
    asked: list[str] = []
    policy.write_text("")
    with serving(lambda handler: asked.append(handler.path)) as url:
        assert run("fetch", url, "--policy", policy).returncode == 2
    assert asked == []
