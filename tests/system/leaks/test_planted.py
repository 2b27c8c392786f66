"""The hunt finds a leak of each kind, in each form, and takes no empty place for a clean one."""

import base64
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.system.leaks.places import Bytes, Files, NothingThere, Place, Processes, WholeTree, Written, hunt
from tests.system.leaks.search import Canary, Hit, Searcher

CANARY = Canary("prompt", b"prompt5f3a99c01b77", also=(b"17, 4, 2211, 90",))
SEARCHER = Searcher([CANARY])
SLEEP = [sys.executable, "-c", "import time; time.sleep(60)"]


@pytest.mark.parametrize(
    "form",
    [
        lambda secret: secret,
        lambda secret: secret.hex().encode(),
        lambda secret: base64.b64encode(secret),
        lambda secret: base64.b64encode(b"a" + secret + b"bc"),
        lambda secret: base64.urlsafe_b64encode(b"ab" + secret + b"c"),
        lambda secret: json.dumps({"messages": secret.decode()}).encode(),
        lambda secret: secret.decode().encode("utf-16"),
        lambda secret: repr(list(secret)).encode(),
        lambda secret: b"prompt_token_ids: [17, 4, 2211, 90]",
    ],
)
def test_each_form_is_found(form: Callable[[bytes], bytes]) -> None:
    assert SEARCHER.data("x", b"before " + form(CANARY.data) + b" after") == {Hit("x", "prompt")}


def test_key_bytes_are_found_in_each_form() -> None:
    key = os.urandom(32)
    searcher = Searcher([Canary("key", key)])
    for data in (key, key.hex().encode(), base64.b64encode(b"12" + key + b"3"), repr(key).encode()):
        assert searcher.data("x", data)
    assert not searcher.data("x", os.urandom(10_000))


def test_it_is_found_across_blocks_of_a_large_file(tmp_path: Path) -> None:
    path = tmp_path / "large"
    path.write_bytes(b"x" * ((1 << 20) - 5) + CANARY.data + b"y" * (1 << 20))
    assert SEARCHER.path(path) == {Hit(str(path), "prompt")}
    named = tmp_path / f"trace-{CANARY.data.decode()}.json"
    named.write_text("")
    assert SEARCHER.path(named)


def test_a_leak_in_any_file_of_the_tree_is_found(tmp_path: Path) -> None:
    started = time.time() - 1
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "cache").write_bytes(CANARY.data)
    assert hunt([WholeTree(started, roots=[tmp_path])], SEARCHER) == {Hit(str(tmp_path / "a/b/cache"), "prompt")}


def test_a_core_file_is_a_leak_whatever_it_holds(tmp_path: Path) -> None:
    (tmp_path / "core.77").write_bytes(b"ELF")
    assert hunt([WholeTree(0, roots=[tmp_path])], SEARCHER) == {Hit(str(tmp_path / "core.77"), "a core dump")}


@pytest.mark.slow
def test_the_whole_machine_is_searched(tmp_path: Path) -> None:
    started = time.time() - 1
    (tmp_path / "somewhere").write_bytes(CANARY.data)
    assert Hit(str(tmp_path / "somewhere"), "prompt") in hunt([WholeTree(started)], SEARCHER)


def test_a_leak_into_an_environment_or_a_command_line_is_found() -> None:
    planted = {"ASKED": CANARY.data.decode()}
    with_environment = subprocess.Popen(SLEEP, env={**os.environ, **planted})
    with_argument = subprocess.Popen([*SLEEP, CANARY.data.decode()])
    try:
        time.sleep(0.3)
        found = {hit.place for hit in hunt([Processes(frozenset({os.getpid()}))], SEARCHER)}
        assert f"/proc/{with_environment.pid}/environ" in found
        assert f"/proc/{with_argument.pid}/cmdline" in found
    finally:
        for process in (with_environment, with_argument):
            process.kill()
            process.wait()


def test_a_leak_into_a_file_without_a_name_is_found(tmp_path: Path) -> None:
    code = (
        "import os, sys, time\n"
        "f = open(sys.argv[1], 'wb'); f.write(bytes.fromhex(input())); f.flush(); os.unlink(sys.argv[1])\n"
        "print('x', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "gone")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(CANARY.data.hex().encode() + b"\n")
        process.stdin.flush()
        assert process.stdout.readline()
        assert any("gone" in hit.place for hit in hunt([Processes(frozenset({os.getpid()}))], SEARCHER))
    finally:
        process.kill()
        process.wait()


@pytest.mark.root
def test_a_file_that_was_written_and_removed_is_found(tmp_path: Path) -> None:
    written = Written(SEARCHER, frozenset(), roots=[tmp_path])
    try:
        written.start()
    except PermissionError as error:
        pytest.skip(f"fanotify is not permitted here: {error}")
    code = "import os, sys; p = sys.argv[1]; open(p, 'wb').write(bytes.fromhex(sys.argv[2])); os.unlink(p)"
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "brief"), CANARY.data.hex()], check=True)
    time.sleep(0.5)
    written.stop()
    assert any("brief" in hit.place for hit in hunt([written], SEARCHER))


@pytest.mark.parametrize(
    "place",
    [
        Bytes("traffic", lambda: b""),
        Files("logs", list),
        WholeTree(time.time() + 3600, roots=[Path(__file__).parent]),
        Written(SEARCHER, frozenset()),
    ],
)
def test_an_empty_place_is_an_error(place: Place) -> None:
    with pytest.raises(NothingThere):
        hunt([place], SEARCHER)


def test_an_empty_file_is_an_empty_place(tmp_path: Path) -> None:
    (tmp_path / "log").write_text("")
    with pytest.raises(NothingThere):
        hunt([Files("logs", lambda: [tmp_path / "log"])], SEARCHER)


def test_nothing_to_look_for_is_an_error() -> None:
    with pytest.raises(ValueError, match="nothing"):
        Searcher([])
