"""One target under libFuzzer: `python -m tests.fuzz.one TARGET [libFuzzer's arguments]`."""

import sys

import atheris

with atheris.instrument_imports(include=["adytum", "tests.fuzz"]):
    from tests.fuzz.targets import TARGETS

if __name__ == "__main__":
    name = sys.argv[1]
    # libFuzzer starts itself again, for a merge, by what it takes for its own path.
    atheris.Setup([f"{sys.executable} -m tests.fuzz.one {name}", *sys.argv[2:]], TARGETS[name])
    atheris.Fuzz()
