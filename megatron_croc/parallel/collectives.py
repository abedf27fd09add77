"""Collectives that do nothing in a group of one rank."""

import torch
import torch.distributed as dist
from torch import Tensor


def all_reduce(
    tensor: Tensor,
    *,
    op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM,
    group: dist.ProcessGroup | None = None,
) -> None:
    """Reduce `tensor` in place over the group; None: over all ranks."""
    if dist.get_world_size(group) > 1:
        dist.all_reduce(tensor, op=op, group=group)


def all_gather(tensor: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """[...] of every rank -> [ranks, ...] on all of them; group None: all ranks."""
    size = dist.get_world_size(group)
    if size == 1:
        return tensor.unsqueeze(0)
    parts = [torch.empty_like(tensor) for _ in range(size)]
    dist.all_gather(parts, tensor, group=group)
    return torch.stack(parts)
