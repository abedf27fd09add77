"""Exact assignment of one image by compiled code; native.cpp explains the algorithm.

Most costs are searched from duals of zero. If a few rows, asked for their first choice, name the
same columns, and these columns are cheap for all rows, as the short tokens of a randomly
initialised pool are, paths from there are long: rows that agree are told apart step by step. The
search then begins with the columns that are cheap for all, from Sinkhorn duals. Its last stage,
over all columns, is exact from any beginning.
"""

import ctypes
import functools
import platform
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_croc.errors import first_line
from megatron_croc.native_code import CompileError, compile_library
from megatron_croc.ops.assignment.restricted import Columns, Cost, sinkhorn_duals

SOURCE = Path(__file__).with_name("native.cpp")

OPTIONS = ("-O3", "-std=c++17", "-march=native", "-ffp-contract=off")
"""Options of the compiler. Without fused operations, results are the same on every processor."""

NUM_ROWS_ASKED = 32
"""Rows asked for their first choice, and then for their cheap columns."""

FEWEST_CHOICES = 10
"""Different first choices of these rows with which the columns are not looked at any further."""

AGREED = 0.6
"""Share of their cheap columns that is common, from which on rows agree."""

COLUMNS_PER_ROW = 1.25
"""Columns for each row at the beginning, if rows agree."""

CROWDED = -2
"""Result of the search if there are fewer than `FEWEST_CHOICES`."""


class Native:
    """Compiled assignment."""

    def __init__(self, library: ctypes.CDLL) -> None:
        """Declare the functions of the library."""
        self._assign: dict[np.dtype[Any], Any] = {}
        for name in ("float32", "float64"):
            function = getattr(library, f"assign_{name}")
            number, address = ctypes.c_int64, ctypes.c_void_p
            function.argtypes = [
                *(address, number, number, number, number),
                *(address, address, number),
                *(address, address),
            ]
            function.restype = number
            self._assign[np.dtype(name)] = function

    def solve(self, cost: Cost, *, certify: bool) -> tuple[Columns, float] | None:
        """Columns [n] and a lower bound (NaN without `certify`) of a cost [n, P], n <= P.

        None if memory, or the range of float64, does not suffice.
        """
        steps, columns, bound = self.search(
            cost, certify=certify, asked=NUM_ROWS_ASKED, fewest=FEWEST_CHOICES
        )
        if steps == CROWDED:
            part = columns_of_agreement(cost)
            duals = None if part is None else duals_of(np.take(cost, part, axis=1))
            steps, columns, bound = self.search(cost, certify=certify, part=part, duals=duals)
        return None if steps < 0 else (columns, bound)

    def search(
        self,
        cost: Cost,
        *,
        certify: bool = False,
        asked: int = 0,
        fewest: int = 0,
        part: Columns | None = None,
        duals: NDArray[np.float64] | None = None,
    ) -> tuple[int, Columns, float]:
        """Steps (below 0: no result), columns and bound.

        Args:
            cost: float32 or float64 [n, P].
            certify: compute the bound.
            asked: rows asked for their first choice.
            fewest: different choices, at most `asked`, below which the result is `CROWDED`.
            part: [k], n <= k; ascending columns to begin with.
            duals: [k], at most 0; of these columns.
        """
        cost = np.ascontiguousarray(cost)
        num_rows, num_columns = cost.shape
        index = np.empty(num_rows, np.int64)
        bound = ctypes.c_double(0.0 if num_rows == 0 else np.nan)
        if num_rows == 0:
            return 0, index, bound.value
        size = 0 if part is None else len(part)
        steps = self._assign[cost.dtype](
            *(_address(cost), num_rows, num_columns, asked, fewest),
            *(None if array is None else _address(array) for array in (part, duals)),
            *(size, _address(index), ctypes.addressof(bound) if certify else None),
        )
        return steps, index, bound.value


def _address(array: NDArray[Any]) -> int:
    return array.__array_interface__["data"][0]  # a third of the time of array.ctypes.data


def columns_of_agreement(cost: Cost) -> Columns | None:
    """Columns that are cheap for all rows, ascending; None if some rows like other columns."""
    num_rows, num_columns = cost.shape
    means = cost.mean(axis=0, dtype=np.float64)
    order = np.argsort(means, kind="stable")
    is_cheap = np.zeros(num_columns, dtype=bool)
    is_cheap[order[:num_rows]] = True
    asked = cost[np.linspace(0, num_rows - 1, min(num_rows, NUM_ROWS_ASKED)).astype(int)]
    theirs = np.argpartition(asked, num_rows - 1, axis=1)[:, :num_rows]
    if is_cheap[theirs].mean() < AGREED:
        return None
    return np.sort(order[: min(num_columns, int(num_rows * COLUMNS_PER_ROW))])


def duals_of(cost: Cost) -> NDArray[np.float64]:
    """Initial duals [k] for [n, k]: Sinkhorn's, with 0 for the columns that would be left over."""
    duals = sinkhorn_duals(cost)
    least = len(cost) if len(cost) < len(duals) else -1
    return np.minimum(duals - np.partition(duals, least)[least], 0.0)


@functools.cache
def load() -> Native | str:
    """The compiled assignment, or the reason why there is none."""
    try:
        return Native(ctypes.CDLL(str(compile_library(SOURCE, OPTIONS, processor()))))
    except CompileError as error:
        return str(error)
    except OSError as error:
        return f"the compiled {SOURCE.name} cannot be loaded: {first_line(error)}"


def processor() -> str:
    """Instruction sets of this machine's processor; a home folder may be shared by several."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")
