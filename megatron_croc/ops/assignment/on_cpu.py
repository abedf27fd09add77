"""Assignment on the CPU: compiled code, else scipy on a part of the cost; images in threads."""

import functools
import logging
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from scipy.optimize import linear_sum_assignment

from megatron_croc.log import get_logger, log_once
from megatron_croc.ops.assignment import native
from megatron_croc.ops.assignment.bounds import prove
from megatron_croc.ops.assignment.restricted import (
    Columns,
    Cost,
    Match,
    cheapest_entries,
    match_columns,
    match_entries,
    unmatched_share,
)

_logger = get_logger(__name__)

SMALL = 2**17
"""Largest cost, in entries, that is searched whole; the choice of a part would take longer."""

SPACIOUS = 2
"""Columns per row from which the cheapest entries of each row are likely to be enough."""

NUM_CANDIDATES = 16, 128
"""Entries of each row to try, one number after the other."""

SLIGHTLY_CROWDED, CROWDED = 0.15, 0.7
"""Limits for the share of rows that no matching of the candidate entries gives a column.

Up to the first, more entries are likely to be enough. From the second, the same columns are cheap
for all rows. Between them the whole cost is searched, because more entries may not help."""


Solved = tuple[Columns, float] | None
"""Columns and a lower bound; None where a cost is not finite."""


def solve_cpu(costs: Sequence[Cost], *, certify: bool) -> list[Solved]:
    """Return columns [n] and a lower bound for each cost [n, P]; None if it is not finite.

    Without `certify` the bound is NaN, except where the search computes it anyway.
    """
    compiled = native.load()  # before the threads, which would compile it several times
    if isinstance(compiled, str):
        log_once(_logger, logging.WARNING, "tokens are matched by scipy, slower: %s", compiled)
    return _in_threads(functools.partial(_solve, certify=certify), costs)


def solve_scipy(costs: Sequence[Cost], *, certify: bool) -> list[Solved]:
    """Same as `solve_cpu` by scipy alone, one image after the other: the reference."""
    return [_solve_whole(cost, certify=certify) if _is_finite(cost) else None for cost in costs]


def _solve(cost: Cost, *, certify: bool) -> Solved:
    compiled = native.load()
    if not isinstance(compiled, str):
        solved = compiled.solve(cost, certify=certify)
        if solved is not None:
            return solved
    return _solve_in_parts(cost, certify=certify) if _is_finite(cost) else None


def _is_finite(cost: Cost) -> bool:
    # A sum takes a quarter of the time of isfinite. If it is finite, all terms are.
    with np.errstate(all="ignore"):
        return bool(np.isfinite(cost.sum()) or np.isfinite(cost).all())


def _solve_in_parts(cost: Cost, *, certify: bool) -> tuple[Columns, float]:
    match = _match_part(cost)
    if match is not None and match.proof.is_optimal:
        return match.columns, match.proof.bound
    return _solve_whole(cost, certify=certify)


def _match_part(cost: Cost) -> Match | None:
    """Match in a part of the cost that is likely to be enough; None if there is none."""
    num_rows, num_columns = cost.shape
    if cost.size <= SMALL:
        return None
    for num_candidates in NUM_CANDIDATES:
        entries = cheapest_entries(cost, num_candidates)
        if entries is None:
            return None
        unmatched = unmatched_share(cost, entries)
        if unmatched > CROWDED:
            return match_columns(cost)
        if unmatched > SLIGHTLY_CROWDED or num_columns < SPACIOUS * num_rows:
            return None
        if unmatched == 0.0:
            return match_entries(cost, entries)
    return None


def _solve_whole(cost: Cost, *, certify: bool) -> tuple[Columns, float]:
    columns = linear_sum_assignment(cost)[1].astype(np.int64)  # its rows are arange
    return columns, prove(cost, columns).bound if certify else np.nan


def _in_threads(solve: Callable[[Cost], Solved], costs: Sequence[Cost]) -> list[Solved]:
    """Apply `solve` to each cost; compiled code, scipy and numpy release the GIL."""
    if len(costs) < 2 or num_threads() < 2:
        return [solve(cost) for cost in costs]
    return list(_thread_pool(num_threads()).map(solve, costs))


def num_threads() -> int:
    """Number of cores of this machine divided by its LOCAL_WORLD_SIZE processes."""
    return max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


@functools.cache
def _thread_pool(num_workers: int) -> ThreadPoolExecutor:
    """Threads for the images. State of the whole process, listed in docs/design.md."""
    return ThreadPoolExecutor(num_workers, thread_name_prefix="assignment")
