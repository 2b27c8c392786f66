"""`python -m adytum.attestation`: see `cli`."""

import sys

from adytum.attestation.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
