"""`python -m megatron_croc` is the command `croc`; torchrun starts it by this name."""

import sys

from megatron_croc.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
