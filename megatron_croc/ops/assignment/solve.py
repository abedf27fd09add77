"""The entry points: checks, the choice of a backend, objective and bound."""

import logging
from collections.abc import Sequence
from typing import Literal, NamedTuple, NoReturn, get_args

import torch
from torch import Tensor

from megatron_croc.errors import DataError
from megatron_croc.log import get_logger, log_once
from megatron_croc.ops.assignment import on_cpu, on_gpu, shortest_paths

logger = get_logger(__name__)

Backend = Literal["auto", "triton", "cpu", "scipy", "torch"]


class Assignment(NamedTuple):
    """Result of `assign` and `nearest`; on the device of the cost."""

    index: Tensor
    """int64 [B, n], the column taken by each row; -1 past an image's length."""

    objective: Tensor
    """float64 [B], total cost of each image's assignment."""

    bound: Tensor
    """float64 [B], what no assignment of the image can undercut: objective - bound is the proven
    gap. NaN where it was not asked for and did not come by itself."""

    solved: Tensor
    """bool [B]; False where `check` was off and the cost is not finite: the index is -1 there."""


@torch.no_grad()
def assign(
    cost: Tensor,
    lengths: Sequence[int] | Tensor | None = None,
    backend: Backend = "auto",
    *,
    certify: bool = False,
    check: bool = True,
) -> Assignment:
    """Match every row to a column of its own at the least total cost, image by image.

    The objective is within 1e-5 of the optimum, relative to the sum of the costs' magnitudes, and
    the same input gives the same output. Which of several equally good assignments comes out is
    left to the backend.

    Args:
        cost: float32 or float64 [B, n, P], finite, n <= P.
        lengths: [B], rows of each image; the rest is padding, whatever it holds. All n if None.
        backend: auto, triton, cpu, scipy or torch; see `choose_backend`.
        certify: always compute the bound. It costs the CPU about a millisecond an image.
        check: refuse a cost that is not finite. Without it triton never waits for the device, and
            such images come back unsolved.

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
    backend = choose_backend(backend, cost.device)
    if backend == "triton":
        result = _solve_on_gpu(cost, rows, certify=certify)
        if check and not result.solved.all():
            _refuse(torch.nonzero(~result.solved).flatten().tolist())
        return result
    bad = _images_not_finite(cost, rows)
    if bad and check:
        _refuse(bad)
    for image in bad:
        rows[image] = 0
    if backend == "torch":
        solved = _solve_torch(cost, rows)
    else:
        solved = _solve_numpy(cost, rows, plain=backend == "scipy", certify=certify)
    index = torch.full(cost.shape[:2], -1, dtype=torch.int64)
    for image, (columns, _) in enumerate(solved):
        index[image, : rows[image]] = columns
    bound = torch.tensor([bound for _, bound in solved], dtype=torch.float64)
    index = index.to(cost.device)
    is_solved = torch.tensor([image not in bad for image in range(len(rows))], dtype=torch.bool)
    return Assignment(
        index, _objective(cost, index), bound.to(cost.device), is_solved.to(cost.device)
    )


def choose_backend(backend: Backend, device: torch.device) -> Backend:
    """`auto` made definite: triton on CUDA where it is installed, else cpu, saying why once.

    Raises:
        DataError: triton was asked for and cannot run on this device.
    """
    if backend == "triton" and (reason := on_gpu.unsupported_reason(device)) is not None:
        raise DataError(f"--assign-backend triton: {reason}; use auto")
    if backend != "auto":
        return backend
    if device.type != "cuda":
        return "cpu"
    reason = on_gpu.unsupported_reason(device)
    if reason is None:
        return "triton"
    log_once(logger, logging.WARNING, f"tokens are matched on the CPU: {reason}")
    return "cpu"


@torch.no_grad()
def nearest(cost: Tensor, *, check: bool = True) -> Assignment:
    """Give every row its cheapest column, which it may share (released Croc code).

    Args:
        cost: float32 or float64 [B, n, P], finite.
        check: refuse a cost that is not finite. Without it nothing waits for the device.

    Returns:
        See `Assignment`; the bound is the objective.

    Raises:
        DataError: as `assign`.
    """
    rows = _checked_lengths(cost, None)
    if check and (bad := _images_not_finite(cost, rows)):
        _refuse(bad)
    index = cost.argmin(dim=2)
    objective = _objective(cost.detach(), index)
    solved = torch.ones(len(cost), dtype=torch.bool, device=cost.device)
    return Assignment(index, objective, objective, solved)


def optimality_gap(cost: Tensor, index: Tensor) -> float:
    """How much more one image's assignment costs than scipy's, over scipy's magnitude.

    Args:
        cost: [n, P].
        index: int64 [n].

    Returns:
        0 up to rounding, whatever the backend; below 1e-5 by the promise of `assign`.
    """
    best = assign(cost.unsqueeze(0), backend="scipy")
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


def _solve_on_gpu(cost: Tensor, rows: list[int], *, certify: bool) -> Assignment:
    lengths = torch.full((len(cost),), cost.shape[1], device=cost.device)
    if any(length != cost.shape[1] for length in rows):
        lengths = torch.tensor(rows, device=cost.device)
    found = on_gpu.solve_triton(cost, lengths)
    bound = torch.full((len(cost),), torch.nan, dtype=torch.float64, device=cost.device)
    if certify:  # image by image: the cost in float64 is large
        for image, duals in enumerate(found.duals):
            reduced = cost[image, : rows[image]].double() - duals
            bound[image] = reduced.amin(dim=1).sum() + duals.sum()
    return Assignment(found.index, _objective(cost, found.index), bound, found.solved)


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
    return rows


def _images_not_finite(cost: Tensor, rows: list[int]) -> list[int]:
    # A sum costs a quarter of isfinite; where it is finite, so is every term.
    suspects = torch.nonzero(~torch.isfinite(cost.sum(dim=(1, 2)))).flatten().tolist()
    return [image for image in suspects if not cost[image, : rows[image]].isfinite().all()]


def _refuse(images: list[int]) -> NoReturn:
    raise DataError(f"matching cost of image(s) {images} of the micro-batch is not finite")
