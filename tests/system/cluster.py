"""HAProxy with the shipped configuration before three replicas and a rogue one, and callers that load them.

Each replica is a process of its own with the real gateway, keys, channel and simulated evidence; their engines are
scripted and write down what they were asked.
"""

import datetime
import ipaddress
import os
import re
import shutil
import signal
import ssl
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from adytum.inference.core.config import parse
from tests.conftest import free_port
from tests.support import ROOT, config_text

SHIPPED = ROOT / "deploy" / "haproxy"
NAMES = ("alpha", "beta", "gamma")
ROGUE = "delta"
COMMON = "127.0.0.1"
# Every address of 127/8 is this machine's, so each replica has a host "name" without a change of the resolver.
HOSTS = {name: f"127.0.0.{11 + n}" for n, name in enumerate((*NAMES, ROGUE))}
CLIENTS = 8
CHAT = "/v1/chat/completions"
MODEL = "demo/llama-awq"


@dataclass
class Replica:
    """A replica's process and its files."""

    name: str
    folder: Path
    port: int
    sha256: str
    process: subprocess.Popen[bytes] | None = None

    @property
    def command(self) -> list[str]:
        return ["tests.system.replica", str(self.folder / "backend.toml"), str(self.folder)]

    def start(self) -> None:
        with (self.folder / "log").open("ab") as log:
            command = [sys.executable, "-m", *self.command]
            self.process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
        wait_for(self.ready, self.folder / "log", 300)

    def ready(self) -> bool:
        return get(f"http://127.0.0.1:{self.port}/readyz") == 200

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait()
        (self.folder / "engine.sock").unlink(missing_ok=True)

    @property
    def asked(self) -> list[str]:
        """What its engine was asked, in order."""
        path = self.folder / "asked"
        return path.read_text().splitlines() if path.exists() else []


class Whole(Replica):
    """A whole backend, started as an operator would: TLS of its own, and vLLM."""

    @property
    def command(self) -> list[str]:
        return ["adytum.inference", "serve", "--config", str(self.folder / "backend.toml")]

    def ready(self) -> bool:
        return get(f"https://127.0.0.1:{self.port}/readyz", ssl._create_unverified_context()) == 200

    @property
    def asked(self) -> list[str]:
        """A line for each request that its engine was asked."""
        path = self.folder / "records"
        return path.read_text().splitlines() if path.exists() else []


def configuration(folder: Path, name: str, port: int, *, whole: bool) -> str:
    """The demo's; a whole backend's has TLS, records and one model."""
    changes = {"replica": f'"{name}"'}
    if not whole:
        return config_text(port=port, runtime=folder, changes=changes)
    changes |= {"mode": '"generated"\nnames = ["localhost"]'}
    text = config_text(port=port, runtime=folder / "run", changes=changes)
    first, _, _ = text.partition('[[models]]\nid = "demo/gemma3"')
    return f'[metering]\nrecords = "{folder}/records"\n\n{first}'


@dataclass
class Cluster:
    """The replicas, the rogue one, and HAProxy before all of them."""

    replicas: dict[str, Replica]
    rogue: Replica
    port: int
    folder: Path

    @property
    def policy(self) -> Path:
        """One that accepts the three replicas' configurations."""
        text = (ROOT / "deploy" / "config" / "demo-policy.toml").read_text()
        names = ", ".join(f'"{name}"' for name in NAMES)
        digests = ", ".join(f'"{replica.sha256}"' for replica in self.replicas.values())
        for line, value in (("replica", names), ("configuration", digests)):
            text, count = re.subn(rf'(?m)^{line} = "any"$', f"{line} = [{value}]", text)
            assert count == 1
        path = self.folder / "policy.toml"
        path.write_text(text)
        return path

    def url(self, name: str | None = None) -> str:
        return f"https://{COMMON if name is None else HOSTS[name]}:{self.port}"

    @property
    def log(self) -> Path:
        return self.folder / "haproxy.log"

    def request(
        self, method: str, path: str, host: str | None = None, content: bytes = b"", **headers: str
    ) -> httpx2.Response:
        """A plain request to HAProxy, on the common name or a replica's; status 599 if nothing listens."""
        context = ssl.create_default_context(cafile=str(self.folder / "certificate.pem"))
        try:
            with httpx2.Client(verify=context, timeout=30) as client:
                return client.request(method, f"{self.url(host)}{path}", content=content, headers=headers)
        except httpx2.ConnectError:
            return httpx2.Response(599)

    def served(self, backend: str) -> list[list[str]]:
        """Method, path and status of the requests that HAProxy sent there, from its log."""
        lines = [line.split() for line in self.log.read_text().splitlines()]
        return [line[2:5] for line in lines if line and line[0] == backend]

    @contextmanager
    def proxy(self, *upstreams: str) -> Iterator[str]:
        """A real `adytum proxy` process. Yields its origin."""
        port = free_port()
        command = [sys.executable, "-m", "adytum.inference", "proxy", "--port", str(port), "--policy", str(self.policy)]
        for upstream in upstreams:
            command += ["--upstream", upstream]
        log_path = self.folder / f"proxy-{port}.log"
        environment = {**os.environ, "SSL_CERT_FILE": str(self.folder / "certificate.pem")}
        with log_path.open("wb") as log:
            process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, env=environment)
        try:
            wait_for(lambda: get(f"http://127.0.0.1:{port}/healthz") == 200, log_path)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(15)
            assert "Traceback" not in log_path.read_text()


