"""`python -m tests.counted serve ...`: `adytum`, with its coverage counted though it drops its environment.

A backend starts itself again with the same arguments and without the variables by which coverage counts programs that
tests start. So the arguments themselves ask for the counting.
"""

import atexit
import runpy
import sys

import coverage

from tests.support import ROOT

if __name__ == "__main__":
    counting = coverage.Coverage(
        # Not pyproject.toml: its patch for subprocesses sets a variable, and the backend would start again for ever.
        config_file=False,
        data_file=str(ROOT / "build" / "coverage" / "data"),
        data_suffix=True,
        branch=True,
        source=[str(ROOT / name) for name in ("attestation", "inference")],
    )
    counting.config.relative_files = True
    counting.start()
    atexit.register(lambda: (counting.stop(), counting.save()))
    sys.argv[0] = "adytum"
    runpy.run_module("adytum.inference", run_name="__main__", alter_sys=True)
