"""Runs the command line as `python -m reparam`, for an environment whose scripts are not on the PATH."""

import sys

from reparam._commands import main

if __name__ == "__main__":
    sys.exit(main())
