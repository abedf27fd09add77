"""Writing one checkpoint of a run, outside the training loop."""

from collections.abc import Sequence
from pathlib import Path

from megatron.core.optimizer import MegatronOptimizer
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import nn

from megatron_croc.checkpoint.saving import CheckpointSaver
from megatron_croc.checkpoint.state import TrainState, iteration_folder
from megatron_croc.config.base import to_yaml
from megatron_croc.config.run import RunConfig


def save_checkpoint(
    run: RunConfig,
    state: TrainState,
    chunks: Sequence[nn.Module],
    optimizer: MegatronOptimizer,
    pg_collection: ProcessGroupCollection,
) -> Path:
    """Write a checkpoint, wait for it, and make it the latest. Every rank must call it.

    Returns:
        the folder of the checkpoint.

    Raises:
        CheckpointError: on every rank, when one rank could not write its part.
    """
    saver = CheckpointSaver(run.checkpoint, chunks, optimizer, pg_collection, settings=to_yaml(run))
    saver.save(state)
    saver.close()
    assert run.checkpoint.save is not None
    return iteration_folder(Path(run.checkpoint.save), state.iteration)
