"""Optimal assignments from a part of the cost, with a proof of optimality in the whole cost.

scipy searches one of two parts; `bounds` proves, or does not prove, that the rest can be ignored.

Entries: if each row can have one of its own cheapest columns, a sparse graph of those is enough.

Columns: if the same columns are cheap for all rows, such as the short tokens of a randomly
initialised pool, scipy's augmenting paths become long. Two exact steps avoid that. The search
begins with the columns that are cheap for all rows and adds those that the proof needs (column
generation). Rows of zeros make the cost square, so that every column is matched; a dual variable
can then be subtracted from a column without changing the optimal assignment.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from scipy.sparse import csr_array
from scipy.sparse.csgraph import maximum_bipartite_matching, min_weight_full_bipartite_matching

from megatron_croc.ops.assignment.bounds import Proof, prove

Cost = NDArray[np.floating]
Columns = NDArray[np.int64]

Entries = NDArray[np.int64]
"""Indices in the flattened cost, ascending."""

GROUPS_PER_CANDIDATE = 4
"""Groups of columns for each candidate; their minima, fewer than the columns, give a limit."""

MOST_PER_CANDIDATE = 4
"""Largest mean number of entries of a row per candidate. With more, a dense search is faster."""

NUM_ROUNDS = 4
"""Largest number of rounds of `match_entries`. Most need one; all cost about the same."""

COLUMNS_PER_ROW = 1.06, 1.75
"""Columns for each row at the start, and at most. Each unmatched column adds a row of zeros."""

TEMPERATURES = (0.3, 0.1, 0.03, 0.01)
"""Temperatures of the Sinkhorn sweeps, in standard deviations of the residual cost."""

NUM_SWEEPS = 8
"""Sweeps at each temperature; cheap, compared with the exponential of the cost before them."""


class Match(NamedTuple):
    """An assignment and its proof."""

    columns: Columns
    proof: Proof


def cheapest_entries(cost: Cost, num_candidates: int) -> Entries | None:
    """Find the `num_candidates` cheapest entries of each row, and some more; None if too many.

    The limit of a row is taken from its minima over groups of columns, so that at least
    `num_candidates` entries are within it. Ties can add many more.

    Args:
        cost: [n, P], P >= num_candidates.
        num_candidates: entries of each row.
    """
    minima = cost
    while (half := minima.shape[1] // 2) >= GROUPS_PER_CANDIDATE * num_candidates:
        minima = np.minimum(minima[:, :half], minima[:, half : 2 * half])
    limits = np.partition(minima, num_candidates - 1, axis=1)[:, num_candidates - 1]
    entries = np.flatnonzero(cost <= limits[:, None])
    return entries if entries.size <= MOST_PER_CANDIDATE * num_candidates * len(cost) else None


def unmatched_share(cost: Cost, entries: Entries) -> float:
    """Share of rows without a column in a largest matching of rows and columns over `entries`."""
    columns = maximum_bipartite_matching(_graph(cost, entries), perm_type="column")
    return float((columns < 0).mean())


def match_entries(cost: Cost, entries: Entries) -> Match:
    """Find the best assignment among `entries` and the further entries that the proof needs.

    A matching of all rows must exist. After `NUM_ROUNDS` the result may be unproven.
    """
    num_columns = cost.shape[1]
    for _ in range(NUM_ROUNDS):
        graph = _graph(cost, entries)
        columns = min_weight_full_bipartite_matching(graph)[1].astype(np.int64)
        proof = prove(cost, columns, among=graph)
        needed = np.flatnonzero(proof.feasible_duals < proof.column_duals)
        if proof.is_optimal or needed.size == 0:
            break
        reduced = np.take(cost, needed, axis=1) - proof.row_duals[:, None]
        rows, which = np.nonzero(reduced < proof.column_duals[needed])
        entries = np.union1d(entries, rows * num_columns + needed[which])
    return Match(columns, proof)


def _graph(cost: Cost, entries: Entries) -> csr_array:
    """Sparse graph of `entries`, plus a constant, because scipy ignores entries of zero."""
    num_rows, num_columns = cost.shape
    rows, columns = np.divmod(entries, num_columns)
    ends = np.cumsum(np.bincount(rows, minlength=num_rows))
    pointers = np.concatenate([[0], ends]).astype(np.int32)
    weights = cost.reshape(-1)[entries].astype(np.float64)
    weights -= weights.min()
    weights += weights.max() or 1.0
    return csr_array((weights, columns.astype(np.int32), pointers), shape=cost.shape)


def match_columns(cost: Cost) -> Match:
    """Find the best assignment to columns that are cheap for all rows, and to those it needs.

    The result is unproven if more columns than `COLUMNS_PER_ROW` allows are needed.
    """
    num_rows, num_columns = cost.shape
    at_first, at_most = (min(num_columns, int(num_rows * times)) for times in COLUMNS_PER_ROW)
    order = np.argsort(cost.mean(axis=0, dtype=np.float64), kind="stable")
    candidates = np.sort(order[:at_first])
    duals = sinkhorn_duals(np.take(cost, candidates, axis=1))
    while True:
        columns = candidates[_match_square(np.take(cost, candidates, axis=1), duals)]
        proof = prove(cost, columns)
        needed = np.union1d(candidates, np.flatnonzero(proof.feasible_duals < proof.column_duals))
        if proof.is_optimal or not candidates.size < needed.size <= at_most:
            return Match(columns, proof)
        candidates, duals = needed, proof.column_duals[needed].astype(np.float64)


def _match_square(cost: Cost, duals: NDArray[np.float64]) -> Columns:
    """scipy's assignment of [n, k], made square by rows of zeros, with `duals` subtracted."""
    num_rows, num_columns = cost.shape
    square = np.zeros((num_columns, num_columns))
    square[:num_rows] = cost
    square -= duals
    return linear_sum_assignment(square)[1][:num_rows].astype(np.int64)


def sinkhorn_duals(cost: Cost) -> NDArray[np.float64]:
    """Approximate dual variables, float64 [k]: column means, corrected by Sinkhorn sweeps.

    They do not change the result; better ones shorten scipy's augmenting paths.
    """
    means = cost.mean(axis=0, dtype=np.float64)
    residual = cost - means.astype(cost.dtype)
    residual -= residual.mean(axis=1, keepdims=True)
    scale = max(float(residual.std()), float(np.finfo(np.float32).tiny))
    corrections = np.zeros(cost.shape[1], dtype=cost.dtype)
    for temperature in TEMPERATURES:
        eps = temperature * scale
        slack = residual - corrections
        slack -= slack.min(axis=1, keepdims=True)
        affinity = np.exp(np.maximum(slack / -eps, -30.0))
        of_column = np.ones(cost.shape[1], dtype=cost.dtype)
        with np.errstate(all="ignore"):
            for _ in range(NUM_SWEEPS):
                of_row = 1.0 / (affinity @ of_column)
                of_column = 1.0 / (of_row @ affinity)
            change = eps * np.log(of_column)
        corrections += np.where(np.isfinite(change), change, 0.0)
    return means + corrections
