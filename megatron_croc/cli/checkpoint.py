"""Read checkpoints back: which are whole, and from which one a run would go on.

    croc checkpoint verify runs/pretrain_croc [--newest 2]

For a folder that was copied, or before a job waits in a queue: it compares every byte with the
digests that were written with it, and changes nothing. Newest first.
Exit status: 0 the latest checkpoint is whole, 1 it is not, or there is none.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_croc.checkpoint.manifest import find_damage, read_manifest
from megatron_croc.checkpoint.retention import REMOVED, STAGED, being_read
from megatron_croc.checkpoint.run_folder import own_checkpoints
from megatron_croc.checkpoint.state import TrainState
from megatron_croc.config.parser import CommandParser
from megatron_croc.errors import CheckpointError


def verify(argv: Sequence[str] | None = None) -> int:
    """Verify, and print a line as soon as it is known."""
    parser = CommandParser(
        prog="croc checkpoint verify",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path, help="what --save was, or one checkpoint in it")
    parser.add_argument("--newest", type=int, metavar="N", help="only so many; default: all")
    arguments = parser.parse_args(argv)
    if arguments.newest is not None and arguments.newest < 1:
        parser.error(f"--newest {arguments.newest}: at least 1")
    candidates, foreign = own_checkpoints(arguments.folder)
    for line in foreign:
        print(f"{line}: no run of this folder takes it")
    if not candidates:
        print(f"{arguments.folder}: no checkpoint there", file=sys.stderr)
        return 1
    whole = []
    for folder in candidates[: arguments.newest]:
        line, is_whole = examine(folder)
        print(f"{folder.name}: {line}", flush=True)
        if is_whole:
            whole.append(folder)
    for ending in (STAGED, REMOVED):
        for left in sorted(arguments.folder.glob(f"iter_*{ending}")):
            print(f"{left.name}: being written or removed, or left by a killed run")
    print(f"a run goes on from {whole[0]}" if whole else "none of these is whole")
    return 0 if whole[:1] == candidates[:1] else 1


def examine(folder: Path) -> tuple[str, bool]:
    """Return one line about a checkpoint, and True if it is whole."""
    with being_read(folder):
        if damage := find_damage(folder):
            return f"DAMAGED, {'; '.join(damage)}", False
        try:
            state = TrainState.load(folder)
        except CheckpointError as error:
            return f"DAMAGED, {error}", False
    gib = sum(file.num_bytes for file in read_manifest(folder).values()) / 2**30
    return f"whole, {state.stage}, {state.consumed_samples:,} samples, {gib:.2f} GiB", True