def get(url: str, context: ssl.SSLContext | None = None) -> int:
    try:
        with urllib.request.urlopen(url, timeout=5, context=context) as answer:
            return int(answer.status)
    except OSError:
        return 0


def wait_for(done: Any, log: Path, seconds: float = 120, every: float = 0.05) -> None:
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline, log.read_text()[-2000:]
        time.sleep(every)


def certificate(path: Path) -> None:
    """A self-signed one for the addresses, and its key, in one file."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test")])
    now = datetime.datetime.now(datetime.UTC)
    addresses = [x509.IPAddress(ipaddress.ip_address(address)) for address in (COMMON, *HOSTS.values())]
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(minutes=5))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName(addresses), critical=False)
        .sign(key, hashes.SHA256())
    )
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    path.write_bytes(made.public_bytes(serialization.Encoding.PEM) + private)


def balancer(folder: Path, port: int, ports: dict[str, int], *, whole: bool) -> Path:
    """The shipped configuration with this test's addresses, and a rogue replica that an attacker added."""
    text = (SHIPPED / "haproxy.cfg").read_text()
    shutil.copy(SHIPPED / "lost.http", folder)
    (folder / "hosts.map").write_text("".join(f"{address} {name}\n" for name, address in HOSTS.items()))
    listen = ",".join(f"{address}:{port}" for address in (COMMON, *HOSTS.values()))
    text = text.replace("bind :443", f"bind {listen}").replace(
        "/etc/haproxy/llm.example.org.pem", f"{folder}/certificate.pem"
    )
    text = text.replace("/etc/haproxy/", f"{folder}/").replace("log /dev/log local0", "log stdout format raw local0")
    # Gateways alone have no TLS here; whole backends do.
    tls = " ssl verify none" if whole else ""
    for n, name in enumerate(NAMES):
        text, count = re.subn(rf"10\.0\.0\.{11 + n}:443 ssl verify none", f"127.0.0.1:{ports[name]}{tls}", text)
        assert count == 2, name
    text = re.sub(r"(?m)^    (user|group) haproxy$", "", text).replace("maxconn 8000", "maxconn 200")
    text += f"\nbackend replica_{ROGUE} from replica\n    server {ROGUE} 127.0.0.1:{ports[ROGUE]} check\n"
    path = folder / "haproxy.cfg"
    path.write_text(text)
    return path


@contextmanager
def running_cluster(folder: Path, *, whole: bool = False) -> Iterator[Cluster]:
    """All of it, until all are reached through HAProxy. `whole`: the three with vLLM; the rogue one has none."""
    certificate(folder / "certificate.pem")
    replicas: dict[str, Replica] = {}
    with ExitStack() as stack:
        for name in (*NAMES, ROGUE):
            own = folder / name
            own.mkdir()
            port = free_port()
            kind = Whole if whole and name != ROGUE else Replica
            text = configuration(own, name, port, whole=kind is Whole)
            (own / "backend.toml").write_text(text)
            replica = replicas[name] = kind(name, own, port, parse(text.encode()).sha256.hex())
            replica.start()
            stack.callback(lambda replica=replica: replica.kill())
        port = free_port()
        path = balancer(folder, port, {name: replica.port for name, replica in replicas.items()}, whole=whole)
        with (folder / "haproxy.log").open("wb") as log:
            process = subprocess.Popen(["haproxy", "-f", str(path)], stdout=log, stderr=subprocess.STDOUT)
        stack.callback(process.wait)
        stack.callback(process.terminate)
        rogue = replicas.pop(ROGUE)
        found = Cluster(replicas, rogue, port, folder)
        names = (*NAMES, ROGUE)
        wait_for(lambda: all(found.request("GET", "/readyz", name).status_code == 200 for name in names), found.log)
        yield found


def streams(name: str) -> bool:
    """Whether the request of this name wants a stream: by its caller's number."""
    return int(name.partition("-")[0]) % 2 == 0


@dataclass
class Load:
    """Callers that ask one request after the other, each with its own name. Every second one wants whole answers."""

    url: str
    body: dict[str, Any] = field(default_factory=lambda: {"events": 4, "gap": 0.04, "wait": 0.3})
    done: list[str] = field(default_factory=list)
    broken: list[tuple[str, str]] = field(default_factory=list)
    stop: threading.Event = field(default_factory=threading.Event)

    def caller(self, number: int) -> None:
        with httpx2.Client(timeout=30) as client:
            turn = 0
            while not self.stop.is_set():
                turn += 1
                name = f"{number}-{turn}-{os.urandom(4).hex()}"
                try:
                    self._ask(client, name)
                    self.done.append(name)
                except (httpx2.TransportError, AssertionError) as error:
                    self.broken.append((name, f"{type(error).__name__} {error}"))

    def _ask(self, client: httpx2.Client, name: str) -> None:
        body = {"model": MODEL, "stream": streams(name), "messages": [{"role": "user", "content": name}], **self.body}
        answer = client.post(f"{self.url}{CHAT}", json=body)
        assert answer.status_code == 200, f"status {answer.status_code}: {answer.text}"
        if streams(name):
            events = answer.content.count(b"data: {")
            assert events == self.body.get("events", events)
            assert answer.content.count(b"data: [DONE]") == 1, answer.text[-300:]
        else:
            # The scripted engine says the request's name again.
            assert answer.json().get("said", name) == name

    @contextmanager
    def running(self) -> Iterator[None]:
        threads = [threading.Thread(target=self.caller, args=(n,)) for n in range(CLIENTS)]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            self.stop.set()
            for thread in threads:
                thread.join(40)
