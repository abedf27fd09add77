"""Flash attention for machines without a GPU, so that the code above the kernels can be tested."""

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from megatron_croc.ops.attention.contract import QKV, FlashInputs, FlashOutput
from megatron_croc.ops.flip_plan import CausalCall


class EmulatedFlash:
    """Plain attention with the interface of the kernels, on a CPU and in any floating dtype.

    Scores are computed in float32 (float64 for float64), one piece at a time: quadratic memory.
    Positions outside all pieces are NaN, so that tests find a caller that does not zero them.
    """

    name = "emulated flash"
    distribution = None

    def unsupported_reason(self, query: Tensor) -> str | None:
        """Reason on a GPU: without flash kernels, other backends are faster than the flip there."""
        return f"the tensors are on {query.device}, it is for CPUs" if query.is_cuda else None

    def forward(self, inputs: FlashInputs) -> FlashOutput:
        """See `Flash`; lse is float64 for float64."""
        (query, key, value), call, softmax_scale = inputs
        accumulation = torch.promote_types(query.dtype, torch.float32)
        out = torch.full_like(query, torch.nan)
        lse = query.new_full((query.shape[1], query.shape[0]), torch.nan, dtype=accumulation)
        for rows, columns in _pieces(call):
            k, v = _grouped(key[columns], key), _grouped(value[columns], key)
            scores = _causal_scores(_grouped(query[rows], key), k, softmax_scale)
            piece_lse = scores.logsumexp(dim=-1)
            out[rows] = _ungrouped((scores - piece_lse.unsqueeze(-1)).exp() @ v).to(out.dtype)
            lse[:, rows] = piece_lse.flatten(0, 1)
        return FlashOutput(out, lse)

    def backward(self, grad: Tensor, inputs: FlashInputs, output: FlashOutput) -> QKV:
        """See `Flash`."""
        (query, key, value), call, softmax_scale = inputs
        d_query, d_key, d_value = (torch.full_like(x, torch.nan) for x in inputs.tensors)
        for rows, columns in _pieces(call):
            q, o, d_out = (_grouped(x[rows], key) for x in (query, output.out, grad))
            k, v = _grouped(key[columns], key), _grouped(value[columns], key)
            piece_lse = output.lse[:, rows].reshape(*q.shape[:3], 1)
            weights = (_causal_scores(q, k, softmax_scale) - piece_lse).exp()
            delta = (d_out * o).sum(dim=-1, keepdim=True)
            d_scores = weights * (d_out @ v.mT - delta) * softmax_scale
            d_query[rows] = _ungrouped(d_scores @ k).to(query.dtype)
            # All query heads of a group use its keys and values, so their gradients are summed.
            d_key[columns] = _ungrouped((d_scores.mT @ q).sum(1, keepdim=True)).to(key.dtype)
            d_value[columns] = _ungrouped((weights.mT @ d_out).sum(1, keepdim=True)).to(value.dtype)
        return QKV(d_query, d_key, d_value)


def _pieces(call: CausalCall) -> Iterator[tuple[slice, slice]]:
    """Queries and keys of each piece; rows and columns of its scores."""
    bounds = (itertools.pairwise(cu.tolist()) for cu in (call.cu_queries, call.cu_keys))
    for rows, columns in zip(*bounds, strict=True):
        yield slice(*rows), slice(*columns)


def _grouped(x: Tensor, key: Tensor) -> Tensor:
    """[n, H, d] -> [G, H / G, n, d] in the dtype of the sums; G is read from `key`."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return x.unflatten(1, (key.shape[1], -1)).permute(1, 2, 0, 3)


def _ungrouped(x: Tensor) -> Tensor:
    """[G, H / G, n, d] -> [n, H, d]."""
    return x.permute(2, 0, 1, 3).flatten(1, 2)


def _causal_scores(query: Tensor, key: Tensor, softmax_scale: float) -> Tensor:
    """Scores [G, H / G, n, m]; -inf above the diagonal through the bottom right corner."""
    n, m = query.shape[2], key.shape[2]
    hidden = torch.ones(n, m, dtype=torch.bool, device=query.device).triu(m - n + 1)
    return (query @ key.mT * softmax_scale).masked_fill(hidden, float("-inf"))


EMULATED = EmulatedFlash()
