"""`python -m adytum.benchmarks COMMAND`: what secrecy costs, measured. benchmarks/README.md explains the commands."""

import argparse
import sys

from adytum.benchmarks.cc import model, transfer
from adytum.benchmarks.channel import run as channel
from adytum.benchmarks.errors import Unusable
from adytum.benchmarks.report import compare
from adytum.benchmarks.runs import serve

_COMMANDS = {
    "serve": (serve, "drive a backend through several arms and keep every request's times"),
    "compare": (compare, "two runs, or two arms of one: a table and a report"),
    "transfer": (transfer, "copies to the GPU and back, small copies and launches"),
    "model": (model, "CC-On simulated by a synthetic engine: a model, not a measurement"),
    "channel": (channel, "the gateway alone: CPU per event and request, memory per stream, beside nginx and LiteLLM"),
}


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status: 0, 1 if a measured answer is wrong, 2 if nothing could be measured."""
    parser = argparse.ArgumentParser(prog="python -m adytum.benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (module, what) in _COMMANDS.items():
        one = commands.add_parser(
            name, help=what, description=module.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        module.add_arguments(one)
        one.set_defaults(run=module.run)
    options = parser.parse_args(arguments)
    try:
        status: int = options.run(options)
    except Unusable as error:
        print(f"python -m adytum.benchmarks {options.command}: {error}", file=sys.stderr)
        return 2
    return status


if __name__ == "__main__":
    sys.exit(main())
