"""A lower bound on the optimum, proven by duals (weak duality of the assignment problem).

For any numbers u of the rows, every one-to-one assignment costs at least

    sum_i u_i  +  sum_j v_j,    v_j = min(0, min_i (c_ij - u_i))

With the duals of an optimal assignment the bound equals its cost, so a gap of zero is a proof.
Where a part of the columns has been assigned optimally, the rest of them have v_j < 0 exactly
where they would have made it cheaper.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

PROVEN = 1e-6
"""Gap, relative to the sum of the costs' magnitudes, up to which an assignment is called optimal:
a tenth of what `assign` promises. Prices are float32, which leaves about 1e-8."""

ROWS_AT_ONCE = 32
"""Rows whose costs stay in a core's cache while they are compared."""


class Proof(NamedTuple):
    """What an assignment's own duals prove about all assignments."""

    objective: float
    """Total cost of the assignment."""

    bound: float
    """No assignment costs less; the objective, up to rounding, if it is optimal."""

    is_optimal: bool

    of_rows: NDArray[np.floating]
    """[n], u above."""

    of_columns: NDArray[np.floating]
    """[P], at most 0: what the row of each column pays less for it than u; 0 without a row."""

    least: NDArray[np.floating]
    """[P], v above: less than `of_columns` where another row would gain by taking the column."""


def prove(
    cost: NDArray[np.floating], columns: NDArray[np.int64], among: csr_array | None = None
) -> Proof:
    """The best bound that an assignment's own duals give.

    Moving row a from its column to row b's raises the cost by w_ab = c_ab - c_aa, where column a
    is that of row a. Prices must not make any move pay: v_b <= v_a + w_ab, and v <= 0. The
    largest such duals are shortest path lengths, found here by sweeps (Bellman, Ford).

    Args:
        cost: float32 or float64 [n, P].
        columns: [n], the column of each row, all different.
        among: [n, P], the entries among which no assignment is better. Moves to others are left
            out of the sweeps, which would not settle if one of them paid.

    Returns:
        See `Proof`.
    """
    num_rows, num_columns = cost.shape
    rows = np.arange(num_rows)
    taken = cost[rows, columns]
    moves = np.take(cost, columns, axis=1)  # five times as fast as cost[:, columns]
    moves -= taken[:, None]
    if among is not None:
        moves[~_possible_moves(among, columns)] = np.inf
    of_columns = np.zeros(num_columns, cost.dtype)
    of_columns[columns] = _largest_duals(moves)
    of_rows = taken - of_columns[columns]
    least = np.zeros(num_columns, cost.dtype)
    for start in range(0, num_rows, ROWS_AT_ONCE):
        these = slice(start, start + ROWS_AT_ONCE)
        np.minimum(least, (cost[these] - of_rows[these, None]).min(axis=0), out=least)
    objective = float(taken.sum(dtype=np.float64))
    bound = float(of_rows.sum(dtype=np.float64) + least.sum(dtype=np.float64))
    scale = float(np.abs(taken).sum(dtype=np.float64))
    is_optimal = objective - bound <= PROVEN * scale
    return Proof(objective, bound, is_optimal, of_rows, of_columns, least)


def _possible_moves(among: csr_array, columns: NDArray[np.int64]) -> NDArray[np.bool_]:
    """bool [n, n], whether a row has an entry in the column of another."""
    num_rows = len(columns)
    row_of = np.full(among.indices.max(initial=-1) + 1, num_rows)
    row_of[columns] = np.arange(num_rows)
    is_possible = np.zeros((num_rows, num_rows + 1), dtype=bool)  # one for columns without a row
    rows = np.repeat(np.arange(num_rows), np.diff(among.indptr))
    is_possible[rows, row_of[among.indices]] = True
    return is_possible[:, :num_rows]


def _largest_duals(moves: NDArray[np.floating]) -> NDArray[np.floating]:
    duals = np.zeros(len(moves), moves.dtype)
    fallen = np.arange(len(moves))
    for _ in range(len(moves)):  # a shortest path has fewer edges than there are columns
        reached = (moves[fallen] + duals[fallen, None]).min(axis=0)
        fallen = np.flatnonzero(reached < duals)  # only these can lower others
        if fallen.size == 0:
            break
        duals[fallen] = reached[fallen]
    return duals
