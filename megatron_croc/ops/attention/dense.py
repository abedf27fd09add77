"""Readable reference: scaled-dot-product attention with the dense mask of each sample."""

from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from megatron_croc.ops.mixed_mask import MixedMask


def attend_dense(
    query: Tensor, key: Tensor, value: Tensor, mask: MixedMask, *, softmax_scale: float
) -> Tensor:
    """softmax(scale * Q K^T + mask) V, one sample at a time. See `attend` for the shapes."""
    repeats = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(repeats, dim=1) for x in (key, value))
    outputs = []
    # One split has one backward; a slice for each sample would fill a whole pack of zeros each.
    lengths = [end - begin for begin, end in pairwise([*mask.bounds, len(query)])]
    samples = zip(*(x.split(lengths) for x in (query, key, value)), strict=True)
    for (q, k, v), visible in zip(samples, _sample_masks(mask), strict=False):
        q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
        out = scaled_dot_product_attention(
            q, k, v, attn_mask=visible, is_causal=visible is None, scale=softmax_scale
        )
        outputs.append(out.squeeze(0).transpose(0, 1))
    outputs.append(torch.zeros_like(query[mask.bounds[-1] :]))
    return torch.cat(outputs)


_latest: tuple[MixedMask, list[Tensor | None]] | None = None
"""State of the whole process, listed in docs/design.md."""


def _sample_masks(mask: MixedMask) -> list[Tensor | None]:
    """Dense mask of each sample, None if it is causal; all layers of a pass share them."""
    global _latest
    if _latest is None or _latest[0] is not mask:
        _latest = (mask, [_sample_mask(mask, sample) for sample in range(mask.num_samples)])
    return _latest[1]


def _sample_mask(mask: MixedMask, sample: int) -> Tensor | None:
    begin, end = mask.bounds[sample : sample + 2]
    spans = [(b - begin, e - begin) for b, e in mask.span_bounds if begin <= b < end]
    if not spans:
        return None
    return MixedMask.build([0, end - begin], spans).to(mask.device).visible()


def attend_positions(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: MixedMask,
    positions: Tensor,
    *,
    softmax_scale: float,
) -> Tensor:
    """Attention of some positions of a pack to the whole pack.

    Args:
        query: [R, H, d].
        key: [T, G, d].
        value: [T, G, d].
        mask: of length T.
        positions: int64 [R], positions of the queries.
        softmax_scale: factor of the scores.

    Returns:
        [R, H, d].
    """
    repeats = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(repeats, dim=1) for x in (key, value))
    start, end = (x[positions] for x in mask.intervals())
    key_position = torch.arange(mask.length, device=query.device)
    visible = (key_position >= start[:, None]) & (key_position < end[:, None])
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (query, key, value))
    out = scaled_dot_product_attention(q, k, v, attn_mask=visible, scale=softmax_scale)
    return out.squeeze(0).transpose(0, 1)


def attend_full(query: Tensor, key: Tensor, value: Tensor, *, softmax_scale: float) -> Tensor:
    """Attention without a mask: query, key, value and result are [s, b, H, d]."""
    q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))  # [b, H, s, d]
    out = scaled_dot_product_attention(q, k, v, scale=softmax_scale)
    return out.permute(2, 0, 1, 3).contiguous()


def attend_formula(
    query: Tensor, key: Tensor, value: Tensor, visible: Tensor, *, softmax_scale: float
) -> Tensor:
    """Definition of masked attention; every backend is tested against it, in float64.

    Args:
        query: [R, H, d].
        key: [T, G, d].
        value: [T, G, d].
        visible: bool [R, T], True where the query sees the key.
        softmax_scale: factor of the scores.

    Returns:
        [R, H, d].
    """
    repeats = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(repeats, dim=1) for x in (key, value))
    scores = torch.einsum("qhd,khd->hqk", query, key) * softmax_scale
    weights = scores.masked_fill(~visible, float("-inf")).softmax(dim=-1)
    return torch.einsum("hqk,khd->qhd", weights, value)
