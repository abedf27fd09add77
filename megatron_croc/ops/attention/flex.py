"""FlexAttention under a mixed mask: the block lists come straight from the row intervals.

torch's `create_block_mask` evaluates the mask pair by pair; here a block's row of keys is known
from the smallest and largest interval bounds of its queries. On CUDA the kernel is compiled at the
first call, once per length: rows are padded to a multiple of `LENGTH_BUCKET` so that there are few.
On a CPU it runs uncompiled, for tests of the block lists. Not run on a GPU so far.

torch has two kernels for it: Triton's, and FlashAttention 4's, which torch calls experimental and
leaves to the caller to ask for; `kernel_options` asks where it can run.
"""

import functools
import importlib.util
import logging
from collections.abc import Callable

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
    rows: Tensor | None = None,
    *,
    softmax_scale: float,
) -> Tensor:
    """Attention of some rows, or of all of them.

    Args:
        query: [R, H, d]; row i is the row `rows[i]` of the mask.
        key: [T, G, d].
        value: [T, G, d].
        mask: of length T.
        rows: int64 [R]; None: all, R = T.
        softmax_scale: factor of the scores.

    Returns:
        [R, H, d]; rows of padding are zero.
    """
    num_rows, num_keys = query.shape[0], key.shape[0]
    block_mask, is_real = _block_mask(mask, rows)
    q, k, v = (
        pad(x, (0, 0, 0, 0, 0, -x.shape[0] % LENGTH_BUCKET)).transpose(0, 1).unsqueeze(0)
        for x in (query, key, value)
    )
    attention = _compiled() if query.is_cuda else flex_attention
    out = attention(
        q,
        k,
        v,
        block_mask=block_mask,
        scale=softmax_scale,
        enable_gqa=q.shape[1] != k.shape[1],
        kernel_options=kernel_options(query),
    )
    assert isinstance(out, Tensor) and num_keys == mask.length
    return out.squeeze(0).transpose(0, 1)[:num_rows] * is_real[:, None, None]


def kernel_options(query: Tensor) -> "torch_flex.FlexKernelOptions | None":
    """What FlexAttention is told about its kernel; None leaves the choice (Triton's) to torch."""
    if not query.is_cuda:
        return None
    reason = _flash_unsupported_reason(query)
    if reason is None:
        log_once(_logger, logging.INFO, "attention backend flex stands on FlashAttention 4")
        return {"BACKEND": "FLASH"}
    log_once(_logger, logging.INFO, "attention backend flex stands on Triton: %s", reason)
    return None


def _flash_unsupported_reason(query: Tensor) -> str | None:
    """Why FlexAttention cannot run on FlashAttention 4; None when it can."""
    options = getattr(torch_flex, "FlexKernelOptions", None)
    if "BACKEND" not in getattr(options, "__annotations__", {}):
        return f"torch {torch.__version__} has no other kernel"
    if not _has_flash_attention_4():
        return "flash-attn-4 (flash_attn.cute) is not installed"
    major, minor = torch.cuda.get_device_capability(query.device)
    if major != 9:  # Blackwell's wants blocks of 256 queries
        return f"sm_{major}{minor}; FlashAttention 4 is used on Hopper, sm_90"
    if query.dtype not in (torch.float16, torch.bfloat16):
        return f"{query.dtype} tensors, FlashAttention 4 takes float16 and bfloat16"
    if query.shape[-1] not in FLASH_HEAD_DIMS:
        return f"head dim {query.shape[-1]}, FlashAttention 4 takes {FLASH_HEAD_DIMS} here"
    if torch.are_deterministic_algorithms_enabled():
        return "its backward pass under a mask is not deterministic"
    return None


@functools.cache
def _has_flash_attention_4() -> bool:
    try:
        return importlib.util.find_spec("flash_attn.cute") is not None
    except (ImportError, OSError, ValueError):  # of flash_attn itself, which is imported for it
        return False


@functools.cache
def _compiled() -> Callable[..., Tensor]:
    return torch.compile(flex_attention, dynamic=False)  # type: ignore[return-value]


_latest: tuple[MixedMask, Tensor | None, BlockMask, Tensor] | None = None
"""State of the whole process, listed in docs/design.md."""


def _block_mask(mask: MixedMask, rows: Tensor | None) -> tuple[BlockMask, Tensor]:
    """The block mask, and bool [R]: which rows are real; all layers of a pass share them."""
    global _latest
    if _latest is None or _latest[0] is not mask or _latest[1] is not rows:
        start, end = mask.intervals()
        is_real = torch.arange(mask.length, device=mask.device) < mask.bounds[-1]
        if rows is not None:
            start, end, is_real = start[rows], end[rows], is_real[rows]
        _latest = (mask, rows, build_block_mask(start, end, mask.length), is_real)
    return _latest[2], _latest[3]


def build_block_mask(start: Tensor, end: Tensor, num_keys: int) -> BlockMask:
    """FlexAttention's block lists for rows that see [start, end).

    Args:
        start: int64 [R].
        end: int64 [R].
        num_keys: keys of the row.

    Returns:
        the block mask of rows and keys padded to multiples of LENGTH_BUCKET; a padded row sees
        the first key only. No device sync.
    """
    padding = -start.numel() % LENGTH_BUCKET
    start, end = pad(start, (0, padding), value=0), pad(end, (0, padding), value=1)
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
    """bool [rows, columns] -> (counts [1, 1, rows], columns chosen first [1, 1, rows, columns])."""
    order = chosen.int().argsort(dim=-1, descending=True, stable=True)
    return chosen.sum(-1, dtype=torch.int32)[None, None], order.int()[None, None]
