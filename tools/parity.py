"""Is what this code computes the right thing? Answers with figures, and exit status 1 when not.

Against recorded runs of the published implementations, in fp32, through the real training step:

    python tools/parity.py golden FOLDER/CASE [--tp 2] [--pp 2] [--sequence-parallel]

FOLDER holds CASE.safetensors and CASE.json (inputs, outputs, gradients) and the weights they were
recorded with: state.safetensors, or state_X.safetensors for cases whose name begins with X_.
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line and run the comparison."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    golden = commands.add_parser("golden", help="compare with a recorded reference run")
    golden.add_argument("case", type=Path, help="FOLDER/CASE, with or without an ending")
    golden.add_argument("--tp", type=int, default=1, help="tensor-parallel size")
    golden.add_argument("--pp", type=int, default=1, help="pipeline-parallel size")
    golden.add_argument("--sequence-parallel", action="store_true", help="with --tp")
    golden.add_argument("--bound", type=float, default=1e-4, help="largest relative error")
    options = parser.parse_args(argv)
    world_size = options.tp * options.pp
    if world_size > 1 and "WORLD_SIZE" not in os.environ:
        return launch(world_size, sys.argv[1:] if argv is None else list(argv))
    from parity_golden import run_golden

    return run_golden(
        options.case,
        tp=options.tp,
        pp=options.pp,
        sequence_parallel=options.sequence_parallel,
        bound=options.bound,
    )


def launch(world_size: int, arguments: list[str]) -> int:
    """Run this very command on several processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(world_size), __file__, *arguments]
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    return subprocess.run(command, env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
