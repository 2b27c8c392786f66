"""Records of usage: on the disk before an answer ends, each once, whatever ends the process."""

import asyncio
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from adytum.inference.core.lifecycle import StepFailed
from adytum.inference.gateway.accounting.metering import Charge, MeteringFailed, Records, rounded

CHARGE = Charge("0123456789ab", "demo/llama", "/v1/chat/completions", "ok", 17, 16, 1)
WRITER = """
import asyncio, sys
from pathlib import Path
from adytum.inference.gateway.accounting.metering import Charge, Records

async def main():
    records = Records(Path(sys.argv[1]), 1)
    async def one(n):
        await records.write(Charge("c", "m", "r", "ok", n, 0, 0))
        print(n, flush=True)
    n = 0
    while True:
        await asyncio.gather(*(one(n + i) for i in range(16)))
        n += 16

asyncio.run(main())
"""


def lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def write(path: Path, *charges: Charge, bucket: int = 16) -> None:
    records = Records(path, bucket, lambda: 1_800_000_000.0)

    async def all_of_them() -> None:
        await asyncio.gather(*map(records.write, charges))

    asyncio.run(all_of_them())
    records.close()


def test_a_line_has_these_fields_and_no_finer_numbers(tmp_path: Path) -> None:
    write(tmp_path / "usage.jsonl", CHARGE)
    (line,) = lines(tmp_path / "usage.jsonl")
    assert len(str(line.pop("id"))) == 16
    assert line == {
        "time": "2027-01-15T08:00Z",
        "caller": "0123456789ab",
        "model": "demo/llama",
        "route": "/v1/chat/completions",
        "outcome": "ok",
        "prompt_tokens": 32,
        "cached_tokens": 16,
        "completion_tokens": 16,
    }
    assert (tmp_path / "usage.jsonl").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(("tokens", "written"), [(0, 0), (1, 16), (16, 16), (17, 32)])
def test_tokens_are_rounded_up(tokens: int, written: int) -> None:
    assert rounded(tokens, 16) == written


def test_no_finished_request_is_missing_or_twice_after_a_kill(tmp_path: Path) -> None:
    """What the writer printed had ended; SIGKILL comes at once after some hundred of them."""
    path = tmp_path / "usage.jsonl"
    for _ in range(3):
        process = subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE)
        assert process.stdout is not None
        ended = [process.stdout.readline() for _ in range(300)]
        os.kill(process.pid, signal.SIGKILL)
        ended += process.stdout.readlines()
        process.wait()
        whole = [int(line) for line in ended if line.endswith(b"\n")]
        assert len(whole) >= 300
        write(tmp_path / "usage.jsonl", CHARGE, bucket=1)
        found = lines(path)
        counted = [line["prompt_tokens"] for line in found if line["caller"] == "c"]
        assert not set(whole) - set(counted)
        assert len(counted) == len(set(counted))
        assert len({line["id"] for line in found}) == len(found)
        path.unlink()


def test_a_line_that_was_cut_goes_and_the_others_stay(tmp_path: Path) -> None:
    path = tmp_path / "usage.jsonl"
    write(path, CHARGE, CHARGE)
    before = path.read_bytes()
    path.write_bytes(before + before[:40])
    write(path, CHARGE)
    assert path.read_bytes().startswith(before)
    assert len(lines(path)) == 3


def test_a_file_of_one_line_that_was_cut_is_empty_again(tmp_path: Path) -> None:
    path = tmp_path / "usage.jsonl"
    path.write_bytes(b"x" * 200_000)
    write(path)
    assert path.read_bytes() == b""


def test_a_file_that_was_moved_away_is_followed_by_a_new_one(tmp_path: Path) -> None:
    path = tmp_path / "usage.jsonl"
    records = Records(path, 1)
    asyncio.run(records.write(CHARGE))
    path.rename(tmp_path / "old.jsonl")
    asyncio.run(records.write(CHARGE))
    records.close()
    assert len(lines(path)) == len(lines(tmp_path / "old.jsonl")) == 1


def test_two_backends_do_not_write_one_file(tmp_path: Path) -> None:
    records = Records(tmp_path / "usage.jsonl", 1)
    with pytest.raises(StepFailed, match="another backend"):
        Records(tmp_path / "usage.jsonl", 1)
    records.close()


def test_a_disk_that_is_full_fails_the_answer_and_leaves_no_half_line(tmp_path: Path) -> None:
    path = tmp_path / "usage.jsonl"
    code = (
        "import asyncio, resource, signal, sys\n"
        "from pathlib import Path\n"
        "from adytum.inference.gateway.accounting.metering import *\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (500, 500))\n"
        "records = Records(Path(sys.argv[1]), 1)\n"
        "charge = Charge('c', 'm', 'r', 'ok', 1, 0, 0)\n"
        "n = 0\n"
        "try:\n"
        "    while n < 100:\n"
        "        asyncio.run(records.write(charge)); n += 1\n"
        "except MeteringFailed:\n"
        "    print(n)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    assert 0 < int(done.stdout) < 100
    assert len(lines(path)) == int(done.stdout)


def test_a_place_that_cannot_be_written_is_said_at_start(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StepFailed, match=r"metering\.records"):
        Records(tmp_path / "file" / "usage.jsonl", 1)


def test_the_error_says_nothing() -> None:
    assert str(MeteringFailed()) == ""
