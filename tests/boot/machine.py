"""A virtual machine of the image, in QEMU with software emulation."""

import json
import os
import shutil
import ssl
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import click
import httpx2
import pytest

from adytum.attestation.policy.policy import Policy
from adytum.inference.client.transport import AdytumTransport
from tests.conftest import free_port
from tests.support import ROOT

IMAGE = Path(os.environ.get("ADYTUM_IMAGE", ROOT / "build" / "image"))
MODELS = ("llama", "gemma", "e5")
FIRMWARE = Path("/usr/share/OVMF/OVMF_CODE_4M.fd")
# QEMU 7.2 emulates 5-level paging and CMPXCHG16B wrongly for Linux 6.12, which crashes in its first second with them.
PROCESSOR = "max,la57=off,cx16=off"


@dataclass
class Machine:
    """A running machine: its console so far, and the loopback port that is its 443."""

    process: subprocess.Popen[bytes]
    console: Path
    port: int
    began: float = field(default_factory=time.monotonic)

    def said(self) -> str:
        return self.console.read_text(errors="replace") if self.console.exists() else ""

    def until(self, text: str, seconds: float) -> float:
        """Seconds since the start when the console had `text`. Fails if it never has."""
        while text not in self.said():
            assert self.process.poll() is None, f"the machine ended:\n{self.said()[-3000:]}"
            assert time.monotonic() - self.began < seconds, f"{text!r} not within {seconds} s:\n{self.said()[-3000:]}"
            time.sleep(0.2)
        return time.monotonic() - self.began

    def ends(self, seconds: float) -> str:
        """The console of a machine that stops by itself."""
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            pytest.fail(f"still running after {seconds} s:\n{self.said()[-3000:]}")
        return self.said()


def tell(text: str) -> None:
    """For the record of a run (`pytest -s`)."""
    click.echo(text)


def models() -> dict[str, Path]:
    """The models' images, by the serial number of their disk."""
    return {name: IMAGE / f"{name}.img" for name in MODELS}


def command_line() -> str:
    return (IMAGE / "cmdline").read_text()


@contextmanager
def running(
    folder: Path,
    *,
    disks: Mapping[str, Path] | None = None,
    append: str | None = None,
    efi: bool = False,
    memory: int = 10240,
    image: Path = IMAGE,
) -> Iterator[Machine]:
    """Starts it; kills it at the end. `efi`: through the firmware, from the one EFI program. `memory`: in MiB."""
    port = free_port()
    console = folder / "console.log"
    boot = ["-kernel", str(image / "adytum.efi")] if efi else ["-kernel", str(image / "vmlinuz")]
    if efi:
        boot += ["-drive", f"if=pflash,format=raw,readonly=on,file={FIRMWARE}"]
    else:
        line = (image / "cmdline").read_text() if append is None else append
        boot += ["-initrd", str(image / "initrd.img"), "-append", line]
    for name, path in ({"root": image / "root.img", **models()} if disks is None else disks).items():
        boot += ["-drive", f"if=none,id={name},file={path},format=raw,readonly=on"]
        boot += ["-device", f"virtio-blk-pci,drive={name},serial={name}"]
    command = [
        *("qemu-system-x86_64", "-machine", "q35", "-accel", "tcg,thread=multi", "-cpu", PROCESSOR),
        *("-smp", "2", "-m", str(memory), "-nodefaults", "-display", "none", "-monitor", "none", "-no-reboot"),
        *("-serial", f"file:{console}", "-device", "virtio-rng-pci"),
        # `restrict`: the machine reaches nothing, and the test reaches its one port.
        *("-netdev", f"user,id=net,restrict=on,hostfwd=tcp:127.0.0.1:{port}-:443"),
        *("-device", "virtio-net-pci,netdev=net,romfile="),
        *boot,
    ]
    with (folder / "qemu.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    try:
        yield Machine(process, console, port)
    finally:
        if process.poll() is None:
            process.kill()
        process.wait(30)


def flipped(source: Path, target: Path, place: int) -> Path:
    """A copy in which one bit of the byte at `place` is another."""
    shutil.copyfile(source, target)
    with target.open("r+b") as file:
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ 1]))
    return target


def data_size(name: str) -> int:
    """Of a model's image, without the hash tree."""
    manifest = json.loads((IMAGE / f"{name}.img.manifest.json").read_text())
    return int(manifest["verity"]["data_size"])


def ready(url: str, context: object) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/readyz", timeout=30, context=context) as answer:  # type: ignore[arg-type]
            return bool(answer.status == 200)
    except OSError:
        return False


def serving(machine: Machine, folder: Path, seconds: float) -> tuple[str, Path, ssl.SSLContext]:
    """Its URL, its certificate's file and a context that trusts it, once it serves."""
    url = f"https://localhost:{machine.port}"
    # TLS carries the seal and is not relied upon: a client may compare its key with the evidence.
    certificate = folder / "certificate.pem"
    while not certificate.exists():
        try:
            found = ssl.get_server_certificate(("127.0.0.1", machine.port), timeout=60)
        except OSError:
            _wait(machine, seconds)
        else:
            certificate.write_text(found)
    tell(f"the gateway is up after {time.monotonic() - machine.began:.0f} s")
    context = ssl.create_default_context(cafile=str(certificate))
    while not ready(url, context):
        _wait(machine, seconds)
    tell(f"SERVING after {time.monotonic() - machine.began:.0f} s")
    return url, certificate, context


def _wait(machine: Machine, seconds: float) -> None:
    assert machine.process.poll() is None, machine.said()[-3000:]
    assert time.monotonic() - machine.began < seconds, machine.said()[-3000:]
    time.sleep(2)


def attested(url: str, certificate: Path, context: ssl.SSLContext, folder: Path) -> AdytumTransport:
    """What seals to this machine alone: a policy of what it shows now, made with the command that a client has."""
    policy = folder / "policy.toml"
    environment = {**os.environ, "SSL_CERT_FILE": str(certificate)}
    command = [sys.executable, "-m", "adytum.inference", "policy", "init", "--upstream", url, "--out", str(policy)]
    made = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    assert "simulated" in made.stderr
    return AdytumTransport(upstream=url, policy=Policy.from_toml(policy), inner=httpx2.HTTPTransport(verify=context))
