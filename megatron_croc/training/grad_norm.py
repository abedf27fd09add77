"""Norm of all gradient shards with one read of the device (used without TE and apex).

Without their fused kernels megatron's stand-in (megatron.core.utils.local_multi_tensor_l2_norm)
copies each shard's norm to the host by itself: the host waits once a shard in every step.
"""

import torch
from megatron.core.optimizer import clip_grads
from megatron.core.utils import local_multi_tensor_l2_norm
from torch import Tensor


def multi_tensor_norm(
    chunk_size: int, noop_flag: Tensor, tensor_lists: list[list[Tensor]], per_tensor: bool
) -> tuple[Tensor, None]:
    """The norm over all tensors, on their device; called as amp_C.multi_tensor_l2norm is."""
    return torch.nn.utils.get_total_norm(tensor_lists[0]).reshape(1), None


def adopt_norm() -> None:
    """Put `multi_tensor_norm` where megatron would use its stand-in."""
    if clip_grads.l2_norm_impl is local_multi_tensor_l2_norm:
        clip_grads.l2_norm_impl = multi_tensor_norm
