"""Norm of all gradient shards, and their clipping, for use without TE and apex.

megatron's own fallbacks (megatron.core.utils.local_multi_tensor_*) read the norm of each shard from
the device separately, so the host waits once per shard in every step, and scale each gradient in
two passes. The replacements hold for the whole process (docs/design.md, "State that belongs to the
whole process").
"""

import torch
from megatron.core.optimizer import clip_grads
from megatron.core.utils import local_multi_tensor_l2_norm, local_multi_tensor_scale
from torch import Tensor


def multi_tensor_norm(
    chunk_size: int, noop_flag: Tensor, tensor_lists: list[list[Tensor]], per_tensor: bool
) -> tuple[Tensor, None]:
    """Norm over all tensors, on their device; same signature as amp_C.multi_tensor_l2norm."""
    return torch.nn.utils.get_total_norm(tensor_lists[0]).reshape(1), None


def multi_tensor_scale(
    chunk_size: int, noop_flag: Tensor, tensor_lists: list[list[Tensor]], scale: float
) -> None:
    """Write scaled sources to their targets, each pair in one pass; as amp_C.multi_tensor_scale."""
    for source, target in zip(*tensor_lists, strict=True):
        torch.mul(source, scale, out=target)


def adopt_norm() -> None:
    """Replace megatron's fallbacks by `multi_tensor_norm` and `multi_tensor_scale`."""
    if clip_grads.multi_tensor_scale_impl is local_multi_tensor_scale:
        clip_grads.multi_tensor_scale_impl = multi_tensor_scale
    if clip_grads.l2_norm_impl is local_multi_tensor_l2_norm:
        clip_grads.l2_norm_impl = multi_tensor_norm
