"""Initial dual variables near the optimum, for all images at once, without a device sync.

Shortest paths reach the optimum from any duals v <= 0, in fewer steps from better ones. If the cost
were a row term plus a column term b, the n cheapest columns would be matched, and optimal duals
would be v_j = min(0, b_j - b of the cheapest unmatched column). Sinkhorn sweeps at decreasing
temperatures correct these: each row spreads one unit over the columns, a column takes at most one.
"""

from typing import NamedTuple

import torch
from torch import Tensor

TEMPERATURES = (1.0, 0.3, 0.1, 0.03, 0.01, 0.003)
"""Temperatures of the sweeps, in standard deviations of the cost without row and column means."""

NUM_SWEEPS = 8
"""Sweeps at each temperature; one is two products with the same matrix of exponentials."""


class FirstChoices(NamedTuple):
    """Partial matching in which a row has its best column, unless an earlier row has it."""

    row_of: Tensor
    """int64 [B, P], row of each column; -1: none."""

    unmatched: Tensor
    """int64 [B, n], unmatched rows, ascending, then the others."""

    num_unmatched: Tensor
    """int64 [B], number of unmatched rows."""


@torch.no_grad()
def starting_duals(cost: Tensor, lengths: Tensor) -> Tensor:
    """Compute dual variables of the columns, [B, P] <= 0, in the dtype of the cost.

    Args:
        cost: float [B, n, P], n <= P, finite up to each length.
        lengths: int64 [B], on the device of the cost.
    """
    num_columns = cost.shape[2]
    counted = _rows_that_count(cost, lengths).unsqueeze(2)
    cost = cost.where(counted, 0.0)
    means = cost.sum(dim=1) / lengths.clamp(min=1).unsqueeze(1)
    left_over = lengths.clamp(max=num_columns - 1).unsqueeze(1)
    duals = (means - means.sort(dim=1).values.gather(1, left_over)).clamp(max=0.0)
    residual = cost - means.unsqueeze(1)
    residual = (residual - residual.mean(dim=2, keepdim=True)).where(counted, 0.0)
    entries = (lengths * num_columns).clamp(min=1)
    scale = (residual.square().sum(dim=(1, 2)) / entries).sqrt().unsqueeze(1)
    scale = scale.clamp(min=torch.finfo(cost.dtype).tiny / TEMPERATURES[-1])
    mass = counted.to(cost.dtype).transpose(1, 2)  # [B, 1, n], 0 for padding
    for temperature in TEMPERATURES:
        eps = temperature * scale
        slack = cost - duals.unsqueeze(1)
        slack = slack - slack.amin(dim=2, keepdim=True)
        affinity = (slack / -eps.unsqueeze(2)).clamp(min=-30.0).exp()
        most = (duals / -eps).clamp(max=60.0).exp()  # more would make the dual positive
        of_column = torch.ones_like(duals).unsqueeze(2)
        for _ in range(NUM_SWEEPS):
            of_row = mass / (affinity @ of_column).transpose(1, 2)
            of_column = torch.minimum(1.0 / (of_row @ affinity), most.unsqueeze(1)).transpose(1, 2)
        change = eps * of_column.squeeze(2).log()
        duals = (duals + change.nan_to_num(0.0, 0.0, 0.0)).clamp(max=0.0)
    return duals.nan_to_num(0.0, neginf=0.0)  # costs near the largest float overflow in sums


@torch.no_grad()
def first_choices(cost: Tensor, lengths: Tensor, duals: Tensor) -> FirstChoices:
    """Match rows to their best columns; ties go to the lowest column and row.

    Args:
        cost: float [B, n, P].
        lengths: int64 [B].
        duals: float [B, P].
    """
    num_images, num_rows, num_columns = cost.shape
    counted = _rows_that_count(cost, lengths)
    reduced = cost - duals.unsqueeze(1)
    is_least = reduced == reduced.amin(dim=2, keepdim=True)
    columns = torch.arange(num_columns, device=cost.device)
    choice = columns.where(is_least, num_columns - 1).amin(dim=2)
    rows = torch.arange(num_rows, device=cost.device).expand(num_images, -1)
    row_of = torch.full((num_images, num_columns), num_rows, device=cost.device)
    row_of.scatter_reduce_(1, choice, rows.where(counted, num_rows), "amin")
    has_column = row_of.gather(1, choice) == rows
    wants_one = counted & ~has_column
    unmatched = torch.argsort((~wants_one).to(torch.uint8), dim=1, stable=True)
    row_of = row_of.where(row_of < num_rows, -1)
    return FirstChoices(row_of, unmatched, wants_one.sum(dim=1))


def _rows_that_count(cost: Tensor, lengths: Tensor) -> Tensor:
    """bool [B, n], False for padding."""
    return torch.arange(cost.shape[1], device=cost.device) < lengths.unsqueeze(1)
