"""`python -m benchmarks.channel`."""

import argparse
import sys

from benchmarks import channel

parser = argparse.ArgumentParser(description=channel.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
channel.add_arguments(parser)
sys.exit(channel.run(parser.parse_args()))
