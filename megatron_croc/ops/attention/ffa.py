"""MagiAttention's flex-flash-attention: the mixed mask as a list of rectangles of queries and keys.

Every piece of text, and every span, is one rectangle of its own:

    text [x, y) of the sample that begins at a      queries [x, y), keys [a, y), causal
    span [b, e)                                     queries [b, e), keys [a, e), full

`causal` is aligned to the bottom right: the last query sees the last key. So each query is in
exactly one rectangle, and results need not be added up. A chunk of the pack cuts the queries.

Interface read: `flex_flash_attn_func` of magi_attention 1.1.0 and 1.1.1. Its kernels are for
Hopper. Not run on a GPU so far.
"""

import itertools
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_croc.libraries import name_unknown_version
from megatron_croc.ops.attention.packages import (
    capability,
    kernels_of,
    missing,
    refused_by_cuda_kernels,
    too_old,
)
from megatron_croc.ops.mixed_mask import MixedMask

DISTRIBUTION = "magi-attention"

MAX_HEAD_DIM = 128
"""Largest head dim of its kernels."""

FULL, CAUSAL = 0, 1
"""Values of `attn_type_map`."""

Chunks = tuple[tuple[int, int], ...]


class Rectangles(NamedTuple):
    """Arguments of `flex_flash_attn_func`: rectangles that hold each visible pair once."""

    queries: Tensor
    """int32 [m, 2], [begin, end) of rows of the query tensor."""

    keys: Tensor
    """int32 [m, 2], [begin, end) of positions of the pack."""

    kinds: Tensor
    """int32 [m], `FULL` or `CAUSAL`."""


def unsupported_reason(query: Tensor) -> str | None:
    """Reason against this backend for tensors like `query`; None if it can be used."""
    reason = refused_by_cuda_kernels(query, MAX_HEAD_DIM)
    if reason is None and capability(query.device) != (9, 0):
        reason = f"compute capability {capability(query.device)}, (9, 0) (Hopper) is needed"
    return reason or missing(DISTRIBUTION) or too_old(DISTRIBUTION)


def attend_ffa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: MixedMask,
    chunks: Chunks | None = None,
    *,
    softmax_scale: float,
) -> Tensor:
    """Attention of all positions of a pack, or of the positions of some chunks.

    Args:
        query: [R, H, d].
        key: [T, G, d].
        value: [T, G, d].
        mask: of length T.
        chunks: intervals of the pack whose positions the query holds; None: all of it.
        softmax_scale: factor of the scores.

    Returns:
        [R, H, d].
    """
    name_unknown_version(DISTRIBUTION)
    out, *_ = kernels_of(DISTRIBUTION).flex_flash_attn_func(
        *(query, key, value),
        *_rectangles(mask, chunks),
        softmax_scale=softmax_scale,
        deterministic=torch.are_deterministic_algorithms_enabled(),
        disable_fwd_atomic_reduction=True,  # no query is in two rectangles
    )
    return out


_latest: tuple[MixedMask, Chunks | None, Rectangles] | None = None
"""State of the whole process, listed in docs/design.md."""


def _rectangles(mask: MixedMask, chunks: Chunks | None) -> Rectangles:
    """Rectangles on the device of the mask; all layers of a pass share them."""
    global _latest
    if _latest is None or _latest[0] is not mask or _latest[1] != chunks:
        found = rectangles(mask, chunks)
        on_device = (x.to(mask.device, non_blocking=True) for x in found)
        _latest = (mask, chunks, Rectangles(*on_device))
    return _latest[2]


def rectangles(mask: MixedMask, chunks: Chunks | None = None) -> Rectangles:
    """Rectangles of a mask, computed on the host.

    Args:
        mask: any mask. Its padding is one more causal piece, so that no row stays unwritten.
        chunks: ascending intervals of the pack; the query tensor holds their positions, one chunk
            after the other. None: the whole pack.
    """
    rows: list[tuple[int, int, int, int, int]] = []
    first_row = 0
    pieces = list(_pieces(mask))
    for begin, end in ((0, mask.length),) if chunks is None else chunks:
        for sample, x, y, kind in pieces:
            low, high = max(x, begin), min(y, end)
            if low < high:
                last_key = high if kind == CAUSAL else y
                offset = first_row - begin
                rows.append((low + offset, high + offset, sample, last_key, kind))
        first_row += end - begin
    table = torch.tensor(rows, dtype=torch.int32).reshape(-1, 5)
    return Rectangles(*(x.contiguous() for x in (table[:, :2], table[:, 2:4], table[:, 4])))


def _pieces(mask: MixedMask) -> list[tuple[int, int, int, int]]:
    """(begin of the sample, begin, end, kind) of each piece of text, span and padding."""
    found: list[tuple[int, int, int, int]] = []
    spans = iter([*mask.span_bounds, (mask.length, mask.length)])
    span = next(spans)
    bounds = mask.bounds if mask.bounds[-1] == mask.length else (*mask.bounds, mask.length)
    for sample, end in itertools.pairwise(bounds):
        at = sample
        while at < end:
            if at < span[0]:
                stop = min(span[0], end)
                found.append((sample, at, stop, CAUSAL))
            else:
                stop = span[1]
                found.append((sample, at, stop, FULL))
                span = next(spans)
            at = stop
    return found
