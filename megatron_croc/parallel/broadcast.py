"""Broadcast from the rank that reads data to the other ranks of its replica."""

import pickle
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_croc.parallel.device import current_device


def is_source(group: dist.ProcessGroup) -> bool:
    """Return True on the first rank of the group."""
    return dist.get_rank(group) == 0


def broadcast_object(value: Any, group: dist.ProcessGroup) -> Any:
    """Return the first rank's `value` on every rank of the group; tensors in it stay on the CPU."""
    if group.size() == 1:
        return value
    source = dist.get_process_group_ranks(group)[0]
    size = torch.zeros(1, dtype=torch.int64)
    payload = torch.empty(0, dtype=torch.uint8)
    if is_source(group):
        payload = torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)
        size[0] = payload.numel()
    size = size.to(current_device())
    dist.broadcast(size, source, group)
    if not is_source(group):
        payload = torch.empty(int(size.item()), dtype=torch.uint8)
    payload = payload.to(current_device())
    dist.broadcast(payload, source, group)
    return value if is_source(group) else pickle.loads(payload.cpu().numpy().tobytes())


def broadcast_tensor(
    tensor: Tensor | None,
    shape: tuple[int, ...],
    *,
    dtype: torch.dtype,
    group: dist.ProcessGroup,
) -> Tensor:
    """Return the first rank's tensor on every rank of the group, on the current device."""
    if not is_source(group):
        tensor = torch.empty(shape, dtype=dtype)
    assert tensor is not None and tuple(tensor.shape) == shape
    tensor = tensor.to(current_device())
    if group.size() > 1 and tensor.numel():
        dist.broadcast(tensor, dist.get_process_group_ranks(group)[0], group)
    return tensor
