"""`python -m adytum.inference`: the command line, like `adytum`."""

from adytum.inference.cli.main import main

if __name__ == "__main__":
    main(prog_name="adytum")
