"""Assignment on the GPU without waiting for it: start by torch, search by one Triton kernel."""

import functools
import importlib
import importlib.util
import os
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_croc.ops.assignment.start import first_choices, starting_duals

COLUMNS_PER_THREAD = 8
"""Of each vector the kernel keeps. Compiled for sm_90, 2048 columns then take 178 registers and
none is spilled; 16 take all 255 and spill. Which is fastest was not measured."""


class Solved(NamedTuple):
    """Result of `solve_triton`, on the device of the cost."""

    index: Tensor
    """int64 [B, n], -1 past the length and in images that were not solved."""

    duals: Tensor
    """float64 [B, P], at most 0."""

    solved: Tensor
    """bool [B], False: the image's cost is not finite, and the image was left out."""

    num_steps: Tensor
    """int32 [B], lines and columns of the cost read one after the other."""


def unsupported_reason(device: torch.device) -> str | None:
    """What keeps `solve_triton` from running on this device; None: nothing."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"Triton does not run on {device.type}, only its interpreter (TRITON_INTERPRET=1)"
    return None


@torch.no_grad()
def solve_triton(cost: Tensor, lengths: Tensor, *, num_warps: int | None = None) -> Solved:
    """Assign all images; nothing here waits for the device.

    Args:
        cost: float32 or float64 [B, n, P].
        lengths: int64 [B], rows of each image, at most P; on the device of the cost.
        num_warps: of each image's program; by the number of columns if None.
    """
    num_images, num_rows, num_columns = cost.shape
    cost = cost.contiguous()
    index = torch.full((num_images, num_rows), -1, dtype=torch.int64, device=cost.device)
    counted = torch.arange(num_rows, device=cost.device) < lengths.unsqueeze(1)
    is_finite = (cost.isfinite().all(dim=2) | ~counted).all(dim=1)
    duals = cost.new_zeros((num_images, num_columns), dtype=torch.float64)
    num_steps = torch.zeros(num_images, dtype=torch.int32, device=cost.device)
    if index.numel() == 0:
        return Solved(index, duals, is_finite, num_steps)
    lengths = lengths * is_finite
    start = starting_duals(cost, lengths)
    choices = first_choices(cost, lengths, start)
    padded = 1 << (num_columns - 1).bit_length()
    if num_warps is None:
        num_warps = min(16, max(4, padded // (32 * COLUMNS_PER_THREAD)))
    _kernel()[(num_images,)](
        cost,
        lengths.int(),
        start.double(),
        choices.row_of.int(),
        choices.unmatched.int(),
        choices.num_unmatched.int(),
        index,
        duals,
        num_steps,
        num_rows,
        num_columns,
        NUM_PADDED=padded,
        num_warps=num_warps,
    )
    return Solved(index, duals, is_finite, num_steps)


@functools.cache
def _kernel():
    return importlib.import_module("megatron_croc.ops.assignment.triton_kernel").solve_images
