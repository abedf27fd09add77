"""Sum over tensor-parallel ranks of gradients that each of them has for its share of the images.

A tower whose images are shared out (`split_vision` images) has equal weights on all tensor-parallel
ranks and gradients of their own on each. Data- and context-parallel ranks have been summed before:
a rank holds its slice of every bucket, and only the tower's part of this slice is exchanged.

    bucket of rank 0   [ rest | rest  tower | tower ]     slices of DP x CP = 3 ranks
                                      -----   -----       summed over TP, in place
"""

from collections.abc import Iterator, Set
from itertools import groupby
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from megatron_croc.parallel.collectives import all_reduce


def sum_over_tensor_parallel(
    chunk: nn.Module, parameters: Set[Tensor], tp: dist.ProcessGroup
) -> None:
    """Sum the gradients of these parameters, after they are reduced over data-parallel ranks.

    Args:
        chunk: model chunk, wrapped in DistributedDataParallel with the distributed optimizer.
        parameters: trained parameters that are equal on all tensor-parallel ranks.
        tp: tensor-parallel group.
    """
    if not parameters or tp.size() == 1:
        return
    buffers: Any = chunk.buffers  # of DistributedDataParallel, not torch's
    for buffer in buffers:
        group = buffer.data_parallel_group
        for bucket in buffer.buckets:
            length = bucket.grad_data.numel() // group.size()
            first = group.rank() * length
            for begin, end in _runs(buffer, bucket, parameters):
                part = bucket.grad_data[max(begin, first) : min(end, first + length)]
                if part.numel():
                    all_reduce(part, group=tp)


def _runs(buffer: Any, bucket: Any, parameters: Set[Tensor]) -> Iterator[tuple[int, int]]:
    """Begin and end, in the bucket, of neighbouring parameters that are all in `parameters`."""
    places = buffer.param_index_map
    in_order = sorted(bucket.params_list, key=lambda parameter: places[parameter][0])
    for is_shared, run in groupby(in_order, key=lambda parameter: parameter in parameters):
        if is_shared:
            ends = [places[parameter][:2] for parameter in run]
            yield ends[0][0] - bucket.offset, ends[-1][1] - bucket.offset
