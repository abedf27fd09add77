#!/usr/bin/env python
"""Weights to and from Hugging Face; the same as `python -m megatron_croc.cli.convert`.

python tools/checkpoint/convert.py import|export|inspect|verify --help
"""

import sys

from megatron_croc.cli.convert import main

if __name__ == "__main__":
    sys.exit(main())
