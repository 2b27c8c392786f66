"""`python -m tests.fuzz [TARGET...] [--seconds 600]`: looks for inputs that break a target, and keeps the corpus.

One process per target, libFuzzer through atheris. What it found new is merged into `tests/fuzz/corpus/<target>`,
minimised; a finding is left beside it as `crash-...` and the command fails.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.fuzz.seeds import seeds
from tests.fuzz.targets import TARGETS

CORPUS = Path(__file__).resolve().parent / "corpus"
_LONGEST = 2048


def main() -> int:
    """Returns 0 if nothing was found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("targets", nargs="*")
    parser.add_argument("--seconds", type=int, default=600)
    options = parser.parse_args()

    failed = False
    for name in options.targets or TARGETS:
        if name not in TARGETS:
            parser.error(f"there is no target {name}; there are {', '.join(TARGETS)}")
        failed |= _run(name, options.seconds) != 0
    return int(failed)


def _run(name: str, seconds: int) -> int:
    kept = CORPUS / name
    kept.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        found, merged = Path(folder, "found"), Path(folder, "merged")
        found.mkdir()
        merged.mkdir()
        for number, seed in enumerate(seeds()[name]):
            (found / f"seed-{number}").write_bytes(seed)
        limits = [f"-max_len={_LONGEST}", "-timeout=10", "-rss_limit_mb=2048"]
        status = _fuzz(
            name, *limits, f"-max_total_time={seconds}", f"-artifact_prefix={kept}/", "-print_final_stats=1",
            str(found), str(kept),
        )  # fmt: skip
        _fuzz(name, *limits, "-merge=1", str(merged), str(found), str(kept))
        if any(merged.iterdir()):
            for path in kept.iterdir():
                if not path.name.startswith(("crash-", "timeout-", "oom-")):
                    path.unlink()
            for path in merged.iterdir():
                (kept / path.name[:16]).write_bytes(path.read_bytes())
    return status


def _fuzz(name: str, *arguments: str) -> int:
    return subprocess.run([sys.executable, "-m", "tests.fuzz.one", name, *arguments], check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
