"""`python -m adytum.benchmarks.gpu pack | run`: the real models' shapes on a real GPU (benchmarks/gpu/README.md).

Standard library only until the machine has the wheels.
"""

import argparse
import sys
from pathlib import Path

from adytum.benchmarks.gpu import pieces, steps

HERE = Path(__file__).resolve().parent


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status: 0 done, 1 a step failed, 3 call again."""
    parser = argparse.ArgumentParser(prog="python -m adytum.benchmarks.gpu", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    pack = commands.add_parser("pack", help="download the wheels and cut them into pieces (needs a package index)")
    pack.add_argument("out", type=Path)
    pack.add_argument("--python", default="3.12", help="of the GPU machine")
    run = commands.add_parser("run", help="take the next steps on the GPU machine")
    run.add_argument("--pieces", type=Path, default=Path("pieces"))
    run.add_argument("--work", type=Path, default=Path("/tmp/adytum-gpu"), help="environments and models")
    run.add_argument("--out", type=Path, required=True, help="results, and the list of finished steps")
    run.add_argument("--limit-s", type=float, default=570.0, help="of this call")
    run.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    run.add_argument("--small", action="store_true", help="small shapes, to try whether it works")
    run.add_argument("--sandbox", choices=["full", "none"], default="full")
    run.add_argument("--gateway-python", type=Path, help="an existing environment")
    run.add_argument("--engine-python", type=Path, help="likewise")
    run.add_argument("--port", type=int, default=8099)
    options = parser.parse_args(arguments)
    try:
        if options.command == "pack":
            wheels = options.out / "wheels"
            for name in ("gateway", "engine"):
                pieces.download(HERE / f"{name}.txt", wheels, options.python)
            say(f"{pieces.cut(wheels, options.out / 'pieces')} pieces in {options.out / 'pieces'}")
            return 0
        chosen = steps.Options(
            pieces=options.pieces.resolve(),
            work=options.work.resolve(),
            out=options.out.resolve(),
            device=options.device,
            small=options.small,
            sandbox=options.sandbox,
            # Not resolved: an environment's interpreter is a link, whose place tells Python its environment.
            gateway=options.gateway_python and options.gateway_python.absolute(),
            engine=options.engine_python and options.engine_python.absolute(),
            port=options.port,
        )
        return 0 if steps.run(chosen, options.limit_s, say) else 3
    except (pieces.PiecesError, steps.StepError) as error:
        say(str(error))
        return 1


def say(text: str) -> None:
    """Prints a line at once, so that the output of an interrupted call shows its progress."""
    sys.stdout.write(f"[gpu] {text}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
