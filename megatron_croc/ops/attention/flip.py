"""Attention under a mixed mask by two causal flash calls: no custom kernel, no wasted pairs.

The mask consists of the lower triangle of every sample (causal) and the strictly upper triangle of
every span. The second is causal too, once its positions are reversed (`FlipPlan`). The key sets of
the two calls are disjoint, so their outputs are merged by their log-sum-exps, as in ring attention:

    out = o1 + w (o2 - o1),  w = sigmoid(lse2 - lse1),  lse = log(exp(lse1) + exp(lse2))

Backward: given the final out and lse of both calls, a flash backward computes the attention weights
exp(scores - lse) of the whole mask. Each call then returns its part of the gradients; they add up.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_croc.ops.attention.contract import QKV, Flash, FlashInputs, FlashOutput, PositionOps
from megatron_croc.ops.attention.position_ops import choose_position_ops
from megatron_croc.ops.flip_plan import CausalCall, FlipPlan


def attend_flip(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: FlipPlan,
    *,
    softmax_scale: float,
    flash: Flash,
    position_ops: PositionOps | None = None,
) -> Tensor:
    """Attention of the positions of `plan`.

    Args:
        query: [R, H, d], at the positions that the plan was made for; a dtype that `flash` takes.
        key: [T, G, d].
        value: [T, G, d].
        plan: `MixedMask.flip` (R = T) or `MixedMask.flip_of`, on the tensors' device.
        softmax_scale: factor of the scores.
        flash: flash attention kernels.
        position_ops: operations that gather and merge; None: the fastest available.

    Returns:
        [R, H, d]; padding is zero, and so are its gradients.
    """
    if position_ops is None:
        position_ops = choose_position_ops(query)
    out = _Flip.apply(query, key, value, plan, softmax_scale, flash, position_ops)
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
        ops: PositionOps,
    ) -> Tensor:
        ctx.plan, ctx.softmax_scale, ctx.flash, ctx.ops = plan, softmax_scale, flash, ops
        tensors = QKV(query, key, value)
        if plan.causal is None:
            ctx.save_for_backward(*tensors)
            return torch.zeros_like(query)
        gathered = ops.gather(tensors, plan.causal)
        output = flash.forward(FlashInputs(gathered, plan.causal, softmax_scale))
        output.out[plan.causal.num_queries :] = 0.0
        if plan.flipped is not None:
            assert plan.flipped.queries is not None
            gathered = ops.gather(tensors, plan.flipped)
            more = flash.forward(FlashInputs(gathered, plan.flipped, softmax_scale))
            ops.merge(output, more, plan.flipped.queries)
        ctx.save_for_backward(*tensors, *output)
        return output.out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor):  # type: ignore[override]
        plan: FlipPlan = ctx.plan
        ops: PositionOps = ctx.ops
        flash: Flash = ctx.flash
        saved = ctx.saved_tensors  # recomputation allows one access
        if plan.causal is None:
            return *(torch.zeros_like(x) for x in saved), *(None,) * 4
        tensors, output = QKV(*saved[:3]), FlashOutput(*saved[3:])
        grad = grad.contiguous()
        gathered = ops.gather(tensors, plan.causal)
        inputs = FlashInputs(gathered, plan.causal, ctx.softmax_scale)
        totals = _scatter(plan.causal, flash.backward(grad, inputs, output), tensors.key)
        if plan.flipped is not None:
            assert plan.flipped.queries is not None
            gathered = ops.gather(tensors, plan.flipped)
            grad, output = ops.gather_outputs(grad, output, plan.flipped.queries)
            inputs = FlashInputs(gathered, plan.flipped, ctx.softmax_scale)
            ops.add(totals, flash.backward(grad, inputs, output), plan.flipped)
        return *totals, *(None,) * 4


def _scatter(call: CausalCall, grads: QKV, key: Tensor) -> QKV:
    """Gradients of the causal call's sources, zero in the padding; `key` gives the shape."""
    d_query, d_key, d_value = grads
    d_query[call.num_queries :] = 0.0
    if call.keys is None:
        d_key[call.num_keys :] = 0.0
        d_value[call.num_keys :] = 0.0
        return grads
    # Two chunks of one sample both use its first keys, so their gradients are summed.
    d_key, d_value = (
        torch.zeros_like(key).index_add_(0, call.keys, grad) for grad in (d_key, d_value)
    )
    return QKV(d_query, d_key, d_value)
