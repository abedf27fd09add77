"""Module that is left out of a micro-batch without computing anything in its place.

Ranks of one data-parallel group must reduce the gradients, and gather the weights, of the same
buckets in the same order. A rank that has no input for a trained module therefore reports gradients
of zero for it, and runs the hooks that its forward pass would have run.
"""

from typing import Any

import torch
from torch import Tensor, nn


def leave_out(module: nn.Module, output: Tensor) -> Tensor:
    """Return `output` with a link to the trained weights of `module`, whose gradients are zero.

    Args:
        module: not called in this micro-batch.
        output: in place of its output; without elements.
    """
    for part in module.modules():
        for hook in part._forward_pre_hooks.values():  # they wait for gathered weights
            hook(part, ())
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    if not trained or not torch.is_grad_enabled():
        return output
    linked = _ZeroGradients.apply(output, *trained)
    assert isinstance(linked, Tensor)
    return linked


class _ZeroGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx, output: Tensor, *parameters: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(*parameters)
        return output.view_as(output)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Any:  # type: ignore[override]
        # One zero, expanded: torch makes each gradient whole only while megatron adds it.
        return None, *(p.new_zeros(()).expand_as(p) for p in ctx.saved_tensors)
