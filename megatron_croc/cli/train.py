"""Train one stage.

    croc train --recipe tiny/pretrain_croc --data-path shards --tokenizer-model tokenizer.model
    torchrun --nproc-per-node 8 -m megatron_croc train --recipe croc_7b/pretrain_croc ...

A run that finds its own checkpoints in --save goes on from the latest; another run's folder is
refused. Every fault of the configuration is reported at once, and data and tokenizer are opened,
before anything is built.
"""

import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_croc.checkpoint.run_folder import refuse_other_run
from megatron_croc.cli.errors import print_error
from megatron_croc.config.checks import check_run
from megatron_croc.config.run import RunConfig
from megatron_croc.errors import CrocError
from megatron_croc.log import get_logger, log_on_rank_zero, rank, world_size
from megatron_croc.recipes.command_line import parse_run

ERROR_FILE = "CROC_ERROR_FILE"
"""Variable of the launch scripts: file for an error that a restart does not fix."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return the exit status, 1 after an error that the user can fix."""
    if _failed_before():
        return 1
    try:
        run = _checked_run(argv)
    except CrocError as error:  # every rank found the same
        return _report(error)
    from megatron_croc.convert.source import is_huggingface, open_weights
    from megatron_croc.parallel.groups import stop_distributed
    from megatron_croc.training.loop import train

    start = run.checkpoint.pretrained_checkpoint
    try:
        weights = None
        if start and is_huggingface(start):
            weights = open_weights(start, run.model, reconstructs=run.reconstructs)
        train(run, weights)
    except CrocError as error:
        if error.everywhere:
            return _report(error)
        print(f"error on rank {rank()}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as interrupt:
        if interrupt.args:  # all ranks have ended their step
            stop_distributed()
        raise
    stop_distributed()
    return 0


def _report(error: CrocError) -> int:
    """Print an error that every rank has, once; return the exit status."""
    if (path := os.environ.get(ERROR_FILE)) and os.environ.get("LOCAL_RANK", "0") == "0":
        Path(path).write_text(f"error: {error}\n", encoding="utf-8")
    if rank() == 0:
        print_error(error)
    return 1


def _failed_before() -> bool:
    """Return True if torchrun restarts workers after an error that a restart does not fix."""
    path = os.environ.get(ERROR_FILE)
    return path is not None and Path(path).is_file() and Path(path).stat().st_size > 0


def _checked_run(argv: Sequence[str] | None) -> RunConfig:
    """Parse the run and check all that can be checked before the model is built."""
    run = parse_run(argv, prog="croc train", description=__doc__ or "")
    check_run(run, world_size(), for_training=True)
    refuse_other_run(run)
    # Importing takes some seconds, and so does opening many shards.
    log_on_rank_zero(
        get_logger(__name__), logging.INFO, "settings checked, importing torch and megatron-core"
    )
    from megatron_croc.data.loader import check_data
    from megatron_croc.planning.this_device import refuse_too_large

    refuse_too_large(run, world_size())
    check_data(run)
    return run
