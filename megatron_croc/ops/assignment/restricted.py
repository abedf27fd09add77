"""Optimal assignments found in a small part of the cost, and proven to be optimal in all of it.

Two parts are worth trying. Both searches are scipy's; `bounds` proves that what was left out does
not matter, or says that it may.

Entries: where each row can have one of its own cheapest columns, a sparse graph of those decides.

Columns: where rows agree on which columns are cheap, as they do on the short rows of a freshly
drawn pool, they crowd there and scipy's paths grow long. Two exact steps take that away. Only the
columns that are cheap to all are let in, and then those that the proof asks for (column
generation). And rows of zeros make them square: every column is then taken exactly once, and any
price can be subtracted from it without changing which assignment is best.
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

Places = NDArray[np.int64]
"""Ascending, in the flattened cost."""

GROUPS_PER_CANDIDATE = 4
"""Groups of columns whose minima tell what is cheap: far fewer numbers to sort than columns."""

MOST_PER_CANDIDATE = 4
"""Entries of a row on average. Ties can bring in more; a dense search is then the better one."""

NUM_ROUNDS = 4
"""Of a search for entries; most need one, and each costs about as much."""

COLUMNS_PER_ROW = 1.06, 1.75
"""Columns let in at first, and at most: each that stays free costs a row of zeros."""

TEMPERATURES = (0.3, 0.1, 0.03, 0.01)
"""Of the Sinkhorn sweeps, over the standard deviation of what row and column means leave."""

NUM_SWEEPS = 8
"""At each temperature: each sweep costs little beside one exponential of the whole cost."""


class Match(NamedTuple):
    """An assignment and its proof."""

    columns: Columns
    proof: Proof


def cheapest_entries(cost: Cost, num_candidates: int) -> Places | None:
    """Each row's `num_candidates` cheapest entries and a few more; None if ties make it many.

    A row's minima over groups of columns give the limit: at least that many entries are below it.

    Args:
        cost: [n, P], P >= num_candidates.
        num_candidates: of each row.
    """
    minima = cost
    while (half := minima.shape[1] // 2) >= GROUPS_PER_CANDIDATE * num_candidates:
        minima = np.minimum(minima[:, :half], minima[:, half : 2 * half])
    limits = np.partition(minima, num_candidates - 1, axis=1)[:, num_candidates - 1]
    places = np.flatnonzero(cost <= limits[:, None])
    return places if places.size <= MOST_PER_CANDIDATE * num_candidates * len(cost) else None


def share_crowded_out(cost: Cost, places: Places) -> float:
    """The share of rows that go without when every column at `places` is given to one row."""
    columns = maximum_bipartite_matching(_graph(cost, places), perm_type="column")
    return float((columns < 0).mean())


def match_entries(cost: Cost, places: Places) -> Match:
    """The best assignment among the entries at `places` and those it turns out to need.

    No row may be crowded out of them. The proof is left open where it takes too many rounds.
    """
    num_columns = cost.shape[1]
    for _ in range(NUM_ROUNDS):
        graph = _graph(cost, places)
        columns = min_weight_full_bipartite_matching(graph)[1].astype(np.int64)
        proof = prove(cost, columns, among=graph)
        wanted = np.flatnonzero(proof.least < proof.of_columns)
        if proof.is_optimal or wanted.size == 0:
            break
        of_rows = np.take(cost, wanted, axis=1) - proof.of_rows[:, None]
        rows, which = np.nonzero(of_rows < proof.of_columns[wanted])
        places = np.union1d(places, rows * num_columns + wanted[which])
    return Match(columns, proof)


def _graph(cost: Cost, places: Places) -> csr_array:
    """The entries at `places`, plus a constant: scipy takes an entry of zero for none."""
    num_rows, num_columns = cost.shape
    rows, columns = np.divmod(places, num_columns)
    ends = np.cumsum(np.bincount(rows, minlength=num_rows))
    pointers = np.concatenate([[0], ends]).astype(np.int32)
    weights = cost.reshape(-1)[places].astype(np.float64)
    weights -= weights.min()
    weights += weights.max() or 1.0
    return csr_array((weights, columns.astype(np.int32), pointers), shape=cost.shape)


def match_columns(cost: Cost) -> Match:
    """The best assignment to columns that are cheap to all rows, and to those it turns out to need.

    The proof is left open where more columns are needed than are worth it.
    """
    num_rows, num_columns = cost.shape
    at_first, at_most = (min(num_columns, int(num_rows * times)) for times in COLUMNS_PER_ROW)
    order = np.argsort(cost.mean(axis=0, dtype=np.float64), kind="stable")
    candidates = np.sort(order[:at_first])
    duals = sinkhorn_duals(np.take(cost, candidates, axis=1))
    while True:
        columns = candidates[_match_square(np.take(cost, candidates, axis=1), duals)]
        proof = prove(cost, columns)
        wanted = np.union1d(candidates, np.flatnonzero(proof.least < proof.of_columns))
        if proof.is_optimal or not candidates.size < wanted.size <= at_most:
            return Match(columns, proof)
        candidates, duals = wanted, proof.of_columns[wanted].astype(np.float64)


def _match_square(cost: Cost, duals: NDArray[np.float64]) -> Columns:
    """scipy on [n, k], made square by rows of zeros, less a price of each column."""
    num_rows, num_columns = cost.shape
    square = np.zeros((num_columns, num_columns))
    square[:num_rows] = cost
    square -= duals
    return linear_sum_assignment(square)[1][:num_rows].astype(np.int64)


def sinkhorn_duals(cost: Cost) -> NDArray[np.float64]:
    """float64 [k]: the mean of each column, and annealed Sinkhorn sweeps on what it leaves.

    No price can spoil the result; better ones only shorten scipy's paths.
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
