"""Call of megatron-core's pipeline schedules, for training, validation and answers."""

from collections.abc import Callable, Sequence
from typing import Any

from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.utils import get_model_config
from torch import Tensor, nn

from megatron_croc.parallel.pipeline import PipelineCommunicator


def run_schedule(
    forward_step: Callable[..., tuple[Any, Callable[..., Any]]],
    micro_batches: Sequence[Any],
    pack_lengths: Sequence[int],
    *,
    chunks: list[nn.Module],
    pg_collection: ProcessGroupCollection,
    forward_only: bool = False,
) -> list[dict[str, Tensor]]:
    """Run every micro-batch through all pipeline stages.

    Args:
        forward_step: called as (iterator over `micro_batches`, model chunk); returns the chunk's
            output and a function from it to (loss, token count, numbers to report).
        micro_batches: micro-batches of one step, the same number on every rank.
        pack_lengths: positions of each micro-batch's pack, before it is cut over CP and SP ranks.
        chunks: this rank's model chunks.
        pg_collection: process groups.
        forward_only: skip the backward pass.

    Returns:
        numbers to report, by micro-batch; empty except on the last stage.
    """
    config = get_model_config(chunks[0])
    cut = pg_collection.cp.size() * (pg_collection.tp.size() if config.sequence_parallel else 1)
    shapes = [(length // cut, 1, config.hidden_size) for length in pack_lengths]
    iterators = [iter(micro_batches) for _ in chunks]
    communicator = PipelineCommunicator(pg_collection.pp, config, shapes)
    losses = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iterators if len(chunks) > 1 else iterators[0],
        model=chunks if len(chunks) > 1 else chunks[0],
        num_microbatches=len(micro_batches),
        seq_length=max(pack_lengths),
        micro_batch_size=1,  # one pack holds micro_batch_size samples
        forward_only=forward_only,
        p2p_communicator=communicator,
        pg_collection=pg_collection,
    )
    communicator.flush()
    return losses
