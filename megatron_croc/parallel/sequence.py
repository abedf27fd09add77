"""Hidden states of sequence parallelism, gathered once for two readers.

One reader splits its work over the tensor-parallel ranks (the output layer: each rank has a part of
the vocabulary), so the ranks' gradients are summed. The other does the whole work on every rank
(the reconstruction head), so each rank already holds the whole gradient.
"""

import torch
import torch.distributed as dist
from megatron.core import tensor_parallel
from torch import Tensor


def gather_for_split_and_whole_work(shard: Tensor, tp: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """Gather [S / TP, ...] to [S, ...], with one all-gather for two readers.

    Returns:
        The same values twice. Backward sums the ranks' gradients of the first tensor, and takes
        this rank's part of the gradient of the second, which must be equal on all ranks.
    """
    split, whole = _GatherForBoth.apply(shard, tp)  # type: ignore[misc]
    return split, whole


class _GatherForBoth(torch.autograd.Function):
    @staticmethod
    def forward(ctx, shard: Tensor, tp: dist.ProcessGroup) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        ctx.tp = tp
        ctx.set_materialize_grads(False)  # without a reconstruction head one reader is missing
        gathered = tensor_parallel.gather_from_sequence_parallel_region(shard, group=tp)
        return gathered, gathered.view_as(gathered)

    @staticmethod
    def backward(ctx, split: Tensor | None, whole: Tensor | None):  # type: ignore[override]
        own = None
        if split is not None:
            own = tensor_parallel.reduce_scatter_to_sequence_parallel_region(split, group=ctx.tp)
        if whole is not None:
            part = tensor_parallel.scatter_to_sequence_parallel_region(whole, group=ctx.tp)
            own = part if own is None else own + part
        return own, None
