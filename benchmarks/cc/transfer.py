"""The parts of CC's tax on one GPU: copies to it and back, pinned and pageable, small copies, kernel launches.

    python -m adytum.benchmarks transfer [--label cc-on] [--out FILE]

Runs torch in the engines' environment. Without a GPU it fails with a message that says so. `model --transfers` takes
two of its files, one with CC off and one with CC on.
"""

import argparse
import json
import subprocess
from pathlib import Path
from typing import Any

from adytum.benchmarks.errors import Unusable
from adytum.benchmarks.runs import machine
from adytum.deploy.demo.processes import ROOT

VERSION = "adytum benchmark transfer 1"
_SCRIPT = Path(__file__).with_name("transfer_device.py")
_CANNOT = (
    "copies between host and device (4 KiB to 1 GiB, pinned and pageable), the latency of small copies, kernel "
    "launches and reading back cannot be measured here, and nothing was written"
)
_TIMES = ("small_copy_us", "launch_us", "launch_and_wait_us", "read_back_us")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `transfer`."""
    parser.add_argument("--engine-python", type=Path, default=ROOT / ".venv-engine" / "bin" / "python")
    parser.add_argument("--label", choices=machine.LABELS, help="refused if this machine is another")
    parser.add_argument("--machine", default="", help="its name in the file")
    parser.add_argument("--out", type=Path, default=ROOT / "var" / "bench" / "transfer.json")


def run(options: argparse.Namespace) -> int:
    """Returns exit status 0. Raises `Unusable`, also if there is no GPU."""
    here = machine.facts(options.machine)
    label = machine.labelled(here, options.label)
    try:
        done = subprocess.run([str(options.engine_python), "-P", str(_SCRIPT)], capture_output=True, timeout=1800)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unusable(f"{options.engine_python}: {error}; {_CANNOT}") from error
    try:
        found: dict[str, Any] = json.loads(done.stdout)
    except ValueError as error:
        text = done.stderr.decode(errors="replace")[-1500:]
        raise Unusable(f"the measurement ended with status {done.returncode}; {_CANNOT}:\n{text}") from error
    if "error" in found:
        raise Unusable(f"{found['error']}: {_CANNOT}")
    content = {"schema": VERSION, "label": label, "machine": here, **found}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(content, indent=1))
    print(table(content))
    print(f"transfers: {options.out}")
    return 0


def load(path: Path) -> dict[str, Any]:
    """Reads a file that `run` wrote. Raises `Unusable` for any other."""
    try:
        found = json.loads(path.read_text())
        whole = (
            found["schema"] == VERSION
            and bool(found["copies"])
            and all(item["gb_s"] > 0 for item in found["copies"])
            and all(found[name]["p50"] > 0 for name in _TIMES)
            and isinstance(found["label"], str)
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Unusable(f"{path} is not a file of transfers: {type(error).__name__}: {error}") from error
    if not whole:
        raise Unusable(f"{path} is not a file of transfers, or has no figures")
    return dict(found)


def table(content: dict[str, Any]) -> str:
    """The figures, for a terminal."""
    lines = [f"{content['label']}: {content['device']}, torch {content['torch']}"]
    lines.append(
        f"{'bytes':>14} {'direction':>15} {'memory':>9} {'issue us p50':>13} {'done us p50/p99':>20} {'GB/s':>7}"
    )
    for item in content["copies"]:
        done = f"{item['done_us']['p50']:.1f}/{item['done_us']['p99']:.1f}"
        lines.append(
            f"{item['bytes']:>14,} {item['direction']:>15} {item['memory']:>9} {item['issue_us']['p50']:>13.1f} "
            f"{done:>20} {item['gb_s']:>7.2f}"
        )
    for name in _TIMES:
        lines.append(f"{name.replace('_', ' ')}: p50 {content[name]['p50']:.2f}, p99 {content[name]['p99']:.2f}")
    return "\n".join(lines)
