"""A mixed mask out of two causal flash calls: no custom kernel, no pair computed in vain.

The mask is the lower triangle of every sample (causal) and the strictly upper triangle of every
span, which becomes causal when its rows are read backwards (`FlipPlan`). The two calls see
disjoint keys, so their outputs merge by their log-sum-exps, as the ranks of ring attention do:

    out = o1 + w (o2 - o1),  w = sigmoid(lse2 - lse1),  lse = log(exp(lse1) + exp(lse2))

Backward: given the FINAL out and lse, a flash backward computes weights exp(scores - lse) that are
right for the whole mask, so each call gives its pairs' share of the gradients, and shares add.

Rows are gathered and merged by rows.py, fused where Triton runs.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_croc.ops.attention.contract import QKV, Flash, Rows
from megatron_croc.ops.attention.rows import choose_rows
from megatron_croc.ops.flip_plan import CausalCall, FlipPlan


def attend_flip(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: FlipPlan,
    *,
    softmax_scale: float,
    flash: Flash,
    rows: Rows | None = None,
) -> Tensor:
    """Attention of the plan's rows.

    Args:
        query: [R, H, d], the rows the plan was made for; dtype as `flash` takes it.
        key: [T, G, d].
        value: [T, G, d].
        plan: `MixedMask.flip` (R = T) or `MixedMask.flip_of`, on the tensors' device.
        softmax_scale: factor of the scores.
        flash: the kernels.
        rows: how rows are gathered and merged; default: the fastest that runs here.

    Returns:
        [R, H, d]; rows of padding are zero, and so are their gradients.
    """
    if rows is None:
        rows = choose_rows(query)
    out = _Flip.apply(query, key, value, plan, softmax_scale, flash, rows)
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
        rows: Rows,
    ) -> Tensor:
        ctx.plan, ctx.softmax_scale, ctx.flash, ctx.rows = plan, softmax_scale, flash, rows
        inputs = QKV(query, key, value)
        if plan.causal is None:
            ctx.save_for_backward(*inputs)
            return torch.zeros_like(query)
        out, lse = flash.forward(rows.gather(inputs, plan.causal), plan.causal, softmax_scale)
        out[plan.causal.num_queries :] = 0.0
        if plan.flipped is not None:
            assert plan.flipped.queries is not None
            read = rows.gather(inputs, plan.flipped)
            more, more_lse = flash.forward(read, plan.flipped, softmax_scale)
            rows.merge(out, lse, more, more_lse, plan.flipped.queries)
        ctx.save_for_backward(*inputs, out, lse)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor):  # type: ignore[override]
        plan: FlipPlan = ctx.plan
        rows: Rows = ctx.rows
        flash: Flash = ctx.flash
        if plan.causal is None:
            return *(torch.zeros_like(x) for x in ctx.saved_tensors), *(None,) * 4
        query, key, value, out, lse = ctx.saved_tensors
        inputs = QKV(query, key, value)
        grad = grad.contiguous()
        read = rows.gather(inputs, plan.causal)
        grads = flash.backward(grad, read, out, lse, plan.causal, ctx.softmax_scale)
        totals = _placed(plan.causal, grads, key)
        if plan.flipped is not None:
            assert plan.flipped.queries is not None
            read = rows.gather(inputs, plan.flipped)
            grad, out, lse = rows.gather_outputs(grad, out, lse, plan.flipped.queries)
            shares = flash.backward(grad, read, out, lse, plan.flipped, ctx.softmax_scale)
            rows.add(totals, shares, plan.flipped)
        return *totals, *(None,) * 4


def _placed(call: CausalCall, grads: QKV, key: Tensor) -> QKV:
    """The causal call's gradients as those of the tensors it gathered from, padding zeroed."""
    d_query, d_key, d_value = grads
    d_query[call.num_queries :] = 0.0
    if call.keys is None:
        d_key[call.num_keys :] = 0.0
        d_value[call.num_keys :] = 0.0
        return grads
    # Chunks of one sample read its first keys each: those gradients add.
    d_key, d_value = (
        torch.zeros_like(key).index_add_(0, call.keys, grad) for grad in (d_key, d_value)
    )
    return QKV(d_query, d_key, d_value)
