"""The readable reference: scaled-dot-product attention with the dense mask."""

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from megatron_croc.ops.mixed_mask import MixedMask


def attend_dense(
    query: Tensor, key: Tensor, value: Tensor, mask: MixedMask, *, softmax_scale: float
) -> Tensor:
    """softmax(scale * Q K^T + mask) V over one packed row. See `attend` for the shapes."""
    repeats = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(repeats, dim=1) for x in (key, value))
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (query, key, value))  # [1, H, T, d]
    out = scaled_dot_product_attention(
        q, k, v, attn_mask=_visible_cached(mask), scale=softmax_scale
    )
    return out.squeeze(0).transpose(0, 1).contiguous()


_last: tuple[MixedMask, Tensor] | None = None


def _visible_cached(mask: MixedMask) -> Tensor:
    """The dense mask of the latest row: all layers of one forward pass share it."""
    global _last
    if _last is None or _last[0] is not mask:
        _last = (mask, mask.visible())
    return _last[1]


def attend_full(query: Tensor, key: Tensor, value: Tensor, *, softmax_scale: float) -> Tensor:
    """Unmasked attention of a batch of equal rows: [s, b, H, d] each, out alike."""
    q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))  # [b, H, s, d]
    out = scaled_dot_product_attention(q, k, v, scale=softmax_scale)
    return out.permute(2, 0, 1, 3).contiguous()


def attend_formula(
    query: Tensor, key: Tensor, value: Tensor, visible: Tensor, *, softmax_scale: float
) -> Tensor:
    """The definition, one line each; what every backend is tested against (use float64)."""
    repeats = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(repeats, dim=1) for x in (key, value))
    scores = torch.einsum("qhd,khd->hqk", query, key) * softmax_scale
    weights = scores.masked_fill(~visible, float("-inf")).softmax(dim=-1)
    return torch.einsum("hqk,khd->qhd", weights, value)
