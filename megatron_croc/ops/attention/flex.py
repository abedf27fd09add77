"""FlexAttention under a mixed mask, with block lists computed from the mask's intervals.

torch's `create_block_mask` evaluates the mask for every pair. Here the smallest and largest bounds
of the intervals of a block of queries determine its blocks of keys. On CUDA the kernel is compiled
once for each length; packs are padded to a multiple of `LENGTH_BUCKET`, so there are few lengths.
On a CPU it is not compiled and serves the tests of the block lists. Not run on a GPU so far.

torch has two kernels: Triton's, and FlashAttention 4's, which torch calls experimental and uses on
request only; `kernel_options` requests it where it can run.
"""

import functools
import importlib.util
import logging
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import flex_attention as torch_flex
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.functional import pad

from megatron_croc.log import get_logger, log_once
from megatron_croc.ops.mixed_mask import MixedMask

BLOCK_SIZE = 128
LENGTH_BUCKET = 1024
MIN_HEAD_DIM = 16

FLASH_HEAD_DIMS = (64, 96, 128)
"""Head dims for which FlashAttention 4 has kernels for both passes on Hopper."""

_logger = get_logger(__name__)


def attend_flex(
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
    num_queries, num_keys = query.shape[0], key.shape[0]
    blocks = blocks_of(mask, positions)
    q, k, v = (padded(x).transpose(0, 1).unsqueeze(0) for x in (query, key, value))
    attention = _compiled() if query.is_cuda else flex_attention
    out = attention(
        q,
        k,
        v,
        block_mask=blocks.mask,
        scale=softmax_scale,
        enable_gqa=q.shape[1] != k.shape[1],
        kernel_options=kernel_options(query),
    )
    assert isinstance(out, Tensor) and num_keys == mask.length
    return out.squeeze(0).transpose(0, 1)[:num_queries] * blocks.is_real[:, None, None]


def padded(x: Tensor) -> Tensor:
    """[n, heads, head dim], n filled up with zeros to a multiple of `LENGTH_BUCKET`."""
    return pad(x, (0, 0, 0, 0, 0, -x.shape[0] % LENGTH_BUCKET))


def kernel_options(query: Tensor) -> "torch_flex.FlexKernelOptions | None":
    """Kernel options for FlexAttention; None leaves the choice to torch, which uses Triton's."""
    if not query.is_cuda:
        return None
    reason = _no_other_kernel() or flash_4_unsupported_reason(query)
    if reason is None:
        log_once(_logger, logging.INFO, "attention backend flex uses FlashAttention 4")
        return {"BACKEND": "FLASH"}
    log_once(_logger, logging.INFO, "attention backend flex uses Triton: %s", reason)
    return None


def _no_other_kernel() -> str | None:
    options = getattr(torch_flex, "FlexKernelOptions", None)
    has_choice = "BACKEND" in getattr(options, "__annotations__", {})
    return None if has_choice else f"torch {torch.__version__} has no other kernel"


def flash_4_unsupported_reason(query: Tensor) -> str | None:
    """Reason against FlashAttention 4 under a mask; None if it can be used."""
    if not query.is_cuda:
        return f"the tensors are on {query.device}, CUDA is needed"
    if not _has_flash_attention_4():
        return "flash-attn-4 (flash_attn.cute) is not installed"
    major, minor = torch.cuda.get_device_capability(query.device)
    if major != 9:  # Blackwell needs blocks of 256 queries
        return f"sm_{major}{minor}; FlashAttention 4 is used on Hopper, sm_90"
    if query.dtype not in (torch.float16, torch.bfloat16):
        return f"{query.dtype} tensors, FlashAttention 4 takes float16 and bfloat16"
    if query.shape[-1] not in FLASH_HEAD_DIMS:
        return f"head dim {query.shape[-1]}, FlashAttention 4 takes one of {FLASH_HEAD_DIMS}"
    if torch.are_deterministic_algorithms_enabled():
        return "its backward pass under a mask is not deterministic"
    return None


@functools.cache
def _has_flash_attention_4() -> bool:
    try:
        return importlib.util.find_spec("flash_attn.cute") is not None
    except (ImportError, OSError, ValueError):  # raised by flash_attn, its parent package
        return False


@functools.cache
def _compiled() -> Callable[..., Tensor]:
    return torch.compile(flex_attention, dynamic=False)  # type: ignore[return-value]


class Blocks(NamedTuple):
    """Block lists of a mask, and the intervals that they come from."""

    mask: BlockMask
    """Lists of `padded` queries and keys."""

    is_real: Tensor
    """bool [R], False for padding of the pack."""

    start: Tensor
    """int32 [padded R]: a query sees the keys [start, end)."""

    end: Tensor
    """int32 [padded R]."""


_latest: tuple[MixedMask, Tensor | None, Blocks] | None = None
"""State of the whole process, listed in docs/design.md."""


def blocks_of(mask: MixedMask, positions: Tensor | None) -> Blocks:
    """Block lists of all queries of a mask, or of some; all layers of a pass share them."""
    global _latest
    if _latest is None or _latest[0] is not mask or _latest[1] is not positions:
        start, end = mask.intervals()
        is_real = torch.arange(mask.length, device=mask.device) < mask.bounds[-1]
        if positions is not None:
            start, end, is_real = start[positions], end[positions], is_real[positions]
        start, end = padded_intervals(start, end)
        blocks = build_block_mask(start, end, mask.length)
        _latest = (mask, positions, Blocks(blocks, is_real, start.int(), end.int()))
    return _latest[2]


def padded_intervals(start: Tensor, end: Tensor) -> tuple[Tensor, Tensor]:
    """Bounds of `padded` queries; one of this padding sees the first key only."""
    padding = -start.numel() % LENGTH_BUCKET
    return pad(start, (0, padding), value=0), pad(end, (0, padding), value=1)


def build_block_mask(start: Tensor, end: Tensor, num_keys: int) -> BlockMask:
    """FlexAttention's block lists for queries that see the keys [start, end).

    Args:
        start: int64 [padded R].
        end: int64 [padded R].
        num_keys: keys of the pack.

    Returns:
        block mask of `padded` queries and keys. No device sync.
    """
    padded_keys = num_keys + -num_keys % LENGTH_BUCKET
    block = torch.arange(padded_keys // BLOCK_SIZE, device=start.device) * BLOCK_SIZE
    starts, ends = start.view(-1, BLOCK_SIZE, 1), end.view(-1, BLOCK_SIZE, 1)
    touched = (block < ends.amax(1)) & (block + BLOCK_SIZE > starts.amin(1))
    full = (block >= starts.amax(1)) & (block + BLOCK_SIZE <= ends.amin(1))

    def sees(batch: Tensor, head: Tensor, row: Tensor, column: Tensor) -> Tensor:
        return (column >= start[row]) & (column < end[row])

    return BlockMask.from_kv_blocks(
        *_block_lists(touched & ~full),
        *_block_lists(full),
        BLOCK_SIZE=BLOCK_SIZE,
        mask_mod=sees,
        seq_lengths=(start.numel(), padded_keys),
    )


def _block_lists(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """bool [rows, columns] -> (counts [1, 1, rows], chosen columns first [1, 1, rows, columns])."""
    order = chosen.int().argsort(dim=-1, descending=True, stable=True)
    return chosen.sum(-1, dtype=torch.int32)[None, None], order.int()[None, None]
