"""Norm of all gradient shards with one read of the device, for use without TE and apex.

megatron's own fallback (megatron.core.utils.local_multi_tensor_l2_norm) reads the norm of each
shard from the device separately, so the host waits once per shard in every step. The replacement
holds for the whole process (docs/design.md, "State that belongs to the whole process").
"""

import torch
from megatron.core.optimizer import clip_grads
from megatron.core.utils import local_multi_tensor_l2_norm
from torch import Tensor


def multi_tensor_norm(
    chunk_size: int, noop_flag: Tensor, tensor_lists: list[list[Tensor]], per_tensor: bool
) -> tuple[Tensor, None]:
    """Norm over all tensors, on their device; same signature as amp_C.multi_tensor_l2norm."""
    return torch.nn.utils.get_total_norm(tensor_lists[0]).reshape(1), None


def adopt_norm() -> None:
    """Replace megatron's fallback by `multi_tensor_norm`."""
    if clip_grads.l2_norm_impl is local_multi_tensor_l2_norm:
        clip_grads.l2_norm_impl = multi_tensor_norm
