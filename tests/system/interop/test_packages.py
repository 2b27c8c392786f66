"""The JavaScript packages are pinned, each with its hash, and what the other tests here rest on can fail."""

import json
import re

import pytest

from tests.system.interop.support import FOLDER, check_arrivals, events


def test_pins() -> None:
    wanted = json.loads((FOLDER / "package.json").read_text())["dependencies"]
    lock = json.loads((FOLDER / "package-lock.json").read_text())["packages"]
    root = lock.pop("")
    assert root["dependencies"] == wanted
    for package, version in wanted.items():
        assert re.fullmatch(r"\d+\.\d+\.\d+", version), package
        # bhttp-js writes its version with a letter in front.
        assert lock[f"node_modules/{package}"]["version"].removeprefix("v") == version
    assert len(lock) >= len(wanted)
    for name, package in lock.items():
        assert package["integrity"].startswith("sha512-"), name
        assert "resolved" not in package, name


def test_a_stream_that_was_held_back_is_seen() -> None:
    """The checks that the streaming tests rest on can fail."""
    check_arrivals([{"at": 100.0 + 10 * i, "size": 512} for i in range(90)], 1000.0)
    for held in (
        [{"at": 955.0 + i / 2, "size": 512} for i in range(90)],
        [{"at": 10.0, "size": 512}, *({"at": 960.0 + i / 3, "size": 512} for i in range(90))],
        [{"at": 100.0, "size": 46_080}],
    ):
        with pytest.raises(AssertionError):
            check_arrivals(held, 1000.0)


def test_a_stream_that_is_not_one_is_seen() -> None:
    assert events('data: {"a": 1}\n\n:   \n\ndata: [DONE]\n\n') == [{"a": 1}]
    for broken in ('data: {"a": 1}\n\n', "data: {}\n:\n\ndata: [DONE]\n\n", 'x: {"a": 1}\n\ndata: [DONE]\n\n'):
        with pytest.raises((AssertionError, json.JSONDecodeError)):
            events(broken)
