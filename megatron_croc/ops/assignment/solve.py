"""The entry points: checks, the choice of a backend, objective and bound."""

from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from megatron_croc.errors import DataError
from megatron_croc.ops.assignment import on_cpu, shortest_paths

Backend = Literal["auto", "cpu", "scipy", "torch"]


class Assignment(NamedTuple):
    """Result of `assign` and `nearest`; on the device of the cost."""

    index: Tensor
    """int64 [B, n], the column taken by each row; -1 past an image's length."""

    objective: Tensor
    """float64 [B], total cost of each image's assignment."""

    bound: Tensor
    """float64 [B], what no assignment of the image can undercut: objective - bound is the proven
    gap. NaN where it was not asked for and did not come by itself."""


@torch.no_grad()
def assign(
    cost: Tensor,
    lengths: Sequence[int] | Tensor | None = None,
    backend: Backend = "auto",
    *,
    certify: bool = True,
) -> Assignment:
    """Match every row to a column of its own at the least total cost, image by image.

    The objective is within 1e-5 of the optimum, relative to the sum of the costs' magnitudes, and
    the same input gives the same output. Which of several equally good assignments comes out is
    left to the backend.

    Args:
        cost: float32 or float64 [B, n, P], finite, n <= P.
        lengths: [B], rows of each image; the rest is padding, whatever it holds. All n if None.
        backend: auto, cpu, scipy or torch; auto is cpu.
        certify: always compute the bound. It costs the CPU some milliseconds an image.

    Returns:
        See `Assignment`.

    Raises:
        DataError: wrong shape, dtype, lengths or backend, more rows than columns, or a cost that
            is not finite; names the values.
    """
    rows = _checked_lengths(cost, lengths)
    if backend not in get_args(Backend):
        raise DataError(f"backend={backend!r}: must be one of {', '.join(get_args(Backend))}")
    if max(rows, default=0) > cost.shape[2]:
        raise DataError(
            f"{max(rows)} visual tokens cannot each get one of {cost.shape[2]} pool tokens; "
            f"set --pool-size to at least {max(rows)}"
        )
    cost = cost.detach()
    if backend == "torch":
        solved = _solve_torch(cost, rows)
    else:
        solved = _solve_numpy(cost, rows, plain=backend == "scipy", certify=certify)
    index = torch.full(cost.shape[:2], -1, dtype=torch.int64)
    for image, (columns, _) in enumerate(solved):
        index[image, : rows[image]] = columns
    bound = torch.tensor([bound for _, bound in solved], dtype=torch.float64)
    index = index.to(cost.device)
    return Assignment(index, _objective(cost, index), bound.to(cost.device))


@torch.no_grad()
def nearest(cost: Tensor) -> Assignment:
    """Give every row its cheapest column, which it may share (released Croc code).

    Args:
        cost: float32 or float64 [B, n, P], finite.

    Returns:
        See `Assignment`; the bound is the objective.

    Raises:
        DataError: as `assign`.
    """
    _checked_lengths(cost, None)
    index = cost.argmin(dim=2)
    objective = _objective(cost.detach(), index)
    return Assignment(index, objective, objective)


def optimality_gap(cost: Tensor, index: Tensor) -> float:
    """How much more one image's assignment costs than scipy's, over scipy's magnitude.

    Args:
        cost: [n, P].
        index: int64 [n].

    Returns:
        0 up to rounding, whatever the backend; below 1e-5 by the promise of `assign`.
    """
    best = assign(cost.unsqueeze(0), backend="scipy", certify=False)
    ours = _objective(cost.unsqueeze(0), index.unsqueeze(0))
    scale = _objective(cost.abs().unsqueeze(0), best.index)
    gap = (ours - best.objective) / scale.clamp(min=torch.finfo(torch.float64).tiny)
    return float(gap)


def _solve_numpy(
    cost: Tensor, rows: list[int], *, plain: bool, certify: bool
) -> list[tuple[Tensor, float]]:
    matrices = cost.cpu().numpy()
    costs = [matrix[:length] for matrix, length in zip(matrices, rows, strict=True)]
    solve = on_cpu.solve_scipy if plain else on_cpu.solve_cpu
    return [(torch.from_numpy(c), bound) for c, bound in solve(costs, certify=certify)]


def _solve_torch(cost: Tensor, rows: list[int]) -> list[tuple[Tensor, float]]:
    solutions = [
        shortest_paths.solve_image(matrix[:length])
        for matrix, length in zip(cost, rows, strict=True)
    ]
    return [(solution.columns.cpu(), float(solution.bound)) for solution in solutions]


def _objective(cost: Tensor, index: Tensor) -> Tensor:
    taken = cost.gather(2, index.clamp(min=0).unsqueeze(2)).squeeze(2).double()
    return taken.masked_fill(index < 0, 0.0).sum(dim=1)


def _checked_lengths(cost: Tensor, lengths: Sequence[int] | Tensor | None) -> list[int]:
    """Rows of each image, after every check that does not depend on the backend."""
    if cost.ndim != 3:
        raise DataError(f"cost must be [images, rows, columns], got {tuple(cost.shape)}")
    if cost.dtype not in (torch.float32, torch.float64):
        raise DataError(
            f"cost is {cost.dtype}, which changes every match; compute it with pairwise_cost, "
            "or in float32"
        )
    num_images, num_rows, _ = cost.shape
    rows = [num_rows] * num_images if lengths is None else [int(length) for length in lengths]
    if len(rows) != num_images or any(not 0 <= length <= num_rows for length in rows):
        raise DataError(
            f"lengths must be {num_images} numbers from 0 to {num_rows}, one for each image, "
            f"got {rows}"
        )
    # A sum costs a quarter of isfinite; where it is finite, so is every term.
    suspects = torch.nonzero(~torch.isfinite(cost.sum(dim=(1, 2)))).flatten().tolist()
    bad = [image for image in suspects if not cost[image, : rows[image]].isfinite().all()]
    if bad:
        raise DataError(f"matching cost of image(s) {bad} of the micro-batch is not finite")
    return rows
