#!/usr/bin/env python
"""`croc checkpoint verify`, for scripts that call it by this path."""

import sys

from megatron_croc.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["checkpoint", "verify", *sys.argv[1:]]))
