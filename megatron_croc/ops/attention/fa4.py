"""FlashAttention 4 under the mixed mask: a mask_mod, and lists of the blocks that it touches.

The mask_mod reads the interval of a query from two tensors. The block lists are those of flex.py,
with blocks of 128 x 128: the kernel computes full blocks without a mask and skips the others.
Queries and keys are padded to whole blocks, so that no index is past the end of the tensors.

Interface read: `flash_attn.cute.flash_attn_func` and `block_sparsity.BlockSparseTensorsTorch` of
flash-attn-4, tag fa4-v4.0.0.beta27. FlexAttention (flex.py) asks for the same kernel where torch
knows it; this calls it directly, without a compiler of torch. Not run on a GPU so far.
"""

import functools
import importlib
from collections.abc import Callable
from typing import Any

from torch import Tensor

from megatron_croc.libraries import name_unknown_version
from megatron_croc.ops.attention.flex import (
    BLOCK_SIZE,
    blocks_of,
    flash_4_unsupported_reason,
    padded,
)
from megatron_croc.ops.attention.packages import kernels_of, missing, too_old
from megatron_croc.ops.mixed_mask import MixedMask

DISTRIBUTION = "flash-attn-4"


def unsupported_reason(query: Tensor) -> str | None:
    """Reason against this backend for tensors like `query`; None if it can be used."""
    return flash_4_unsupported_reason(query) or missing(DISTRIBUTION) or too_old(DISTRIBUTION)


def attend_fa4(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: MixedMask,
    positions: Tensor | None = None,
    *,
    softmax_scale: float,
) -> Tensor:
    """Attention of all positions of a pack, or of some of them.

    Args:
        query: [R, H, d]; query i is at position `positions[i]` of the pack.
        key: [T, G, d].
        value: [T, G, d].
        mask: of length T.
        positions: int64 [R]; None: all, R = T.
        softmax_scale: factor of the scores.

    Returns:
        [R, H, d]; padding is zero.
    """
    name_unknown_version(DISTRIBUTION)
    blocks = blocks_of(mask, positions)
    lists = blocks.mask
    block_lists = importlib.import_module("flash_attn.cute.block_sparsity").BlockSparseTensorsTorch
    out, *_ = kernels_of(DISTRIBUTION).flash_attn_func(
        *(padded(x).unsqueeze(0) for x in (query, key, value)),
        softmax_scale=softmax_scale,
        mask_mod=_mask_mod(),
        aux_tensors=[blocks.start, blocks.end],
        block_sparse_tensors=block_lists(
            mask_block_cnt=lists.kv_num_blocks,
            mask_block_idx=lists.kv_indices,
            full_block_cnt=lists.full_kv_num_blocks,
            full_block_idx=lists.full_kv_indices,
            block_size=(BLOCK_SIZE, BLOCK_SIZE),
        ),
        block_sparse_tensors_bwd=block_lists(
            mask_block_cnt=lists.q_num_blocks,
            mask_block_idx=lists.q_indices,
            full_block_cnt=lists.full_q_num_blocks,
            full_block_idx=lists.full_q_indices,
            block_size=(BLOCK_SIZE, BLOCK_SIZE),
        ),
    )
    return out.squeeze(0)[: query.shape[0]] * blocks.is_real[:, None, None]


@functools.cache
def _mask_mod() -> Callable[..., Any]:
    """The mask in CUTLASS's language, which is compiled into the kernel; it is the same function
    in every call, because the kernel is compiled once for each function."""
    cute = importlib.import_module("cutlass.cute")
    int32 = importlib.import_module("cutlass").Int32
    to_vector = importlib.import_module("flash_attn.cute.utils").scalar_to_ssa

    @cute.jit
    def sees(batch: Any, head: Any, query: Any, key: Any, seqlen_info: Any, intervals: Any) -> Any:
        start = to_vector(intervals[0][query[0]], int32)
        end = to_vector(intervals[1][query[0]], int32)
        return (key >= start) & (key < end)

    return sees
