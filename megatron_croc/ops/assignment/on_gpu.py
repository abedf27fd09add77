"""Assignment on the GPU without a device sync: torch for the start, a Triton kernel to search."""

import functools
import importlib
import importlib.util
import os
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_croc.ops.assignment.start import first_choices, starting_duals

COLUMNS_PER_THREAD = 8
"""Columns of each vector of the kernel that one thread holds.

Compiled for sm_90 at 2048 columns, 8 need 178 registers without spills; 16 need all 255 and spill.
The speed was not measured."""


class Solved(NamedTuple):
    """Result of `solve_triton`, on the device of the cost."""

    index: Tensor
    """int64 [B, n], -1 in the padding of an image and in images that are not solved."""

    duals: Tensor
    """float64 [B, P], at most 0."""

    solved: Tensor
    """bool [B], False where the cost of an image is not finite."""

    num_steps: Tensor
    """int32 [B], rows and columns of the cost that were read one after the other."""


def unsupported_reason(device: torch.device) -> str | None:
    """Reason against `solve_triton` on this device; None if it can run."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"Triton does not run on {device.type}, only its interpreter (TRITON_INTERPRET=1)"
    return None


@torch.no_grad()
def solve_triton(cost: Tensor, lengths: Tensor, *, num_warps: int | None = None) -> Solved:
    """Assign all images, without a device sync.

    Args:
        cost: float32 or float64 [B, n, P].
        lengths: int64 [B], rows of each image, at most P; on the device of the cost.
        num_warps: warps of the program of one image; None: chosen by the number of columns.
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
