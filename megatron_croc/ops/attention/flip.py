"""A mixed mask out of two causal flash calls: no custom kernel, no pair computed in vain.

The mask is the lower triangle of every sample (causal) and the strictly upper triangle of every
span, which becomes causal when its rows are read backwards (`FlipPlan`). The two calls see
disjoint keys, so their outputs merge by their log-sum-exps, as the ranks of ring attention do:

    out = o1 + w (o2 - o1),  w = sigmoid(lse2 - lse1),  lse = log(exp(lse1) + exp(lse2))

Backward: given the FINAL out and lse, a flash backward computes weights exp(scores - lse) that are
right for the whole mask, so each call gives its pairs' share of the gradients, and shares add.

The gathers and the merge are torch operations. A fused kernel for them would take the place of
`_gather` and `_merge`; there is none yet.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_croc.ops.attention.flash import Flash
from megatron_croc.ops.mixed_mask import CausalCall, FlipPlan


def attend_flip(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: FlipPlan,
    *,
    softmax_scale: float,
    flash: Flash,
) -> Tensor:
    """Attention of the plan's rows.

    Args:
        query: [R, H, d], the rows the plan was made for; dtype as `flash` takes it.
        key: [T, G, d].
        value: [T, G, d].
        plan: `MixedMask.flip` (R = T) or `MixedMask.flip_of`, on the tensors' device.
        softmax_scale: factor of the scores.
        flash: the kernels.

    Returns:
        [R, H, d]; rows of padding are zero, and so are their gradients.
    """
    out = _Flip.apply(query, key, value, plan, softmax_scale, flash)
    assert isinstance(out, Tensor)
    return out


class _Flip(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        plan: FlipPlan,
        softmax_scale: float,
        flash: Flash,
    ) -> Tensor:
        ctx.plan, ctx.softmax_scale, ctx.flash = plan, softmax_scale, flash
        if plan.causal is None:
            ctx.save_for_backward(query, key, value)
            return torch.zeros_like(query)
        inputs = _gather(plan.causal, query, key, value)
        out, lse = flash.forward(*inputs, plan.causal, softmax_scale)
        out[plan.causal.num_queries :] = 0.0
        if plan.flipped is not None:
            inputs = _gather(plan.flipped, query, key, value)
            more, more_lse = flash.forward(*inputs, plan.flipped, softmax_scale)
            assert plan.flipped.queries is not None
            _merge(out, lse, more, more_lse, plan.flipped.queries)
        ctx.save_for_backward(query, key, value, out, lse)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor):  # type: ignore[override]
        plan: FlipPlan = ctx.plan
        if plan.causal is None:
            return *(torch.zeros_like(x) for x in ctx.saved_tensors), None, None, None
        query, key, value, out, lse = ctx.saved_tensors
        grad = grad.contiguous()
        inputs = _gather(plan.causal, query, key, value)
        grads = ctx.flash.backward(grad, *inputs, out, lse, plan.causal, ctx.softmax_scale)
        d_query, d_key, d_value = _placed(plan.causal, grads, key)
        if plan.flipped is not None:
            call = plan.flipped
            assert call.queries is not None and call.keys is not None
            inputs = _gather(call, query, key, value)
            grad, out = (x.index_select(0, call.queries) for x in (grad, out))
            lse = lse.index_select(1, call.queries)
            shares = ctx.flash.backward(grad, *inputs, out, lse, call, ctx.softmax_scale)
            # Spans are disjoint, so no row of a span is added to twice.
            d_query.index_add_(0, call.queries, shares[0])
            d_key.index_add_(0, call.keys, shares[1])
            d_value.index_add_(0, call.keys, shares[2])
        return d_query, d_key, d_value, None, None, None


def _gather(
    call: CausalCall, query: Tensor, key: Tensor, value: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The rows the call reads, in the order it reads them."""
    if call.queries is not None:
        query = query.index_select(0, call.queries)
    if call.keys is not None:
        key, value = (x.index_select(0, call.keys) for x in (key, value))
    return query, key, value


def _merge(out: Tensor, lse: Tensor, more: Tensor, more_lse: Tensor, rows: Tensor) -> None:
    """Fold attention to further keys (more [r, H, d], [H, r]) into rows of (out, lse), in place."""
    before, before_lse = out.index_select(0, rows), lse.index_select(1, rows)
    weight = torch.sigmoid(more_lse - before_lse).t().unsqueeze(-1)  # [r, H, 1]
    merged = torch.lerp(before.to(weight.dtype), more.to(weight.dtype), weight)
    out.index_copy_(0, rows, merged.to(out.dtype))
    lse.index_copy_(1, rows, torch.logaddexp(before_lse, more_lse))


def _placed(
    call: CausalCall, grads: tuple[Tensor, Tensor, Tensor], key: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The causal call's gradients as those of the tensors it gathered from, padding zeroed."""
    d_query, d_key, d_value = grads
    d_query[call.num_queries :] = 0.0
    if call.keys is None:
        d_key[call.num_keys :] = 0.0
        d_value[call.num_keys :] = 0.0
        return d_query, d_key, d_value
    # Chunks of one sample read its first keys each: those gradients add.
    d_key, d_value = (
        torch.zeros_like(key).index_add_(0, call.keys, grad) for grad in (d_key, d_value)
    )
    return d_query, d_key, d_value
