"""The confidential-computing table: what it sets and refuses, held against the installed vLLM's own parser."""

import json
import subprocess
from pathlib import Path

import pytest

from adytum.inference.engine.run.cc_settings import (
    FORBIDDEN,
    VARIABLES,
    ForbiddenFlag,
    confidential,
    environment,
    options,
    refuse,
)

# Prints each argument's names, and what the parser makes of every line of standard input, a JSON list.
PARSER = """
import json, sys
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser
parser = make_arg_parser(FlexibleArgumentParser())
names = sorted(name for action in parser._actions for name in action.option_strings)
parsed = []
for line in sys.stdin:
    try:
        found = parser.parse_args(json.loads(line))
        graphs = str((found.compilation_config or {}).cudagraph_mode)
        level = int(found.optimization_level)
        parsed.append([found.enforce_eager, found.enable_sleep_mode, found.cpu_offload_gb, graphs, level])
    except SystemExit:
        parsed.append(None)
print("RESULT" + json.dumps([names, parsed]))
"""

# What makes each row refuse, where anything but a lone name does.
VALUES = {
    "--attention-config": '{"hisparse_config": {}}',
    "--optimization-level": "0",
    "--compilation-config": '{"cudagraph_mode": "NONE"}',
    "--max-cudagraph-capture-size": "0",
    "--cudagraph-capture-sizes": "0",
}
OFF = ["--enforce-eager", "--enforce_eager", "--enforce-e", "-O0", "-O=0", "-cc.cudagraph_mode=NONE", "--enable-sleep"]
WAYS = (
    *([way] for way in OFF),
    ["-O", "0"],
    ["--optimization-level=0"],
    ["--optimization_lev", "0"],
    ["--compilation-config.cudagraph_mode", "none"],
    ["--compilation-conf", '{"cudagraph_mode": "NONE"}'],
    ["-c", '{"cudagraph_mode": "NONE"}'],
    ["--cpu-offload-gb", "4"],
    ["--cpu-offload-gb=0.5"],
    ["--cpu_offload_g", "1e1"],
)
FINE = (
    [],
    ["--cpu-offload-gb", "0"],
    ["--no-enforce-eager", "--no-enable-sleep-mode"],
    ["-O2"],
    ["-O", "3"],
    ["-cc.cudagraph_mode=FULL"],
    ["--max-model-len", "512"],
)


@pytest.fixture(scope="module")
def parser(engine_python: Path) -> tuple[list[str], list[list[object] | None]]:
    """The names of vLLM's arguments, and what `WAYS` and then `FINE` are to it."""
    lines = "\n".join(json.dumps(["--model", "m", *way]) for way in (*WAYS, *FINE))
    ended = subprocess.run(
        [engine_python, "-c", PARSER], input=lines, capture_output=True, text=True, timeout=200, check=True
    )
    names, parsed = json.loads(ended.stdout.partition("RESULT")[2])
    return names, parsed


def flags() -> list[str]:
    return [row.name for row in FORBIDDEN]


@pytest.mark.parametrize("name", flags())
@pytest.mark.parametrize("form", ["apart", "equals", "underscores"])
def test_every_refused_argument(name: str, form: str) -> None:
    value = VALUES.get(name, "8")
    spelled = {
        "apart": [name, value],
        "equals": [f"{name}={value}"],
        "underscores": ["--" + name[2:].replace("-", "_"), value],
    }[form]
    with pytest.raises(ForbiddenFlag, match=f"^{name}.*Remove it"):
        refuse(["--max-model-len", "512", *spelled])


def test_the_variables_that_are_set() -> None:
    assert environment(True) == {"VLLM_USE_V2_MODEL_RUNNER": "0"} == {row.name: row.value for row in VARIABLES}
    assert not environment(False)


def test_either_flag() -> None:
    assert confidential("sev-snp", "off")
    assert confidential("tdx", "none")
    assert confidential("simulated", "on")
    assert confidential("simulated", "devtools")
    assert not confidential("simulated", "none")
    assert not confidential("simulated", "off")


def test_each_row_says_why_and_where() -> None:
    for row in (*VARIABLES, *FORBIDDEN):
        assert row.reason
        assert row.source.startswith(("vllm#", "CC facts", "adytum"))


def test_options_as_vllm_reads_them() -> None:
    given = ["m", "--a_b.c_d", "1", "--flag", "-tp", "2", "-O=0", "-O3", "--x=-1", "--y", "-1", "--z"]
    assert list(options(given)) == [
        ("--a-b.c_d", "1"),
        ("--flag", None),
        ("-tp", "2"),
        ("-O", "0"),
        ("-O", "3"),
        ("--x", "-1"),
        ("--y", "-1"),
        ("--z", None),
    ]


def test_vllm_takes_these_and_we_refuse_them(parser: tuple[list[str], list[list[object] | None]]) -> None:
    """Each way does switch something on in vLLM's own parser, so each refusal has an object."""
    _, parsed = parser
    plain = parsed[len(WAYS)]
    assert plain is not None
    for way, found in zip(WAYS, parsed, strict=False):
        assert found is not None, way
        assert found != plain, way
        with pytest.raises(ForbiddenFlag):
            refuse(way)
    for way, found in zip(FINE, parsed[len(WAYS) :], strict=True):
        assert found is not None, way
        assert found[:3] == plain[:3], way
        refuse(way)


def test_names_and_abbreviations(parser: tuple[list[str], list[list[object] | None]]) -> None:
    """vLLM knows every name of the table; abbreviations of it are refused, other whole names are not."""
    names, _ = parser
    refused = set(flags())
    assert refused <= set(names)
    assert {row.short for row in FORBIDDEN if row.short not in (None, "-O")} <= set(names)
    for flag in refused:
        for end in range(3, len(flag)):
            if flag[:end] not in names:
                with pytest.raises(ForbiddenFlag):
                    refuse([flag[:end], VALUES.get(flag, "8")])
    shorts = {row.short for row in FORBIDDEN}
    for name in names:
        if name not in refused | shorts:
            refuse([name, "0"])
