"""Readable reference: exact assignment by shortest augmenting paths, from any initial duals.

Column duals v <= 0 are optimal if there is a matching in which

    every matched row has a column of least c_ij - v_j  (kept throughout)
    every row is matched                                (result of the forward paths)
    every column with v_j < 0 is matched                (result of the reverse paths)

Algorithms usually start at v = 0, where the third condition holds, and need tens of thousands of
steps. Here v starts near the optimum, and reverse paths restore the third condition: the dual of
an unmatched column is raised until it is 0, or until a row moves to this column. The column that
the row leaves is raised next, and so on. The path ends at a column whose dual becomes 0; it stays
unmatched.

Sources: Jonker and Volgenant 1987 (forward paths); Bertsekas and Castanon 1992 (reverse).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from megatron_croc.ops.assignment.start import starting_duals


class Solution(NamedTuple):
    """Assignment of one image, and its proof."""

    columns: Tensor
    """int64 [n]."""

    duals: Tensor
    """float64 [P], at most 0."""

    bound: Tensor
    """float64 scalar, lower bound for the cost of all assignments."""

    num_steps: int
    """Columns and rows scanned one after the other; a parallel machine needs as many."""


@torch.no_grad()
def solve_image(cost: Tensor, duals: Tensor | None = None) -> Solution:
    """Assign the rows of one image.

    Args:
        cost: [n, P], finite, n <= P.
        duals: [P], at most 0, initial values; None: `starting_duals`. They affect the number of
            steps, not the result's cost.

    Returns:
        See `Solution`.
    """
    cost = cost.double()
    num_rows, num_columns = cost.shape
    if num_rows == 0:
        zero = cost.new_zeros(())
        return Solution(torch.empty(0, dtype=torch.int64), cost.new_zeros(num_columns), zero, 0)
    if duals is None:
        duals = starting_duals(cost.unsqueeze(0), torch.tensor([num_rows], device=cost.device))[0]
    search = _Search(cost, duals.double().clone())
    search.match_first_choices()
    for row in range(num_rows):
        if search.column_of[row] < 0:
            search.forward(row)
    for column in range(num_columns):
        if search.row_of[column] < 0 and search.duals[column] < 0:
            search.reverse(column)
    bound = (cost - search.duals).min(dim=1).values.sum() + search.duals.sum()
    columns = torch.tensor(search.column_of, device=cost.device)
    return Solution(columns, search.duals, bound, search.num_steps)


class _Search:
    """Partial matching, with duals for which the column of each matched row is its best."""

    def __init__(self, cost: Tensor, duals: Tensor) -> None:
        num_rows, num_columns = cost.shape
        self.cost, self.duals = cost, duals
        self.column_of = [-1] * num_rows
        self.row_of = [-1] * num_columns
        self.num_steps = 0

    def match_first_choices(self) -> None:
        """Match each row to its best column, unless an earlier row has it."""
        for row, column in enumerate((self.cost - self.duals).argmin(dim=1).tolist()):
            if self.row_of[column] < 0:
                self.column_of[row], self.row_of[column] = column, row

    def forward(self, row: int) -> None:
        """Match `row` along the shortest path to an unmatched column (Dijkstra)."""
        distance = self.cost[row] - self.duals
        comes_from = [row] * len(self.row_of)
        scanned = torch.zeros_like(distance, dtype=torch.bool)
        while True:
            self.num_steps += 1
            column = self.first_least(distance.masked_fill(scanned, torch.inf))
            if self.row_of[column] < 0:
                break
            scanned[column] = True
            owner = self.row_of[column]
            slack = self.cost[owner] - self.duals - (self.cost[owner] - self.duals)[column]
            reached = distance[column] + slack
            nearer = ~scanned & (reached < distance)
            distance = torch.where(nearer, reached, distance)
            for other in nearer.nonzero().flatten().tolist():
                comes_from[other] = owner
        self.duals += torch.where(scanned, distance - distance[column], 0.0)
        while True:
            mover = comes_from[column]
            self.row_of[column] = mover
            self.column_of[mover], column = column, self.column_of[mover]
            if mover == row:
                return

    def first_least(self, distance: Tensor) -> int:
        """Nearest column; of equal ones an unmatched one, which ends the path, then the lowest."""
        nearest = (distance == distance.min()).nonzero().flatten().tolist()
        return min(nearest, key=lambda column: (self.row_of[column] >= 0, column))

    def reverse(self, start: int) -> None:
        """Raise the dual of the unmatched column `start` to 0, or match it and free another."""
        matched = torch.tensor(self.column_of, device=self.cost.device)
        best = self.cost.gather(1, matched[:, None]).squeeze(1) - self.duals[matched]
        distance = self.cost[:, start] - self.duals[start] - best
        goes_to = [start] * len(self.column_of)
        scanned = torch.zeros_like(distance, dtype=torch.bool)
        freed, rise = start, -float(self.duals[start])
        while not bool(scanned.all()):
            self.num_steps += 1
            row = int(distance.masked_fill(scanned, torch.inf).argmin())
            if distance[row] >= rise:
                break
            scanned[row] = True
            column = self.column_of[row]
            until_zero = float(distance[row] - self.duals[column])
            if until_zero < rise:
                freed, rise = column, until_zero
            slack = self.cost[:, column] - self.duals[column] - best
            reached = distance[row] + slack
            nearer = ~scanned & (reached < distance)
            distance = torch.where(nearer, reached, distance)
            for other in nearer.nonzero().flatten().tolist():
                goes_to[other] = column
        self.duals[matched[scanned]] += rise - distance[scanned]
        self.duals[start] += rise
        self.duals.clamp_(max=0.0)
        self.duals[freed] = 0.0
        if freed == start:
            return
        row, self.row_of[freed] = self.row_of[freed], -1
        while True:
            column = goes_to[row]
            row_before, self.row_of[column] = self.row_of[column], row
            self.column_of[row] = column
            if column == start:
                return
            row = row_before
