#!/usr/bin/env python
"""`croc plan`, for scripts that call it by this path."""

import sys

from megatron_croc.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["plan", *sys.argv[1:]]))
