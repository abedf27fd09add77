"""Assignment on the CPU: scipy on the part of the cost that matters, images in threads."""

import functools
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from scipy.optimize import linear_sum_assignment

from megatron_croc.ops.assignment.bounds import prove
from megatron_croc.ops.assignment.restricted import (
    Columns,
    Cost,
    Match,
    cheapest_entries,
    match_columns,
    match_entries,
    share_crowded_out,
)

SMALL = 2**17
"""Entries of a cost up to which scipy is done with all of it before a part has been chosen."""

SPACIOUS = 2
"""Columns for each row from which a row's cheapest entries are likely to suffice."""

NUM_CANDIDATES = 16, 128
"""Entries of each row that are tried, one after the other."""

SLIGHTLY_CROWDED, CROWDED = 0.15, 0.7
"""Shares of rows that find no column among so many: up to the first, more entries are likely to
do; from the second, rows agree on which columns are cheap. Between them scipy may take longer to
find out whether more entries would do than to search the whole cost."""


def solve_cpu(costs: Sequence[Cost], *, certify: bool) -> list[tuple[Columns, float]]:
    """Columns [n] and a lower bound of each cost [n, P].

    The bound is NaN if not `certify`, unless it came by itself.
    """
    return _in_threads(functools.partial(_solve, certify=certify), costs)


def solve_scipy(costs: Sequence[Cost], *, certify: bool) -> list[tuple[Columns, float]]:
    """As `solve_cpu`, but plain scipy, one image after the other: the oracle."""
    return [_solve_whole(cost, certify=certify) for cost in costs]


def _solve(cost: Cost, *, certify: bool) -> tuple[Columns, float]:
    match = _match_part(cost)
    if match is not None and match.proof.is_optimal:
        return match.columns, match.proof.bound
    return _solve_whole(cost, certify=certify)


def _match_part(cost: Cost) -> Match | None:
    """By the part of the cost that looks sufficient; None if none does."""
    num_rows, num_columns = cost.shape
    if cost.size <= SMALL:
        return None
    for num_candidates in NUM_CANDIDATES:
        places = cheapest_entries(cost, num_candidates)
        if places is None:
            return None
        crowded_out = share_crowded_out(cost, places)
        if crowded_out > CROWDED:
            return match_columns(cost)
        if crowded_out > SLIGHTLY_CROWDED or num_columns < SPACIOUS * num_rows:
            return None
        if crowded_out == 0.0:
            return match_entries(cost, places)
    return None


def _solve_whole(cost: Cost, *, certify: bool) -> tuple[Columns, float]:
    columns = linear_sum_assignment(cost)[1].astype(np.int64)  # rows come back as arange
    return columns, prove(cost, columns).bound if certify else np.nan


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
    """State of the whole process, listed in docs/design.md."""
    return ThreadPoolExecutor(num_workers, thread_name_prefix="assignment")
