"""Compare what this code computes with something else; exit status 1 where it differs.

Against recorded runs of the published implementations, in fp32, through the real training step:

    croc parity golden FOLDER/CASE ... [--tp 2] [--pp 2] [--sequence-parallel]

FOLDER holds CASE.safetensors and CASE.json (inputs, outputs, gradients) and the weights they were
recorded with: state.safetensors, or state_X.safetensors for cases whose name begins with X_.

One process against parallel layouts, same weights and batches (numbers, or --data-path):

    croc parity layouts --recipe tiny/pretrain_croc --layouts "tp2 tp2+sp pp2+vpp2 cp2"
    croc parity layouts --recipe tiny/pretrain_croc --layouts all4    # all on up to 4
    croc parity layouts --recipe tiny/pretrain_croc --self-test       # faults are seen

Any flag of the trainer changes the run; --pretrained-checkpoint takes weights of your own.

Two training logs, step by step:

    croc parity runs RUN_A RUN_B [--bound 1e-4]
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_croc.config.parser import CommandParser


def _parser(prog: str) -> argparse.ArgumentParser:
    return CommandParser(
        prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def golden(words: Sequence[str]) -> int:
    """Compare with a recorded reference run."""
    parser = _parser("croc parity golden")
    parser.add_argument(
        "cases", type=Path, nargs="+", metavar="CASE", help="FOLDER/CASE, with or without an ending"
    )
    parser.add_argument("--tp", type=int, default=1, help="tensor-parallel size")
    parser.add_argument("--pp", type=int, default=1, help="pipeline-parallel size")
    parser.add_argument("--sequence-parallel", action="store_true", help="with --tp")
    parser.add_argument("--bound", type=float, default=1e-4, help="largest relative error")
    options = parser.parse_args(words)
    world_size = options.tp * options.pp
    if world_size > 1 and "WORLD_SIZE" not in os.environ:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        launcher += ["--nproc-per-node", str(world_size), "-m", "megatron_croc"]
        launcher += ["parity", "golden", *words]
        environment = {"OMP_NUM_THREADS": "1", **os.environ}
        return subprocess.run(launcher, env=environment, check=False).returncode
    from megatron_croc.verification.golden.run import run_golden

    return max(
        run_golden(
            case,
            tp=options.tp,
            pp=options.pp,
            sequence_parallel=options.sequence_parallel,
            bound=options.bound,
        )
        for case in options.cases
    )


def layouts(words: Sequence[str]) -> int:
    """Compare parallel layouts with one process."""
    from megatron_croc.verification.layouts.command import run_command

    return run_command(words)


def runs(words: Sequence[str]) -> int:
    """Compare two training logs."""
    parser = _parser("croc parity runs")
    parser.add_argument("a", type=Path, help="folder with metrics.jsonl, or the file")
    parser.add_argument("b", type=Path, help="the same")
    parser.add_argument("--bound", type=float, default=1e-4, help="largest relative difference")
    options = parser.parse_args(words)
    from megatron_croc.verification.layouts.logs import compare_logs

    return compare_logs(options.a, options.b, bound=options.bound)


def transformers(words: Sequence[str]) -> int:
    """Compare an export under two versions of transformers."""
    from megatron_croc.verification.transformers_versions import main

    return main(words)
