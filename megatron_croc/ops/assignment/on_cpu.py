"""Assignment on the CPU: scipy on as few columns as will do, images in threads.

A freshly drawn pool has rows of very different length, and every visual token then prefers the
same short ones. scipy's shortest paths grow long on such a cost. Two exact steps take it away:

1. Columns that are dear to all rows are left out. The bound of `bounds` is taken over ALL
   columns, so a zero gap proves that nothing was lost; if not, more columns are let in.
2. Rows of zeros make the rest square. Every column is then taken exactly once, and any price can
   be subtracted from it without changing which assignment is best.

Where rows do not agree on the cheap columns, scipy is fast and solves the whole problem as it is.
"""

import functools
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from megatron_croc.ops.assignment.bounds import is_proven, lower_bound

Cost = NDArray[np.float32]
Columns = NDArray[np.int64]

NUM_PROBED_ROWS = 8
NUM_PROBED_COLUMNS = 512
"""The probe must cost little: where it finds no agreement, it is all that is lost to scipy."""

AGREEMENT = 4.0
"""Columns' spread over rows' disagreement from which pruning is tried."""

TEMPERATURES = (0.3, 0.1, 0.03, 0.01)
"""Of the Sinkhorn sweeps, over the standard deviation of what row and column means leave."""

NUM_SWEEPS = 8
"""At each temperature: each sweep costs little beside one exponential of the whole cost."""


def solve_cpu(costs: Sequence[Cost], *, certify: bool) -> list[tuple[Columns, float]]:
    """Columns [n] and a lower bound of each cost [n, P]; the bound is NaN if not `certify`."""
    return _in_threads(functools.partial(_solve_pruned, certify=certify), costs)


def solve_scipy(costs: Sequence[Cost], *, certify: bool) -> list[tuple[Columns, float]]:
    """As `solve_cpu`, but plain scipy, one image after the other: the oracle."""
    return [_solve_whole(cost, certify=certify) for cost in costs]


def _solve_pruned(cost: Cost, *, certify: bool) -> tuple[Columns, float]:
    for candidates in _cheap_columns(cost):
        within = np.take(cost, candidates, axis=1)
        columns = candidates[_solve_without_bias(within)]
        chosen = cost[np.arange(len(cost)), columns].astype(np.float64)
        bound = lower_bound(cost, columns)
        if is_proven(chosen.sum(), bound, np.abs(chosen).sum()):
            return columns, bound
    return _solve_whole(cost, certify=certify)


def _solve_whole(cost: Cost, *, certify: bool) -> tuple[Columns, float]:
    columns = linear_sum_assignment(cost)[1].astype(np.int64)  # rows come back as arange
    return columns, lower_bound(cost, columns) if certify else np.nan


def _cheap_columns(cost: Cost) -> Iterator[Columns]:
    """Growing sets of columns to try; none where rows do not agree on which are cheap."""
    num_rows, num_columns = cost.shape
    if num_rows < NUM_PROBED_ROWS:
        return
    every_row, every_column = num_rows // NUM_PROBED_ROWS, -(-num_columns // NUM_PROBED_COLUMNS)
    probe = cost[::every_row, ::every_column][:NUM_PROBED_ROWS]
    disagreement = float((probe - probe.mean(axis=0)).std(axis=0).mean())
    if probe.mean(axis=0).std() < AGREEMENT * disagreement:
        return
    means = cost.mean(axis=0, dtype=np.float64)
    order = np.argsort(means, kind="stable")
    dearest_needed = means[order[num_rows - 1]]
    for margin in (2.0, 8.0):
        size = int(np.searchsorted(means[order], dearest_needed + margin * disagreement, "right"))
        size = max(size, num_rows)
        yield order[:size]
        if size == num_columns:
            return


def _solve_without_bias(cost: Cost) -> Columns:
    """scipy on [n, k], made square by rows of zeros, less a price of each column."""
    num_rows, num_columns = cost.shape
    square = np.zeros((num_columns, num_columns))
    square[:num_rows] = cost
    square -= _prices(cost)
    return linear_sum_assignment(square)[1][:num_rows].astype(np.int64)


def _prices(cost: Cost) -> NDArray[np.float64]:
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


def _in_threads(
    solve: Callable[[Cost], tuple[Columns, float]], costs: Sequence[Cost]
) -> list[tuple[Columns, float]]:
    """`solve` of each cost, in order; scipy and numpy release the interpreter's lock."""
    if len(costs) < 2 or num_threads() < 2:
        return [solve(cost) for cost in costs]
    return list(_thread_pool(num_threads()).map(solve, costs))


def num_threads() -> int:
    """This process's share of the machine's cores (LOCAL_WORLD_SIZE processes share them)."""
    return max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


@functools.cache
def _thread_pool(num_workers: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(num_workers, thread_name_prefix="assignment")
