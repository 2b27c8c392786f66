"""What a backend's process shows of itself, and where it refuses to start."""

import os
import re
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from adytum.inference.backend.hygiene import no_swap
from adytum.inference.core.lifecycle import StepFailed

SECRET = "environment-canary-91d2"
PROGRAM = """
import sys, time
from adytum.inference.backend import hygiene
hygiene.clean_environment()
hygiene.no_core_dumps()
secret = "memory-canary-" + "5512"
print("ready", flush=True)
time.sleep(60)
"""


def started() -> subprocess.Popen[bytes]:
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM],
        stdout=subprocess.PIPE,
        env={**os.environ, "AWS_SECRET_ACCESS_KEY": SECRET},
        # What an operator's shell may have set, with a core dump of the test's own allowed.
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_CORE, (resource.RLIM_INFINITY,) * 2),
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    return process


def test_nothing_of_the_environment_it_was_started_with_can_be_read_afterwards() -> None:
    process = started()
    try:
        block = Path(f"/proc/{process.pid}/environ").read_bytes()
        assert SECRET.encode() not in block
        assert b"PATH=" in block
    finally:
        process.kill()
        process.wait()


def test_a_crash_leaves_no_core(tmp_path: Path) -> None:
    process = started()
    limits = Path(f"/proc/{process.pid}/limits").read_text()
    core = next(line for line in limits.splitlines() if line.startswith("Max core file size"))
    assert core.split()[4:6] == ["0", "0"]
    process.send_signal(signal.SIGSEGV)
    # The kernel says in the status whether it wrote one, to a file or into a pipe.
    _, status = os.waitpid(process.pid, 0)
    process.returncode = -os.WTERMSIG(status)
    assert os.WTERMSIG(status) == signal.SIGSEGV
    assert not os.WCOREDUMP(status)


SWAPS = "Filename\t\t\t\tType\t\tSize\t\tUsed\t\tPriority\n"


def test_a_machine_that_swaps_to_a_disk_is_refused_unless_that_is_allowed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    swaps = tmp_path / "swaps"
    swaps.write_text(SWAPS)
    no_swap(allowed=False, swaps=swaps)
    swaps.write_text(SWAPS + "/dev/zram0 partition 1000 0 100\n")
    no_swap(allowed=False, swaps=swaps)
    swaps.write_text(SWAPS + "/dev/zram0 partition 1000 0 100\n/swap.img file 1000 0 -2\n")
    with pytest.raises(StepFailed, match=r"/swap\.img.*swapoff"):
        no_swap(allowed=False, swaps=swaps)
    no_swap(allowed=True, swaps=swaps)
    assert "/swap.img" in caplog.text


def test_where_nobody_can_tell_it_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StepFailed, match="cannot be read"):
        no_swap(allowed=True, swaps=tmp_path / "none")


ERASED = """
import ctypes, gc, re
from adytum.inference.channel.hpke import KemId
from adytum.inference.gateway.keys import KeyRing

def wiped(secret):
    masked = bytes(b ^ 0x5A for b in secret)
    ctypes.memset(id(secret) + bytes.__basicsize__ - 1, 0, len(secret))
    return masked

def count(masked):
    needle = bytearray(b ^ 0x5A for b in masked)
    found = 0
    with open("/proc/self/maps") as maps, open("/proc/self/mem", "rb", 0) as memory:
        for line in maps:
            low, high, flags = re.match(r"([0-9a-f]+)-([0-9a-f]+) (\\S+)", line).groups()
            if "r" not in flags or "[v" in line:
                continue
            try:
                memory.seek(int(low, 16))
                data = memory.read(int(high, 16) - int(low, 16))
            except OSError:
                continue
            found += data.count(needle)
    # The needle itself is found too, once: it shows that the search works.
    return found

now = [0.0]
ring = KeyRing(lambda: now[0], 100, 10)
masks = []
for _, key in ring._generations[0].keys.values():
    if key.kem is KemId.X25519:
        masks.append(wiped(key._key.private_bytes_raw()))
    else:
        masks += [wiped(key._x25519.private_bytes_raw()), wiped(key._mlkem.private_bytes_raw())]
del key
before = [count(mask) for mask in masks]
now[0] = 1000.0
ring.refresh()
gc.collect()
print(before, [count(mask) for mask in masks])
"""


def test_the_private_keys_of_a_generation_that_expired_are_nowhere_in_memory() -> None:
    done = subprocess.run([sys.executable, "-c", ERASED], capture_output=True, text=True, check=True, timeout=120)
    before, after = ([int(n) for n in found.split(",")] for found in re.findall(r"\[([^]]*)\]", done.stdout))
    assert after == [1, 1, 1], "only what was searched for"
    # OpenSSL keeps an ML-KEM key expanded, so that its seed is not found while it lives either.
    assert before[0] > 1
    assert before[2] > 1
