"""megatron's gradient and parameter buffers without collectives in groups of one rank.

With one replica, gradients are reduced over a group of one and parameters gathered from it. The
result is what is there already, but a backend may copy it: gloo copies the whole buffer in another
thread. The replacements hold for the whole process (docs/design.md, "State that belongs to the
whole process").
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch.distributed as dist
from megatron.core.distributed import param_and_grad_buffer
from torch import Tensor


def unless_alone(collective: Callable[..., Any]) -> Callable[..., Any]:
    """Return the collective (output, input, ..., group=) for groups of several ranks only."""

    @wraps(collective)
    def call(output: Tensor, source: Tensor, *, group: dist.ProcessGroup, **options: Any) -> Any:
        if dist.get_world_size(group) > 1:
            return collective(output, source, group=group, **options)
        if output.data_ptr() != source.data_ptr():  # megatron's are views of one buffer
            output.copy_(source)
        return None  # no work to wait for

    call.is_unless_alone = True  # type: ignore[attr-defined]
    return call


def skip_groups_of_one() -> None:
    """Replace the two collectives of megatron's buffers; again has no effect."""
    for name in ("dist_reduce_scatter_func", "dist_all_gather_func"):
        collective = getattr(param_and_grad_buffer, name)
        if not hasattr(collective, "is_unless_alone"):
            setattr(param_and_grad_buffer, name, unless_alone(collective))
