"""Is what this code computes the right thing? Answers with figures, and exit status 1 when not.

Against recorded runs of the published implementations, in fp32, through the real training step:

    python tools/parity.py golden FOLDER/CASE [--tp 2] [--pp 2] [--sequence-parallel]

FOLDER holds CASE.safetensors and CASE.json (inputs, outputs, gradients) and the weights they were
recorded with: state.safetensors, or state_X.safetensors for cases whose name begins with X_.

One process against parallel layouts, same weights and batches (numbers, or --data-path):

    python tools/parity.py layouts --recipe tiny/pretrain_croc --layouts "tp2 tp2+sp pp2+vpp2 cp2"
    python tools/parity.py layouts --recipe tiny/pretrain_croc --layouts all4    # all on up to 4
    python tools/parity.py layouts --recipe tiny/pretrain_croc --self-test       # faults are seen

Any flag of the trainer changes the run; --pretrained-checkpoint takes weights of your own.

Two training logs, step by step:

    python tools/parity.py runs RUN_A RUN_B [--bound 1e-4]
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_croc.errors import CrocError

COMMANDS = ("golden", "layouts", "runs")


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line and run the comparison."""
    words = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=COMMANDS)
    command = parser.parse_args(words[:1]).command
    try:
        return {"golden": golden, "layouts": layouts, "runs": runs}[command](words[1:])
    except CrocError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def golden(words: list[str]) -> int:
    """Compare with a recorded reference run."""
    parser = argparse.ArgumentParser(prog="parity.py golden")
    parser.add_argument("case", type=Path, help="FOLDER/CASE, with or without an ending")
    parser.add_argument("--tp", type=int, default=1, help="tensor-parallel size")
    parser.add_argument("--pp", type=int, default=1, help="pipeline-parallel size")
    parser.add_argument("--sequence-parallel", action="store_true", help="with --tp")
    parser.add_argument("--bound", type=float, default=1e-4, help="largest relative error")
    options = parser.parse_args(words)
    world_size = options.tp * options.pp
    if world_size > 1 and "WORLD_SIZE" not in os.environ:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        launcher += ["--nproc-per-node", str(world_size), __file__, "golden", *words]
        environment = {"OMP_NUM_THREADS": "1", **os.environ}
        return subprocess.run(launcher, env=environment, check=False).returncode
    from megatron_croc.log import quiet_megatron

    quiet_megatron()  # before it is imported
    from megatron_croc.verification.golden.run import run_golden

    return run_golden(
        options.case,
        tp=options.tp,
        pp=options.pp,
        sequence_parallel=options.sequence_parallel,
        bound=options.bound,
    )


def layouts(words: list[str]) -> int:
    """Compare parallel layouts with one process."""
    from megatron_croc.verification.layouts.command import run_command

    return run_command(words)


def runs(words: list[str]) -> int:
    """Compare two training logs."""
    parser = argparse.ArgumentParser(prog="parity.py runs")
    parser.add_argument("a", type=Path, help="folder with metrics.jsonl, or the file")
    parser.add_argument("b", type=Path, help="the same")
    parser.add_argument("--bound", type=float, default=1e-4, help="largest relative difference")
    options = parser.parse_args(words)
    from megatron_croc.verification.layouts.logs import compare_logs

    return compare_logs(options.a, options.b, bound=options.bound)


if __name__ == "__main__":
    sys.exit(main())
