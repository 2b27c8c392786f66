"""The fake driver behind the fake `libnvidia-ml.so.1` (nvml.c): GPUs whose reports a fake NVIDIA's keys sign.

The library is loaded by the real nvidia-ml-py, here by its soname, in other processes through LD_LIBRARY_PATH.
"""

import atexit
import ctypes
import functools
import os
import shutil
import socketserver
import struct
import subprocess
import tempfile
import threading
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

import pytest
from cryptography.hazmat.primitives.serialization import Encoding

from tests.unit.attestation.nvidia.authority import Authority, FakeGpu

SOURCE = Path(__file__).with_name("nvml.c")
SONAME = "libnvidia-ml.so.1"
VARIABLE = "ADYTUM_FAKE_NVML"
ARCHITECTURES = {"hopper": 9, "blackwell": 10}
NAME = "NVIDIA H100 80GB HBM3"


@functools.cache
def folder(*, settings: bool = True) -> Path:
    """A folder with the library, for LD_LIBRARY_PATH. Without `settings` it is an older driver's."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler, which the stand-in for NVIDIA's library needs")
    made = Path(tempfile.mkdtemp(prefix="fake-nvml-"))
    atexit.register(shutil.rmtree, made, ignore_errors=True)
    options = ["-shared", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror", f"-Wl,-soname,{SONAME}"]
    options += [] if settings else ["-DWITHOUT_SETTINGS"]
    subprocess.run([compiler, *options, "-o", str(made / SONAME), str(SOURCE)], check=True)
    return made


@functools.cache
def load() -> ctypes.CDLL:
    """Loads the library, so that the dynamic linker finds it by its name in this process from now on."""
    return ctypes.CDLL(str(folder() / SONAME))


@dataclass
class Driver:
    """A driver's state. `codes`: NVML's return code by command. `results`: bytes instead of the true ones. `sizes`:
    what the library says of how many they are."""

    gpus: list[FakeGpu]
    environment: int = 2
    cc: int = 1
    devtools: int = 0
    multi_gpu: int = 0
    ready: int = 0
    ready_sticks: bool = True
    codes: dict[str, int] = field(default_factory=dict)
    results: dict[str, bytes] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, authority: Authority, count: int = 1) -> Self:
        return cls([FakeGpu(authority) for _ in range(count)])

    def __enter__(self) -> Self:
        self._folder = tempfile.TemporaryDirectory(prefix="nvml-")
        path = f"{self._folder.name}/s"
        driver = self

        class Handler(socketserver.StreamRequestHandler):
            def handle(self) -> None:
                self.wfile.write(driver.answer(self.rfile.read().decode()).encode())

        self._server = socketserver.ThreadingUnixStreamServer(path, Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()
        os.environ[VARIABLE] = path
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        del os.environ[VARIABLE]
        self._server.shutdown()
        self._server.server_close()
        self._folder.cleanup()

    def environ(self, *, settings: bool = True) -> dict[str, str]:
        """For another process that is to find this driver."""
        return {VARIABLE: os.environ[VARIABLE], "LD_LIBRARY_PATH": str(folder(settings=settings))}

    def answer(self, line: str) -> str:
        self.asked.append(line)
        command, *arguments = line.split()
        code = self.codes.get(command, 0)
        if code:
            return f"{code} "
        result = self.results[command] if command in self.results else self._result(command, arguments)
        return f"0 {result.hex()}" + (f",{self.sizes[command]}" if command in self.sizes else "")

    def _result(self, command: str, arguments: list[str]) -> bytes:
        match command:
            case "init" | "shutdown" | "handle":
                return b""
            case "driver":
                return self.gpus[0].driver_version.encode()
            case "count":
                return struct.pack("=I", len(self.gpus))
            case "state":
                return struct.pack("=3I", self.environment, self.cc, self.devtools)
            case "settings":
                return struct.pack("=4I", self.environment, self.cc, self.devtools, self.multi_gpu)
            case "ready":
                return struct.pack("=I", self.ready)
            case "set-ready":
                if self.ready_sticks:
                    self.ready = int(arguments[0])
                return b""
        gpu = self.gpus[int(arguments[0])]
        match command:
            case "name":
                return NAME.encode()
            case "vbios":
                return gpu.vbios_version.encode()
            case "architecture":
                return struct.pack("=I", ARCHITECTURES[gpu.architecture])
            case "memory":
                return struct.pack("=2Q", 80 << 20, 1 << 10)
            case "certificates":
                return b"".join(certificate.public_bytes(Encoding.PEM) for certificate in gpu.certificates)
            case "report":
                return gpu.report(bytes.fromhex(arguments[1]))
        raise AssertionError(f"the library asks {command}")
