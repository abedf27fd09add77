"""Lower bound on the optimum from dual variables (weak duality of the assignment problem).

For any numbers u of the rows, every one-to-one assignment costs at feasible_duals

    sum_i u_i  +  sum_j v_j,    v_j = min(0, min_i (c_ij - u_i))

With the duals of an optimal assignment the bound equals its cost, so a gap of zero is a proof.
If an assignment is optimal in a part of the columns, the other columns with v_j < 0 are exactly
those that would reduce its cost.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

PROVEN = 1e-6
"""Largest gap of an assignment that counts as optimal, relative to the sum of absolute costs.

A tenth of the tolerance of `assign`. The duals are float32, which causes a gap of about 1e-8."""

ROWS_AT_ONCE = 32
"""Rows compared at once; their costs fit in the cache of a core."""


class Proof(NamedTuple):
    """Lower bound on the cost of all assignments, from the duals of one of them."""

    objective: float
    """Total cost of the assignment."""

    bound: float
    """Lower bound for all assignments; equals the objective, up to rounding, if it is optimal."""

    is_optimal: bool
    """The gap is at most `PROVEN`."""

    row_duals: NDArray[np.floating]
    """[n], u of the module docstring."""

    column_duals: NDArray[np.floating]
    """[P], at most 0: cost of the matched entry minus u of its row; 0 for an unmatched column."""

    feasible_duals: NDArray[np.floating]
    """[P], v of the module docstring; below `column_duals` where a move would reduce the cost."""


def prove(
    cost: NDArray[np.floating], columns: NDArray[np.int64], among: csr_array | None = None
) -> Proof:
    """Compute the best bound that the duals of an assignment give.

    Moving row a from its column to row b's raises the cost by w_ab = c_ab - c_aa, where column a
    is that of row a. The duals must allow no gain: v_b <= v_a + w_ab, and v <= 0. The largest
    such duals are lengths of shortest paths, computed by Bellman-Ford sweeps.

    Args:
        cost: float32 or float64 [n, P].
        columns: [n], the column of each row, all different.
        among: [n, P], entries among which the assignment is optimal. The sweeps omit moves to
            other entries; they would not converge if such a move reduced the cost.

    Returns:
        See `Proof`.
    """
    num_rows, num_columns = cost.shape
    rows = np.arange(num_rows)
    taken = cost[rows, columns]
    moves = np.take(cost, columns, axis=1)  # five times faster than cost[:, columns]
    moves -= taken[:, None]
    if among is not None:
        moves[~_possible_moves(among, columns)] = np.inf
    column_duals = np.zeros(num_columns, cost.dtype)
    column_duals[columns] = _largest_duals(moves)
    row_duals = taken - column_duals[columns]
    feasible_duals = np.zeros(num_columns, cost.dtype)
    for start in range(0, num_rows, ROWS_AT_ONCE):
        these = slice(start, start + ROWS_AT_ONCE)
        np.minimum(
            feasible_duals, (cost[these] - row_duals[these, None]).min(axis=0), out=feasible_duals
        )
    objective = float(taken.sum(dtype=np.float64))
    bound = float(row_duals.sum(dtype=np.float64) + feasible_duals.sum(dtype=np.float64))
    scale = float(np.abs(taken).sum(dtype=np.float64))
    is_optimal = objective - bound <= PROVEN * scale
    return Proof(objective, bound, is_optimal, row_duals, column_duals, feasible_duals)


def _possible_moves(among: csr_array, columns: NDArray[np.int64]) -> NDArray[np.bool_]:
    """bool [n, n], True where a row has an entry in the column of another row."""
    num_rows = len(columns)
    row_of = np.full(among.indices.max(initial=-1) + 1, num_rows)
    row_of[columns] = np.arange(num_rows)
    is_possible = np.zeros((num_rows, num_rows + 1), dtype=bool)  # one for columns without a row
    rows = np.repeat(np.arange(num_rows), np.diff(among.indptr))
    is_possible[rows, row_of[among.indices]] = True
    return is_possible[:, :num_rows]


def _largest_duals(moves: NDArray[np.floating]) -> NDArray[np.floating]:
    duals = np.zeros(len(moves), moves.dtype)
    changed = np.arange(len(moves))
    for _ in range(len(moves)):  # a shortest path has fewer edges than there are columns
        reached = (moves[changed] + duals[changed, None]).min(axis=0)
        changed = np.flatnonzero(reached < duals)  # only these can reduce others
        if changed.size == 0:
            break
        duals[changed] = reached[changed]
    return duals
