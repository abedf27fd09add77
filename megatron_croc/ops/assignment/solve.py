"""Entry points of the assignment: checks, choice of a backend, objective and bound."""

import logging
from collections.abc import Sequence
from typing import Literal, NamedTuple, NoReturn, get_args

import numpy as np
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
    """int64 [B, n], column of each row; -1 in the padding of an image."""

    objective: Tensor
    """float64 [B], total cost of the assignment of each image."""

    bound: Tensor
    """float64 [B], lower bound for all assignments of the image; objective - bound: proven gap.
    NaN if `certify` is False and the search did not compute it anyway."""

    solved: Tensor
    """bool [B], False where the cost is not finite and `check` is False; the index is -1 there."""


def assign(
    cost: Tensor,
    lengths: Sequence[int] | Tensor | None = None,
    backend: Backend = "auto",
    *,
    certify: bool = False,
    check: bool = True,
) -> Assignment:
    """Match every row to a column of its own with minimum total cost, for each image.

    The objective is within 1e-5 of the optimum, relative to the sum of absolute costs. The result
    is deterministic; of several optimal assignments, backends may return different ones.

    Args:
        cost: float32 or float64 [B, n, P], finite, n <= P.
        lengths: [B], rows of each image; the others are padding of any value. None: all n.
        backend: auto, triton, cpu, scipy or torch; see `choose_backend`.
        certify: always compute the bound; about one millisecond per image on the CPU.
        check: refuse a cost that is not finite. If False, such images are not solved, and triton
            needs no device sync.

    Returns:
        See `Assignment`.

    Raises:
        DataError: wrong shape, dtype, lengths or backend, more rows than columns, or a cost that
            is not finite. The message has the values.
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
    return _solve_on_host(cost, rows, backend, certify=certify, check=check)


def choose_backend(backend: Backend, device: torch.device) -> Backend:
    """Return the backend that `auto` stands for: triton on CUDA if installed, else cpu.

    A warning gives the reason, once, if a CPU solves the assignments of a GPU.

    Raises:
        DataError: `backend` is triton, and triton cannot run on this device.
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
    """Match every row to its cheapest column; rows may share one (released Croc code).

    Args:
        cost: float32 or float64 [B, n, P], finite.
        check: refuse a cost that is not finite; needs a device sync.

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
    """Relative excess of an image's assignment cost over the optimum found by scipy.

    Args:
        cost: [n, P].
        index: int64 [n].

    Returns:
        0 up to rounding; below 1e-5 for every backend, see `assign`.
    """
    best = assign(cost.unsqueeze(0), backend="scipy")
    ours = _objective(cost.unsqueeze(0), index.unsqueeze(0))
    scale = _objective(cost.abs().unsqueeze(0), best.index)
    gap = (ours - best.objective) / scale.clamp(min=torch.finfo(torch.float64).tiny)
    return float(gap)


def _solve_on_host(
    cost: Tensor, rows: list[int], backend: Backend, *, certify: bool, check: bool
) -> Assignment:
    matrices = cost.cpu().numpy()
    if backend == "torch":
        solved = _solve_torch(cost, rows)
    else:
        solve = on_cpu.solve_scipy if backend == "scipy" else on_cpu.solve_cpu
        costs = [matrix[:length] for matrix, length in zip(matrices, rows, strict=True)]
        solved = solve(costs, certify=certify)
    bad = [image for image, solution in enumerate(solved) if solution is None]
    if bad and check:
        _refuse(bad)
    # In numpy: for one image the operations of torch took as long as the search.
    num_images = len(rows)
    index = np.full(matrices.shape[:2], -1)
    objective, bound = np.zeros(num_images), np.full(num_images, np.nan)
    for image, solution in enumerate(solved):
        if solution is not None:
            columns, bound[image] = solution
            index[image, : len(columns)] = columns
            taken = matrices[image, np.arange(len(columns)), columns]
            objective[image] = taken.sum(dtype=np.float64)
    is_solved = np.ones(num_images, dtype=bool)
    is_solved[bad] = False
    arrays = (index, objective, bound, is_solved)
    result = Assignment(*map(torch.from_numpy, arrays))
    return result if cost.device.type == "cpu" else Assignment(*(x.to(cost.device) for x in result))


def _solve_torch(cost: Tensor, rows: list[int]) -> list[on_cpu.Solved]:
    solved: list[on_cpu.Solved] = [None] * len(rows)
    bad = _images_not_finite(cost, rows)
    for image, length in enumerate(rows):
        if image not in bad:
            solution = shortest_paths.solve_image(cost[image, :length])
            solved[image] = solution.columns.cpu().numpy(), float(solution.bound)
    return solved


def _solve_on_gpu(cost: Tensor, rows: list[int], *, certify: bool) -> Assignment:
    lengths = torch.full((len(cost),), cost.shape[1], device=cost.device)
    if any(length != cost.shape[1] for length in rows):
        lengths = torch.tensor(rows, device=cost.device)
    found = on_gpu.solve_triton(cost, lengths)
    bound = torch.full((len(cost),), torch.nan, dtype=torch.float64, device=cost.device)
    if certify:  # one image at a time, because the cost in float64 is large
        for image, duals in enumerate(found.duals):
            reduced = cost[image, : rows[image]].double() - duals
            bound[image] = reduced.amin(dim=1).sum() + duals.sum()
    return Assignment(found.index, _objective(cost, found.index), bound, found.solved)


def _objective(cost: Tensor, index: Tensor) -> Tensor:
    taken = cost.gather(2, index.clamp(min=0).unsqueeze(2)).squeeze(2).double()
    return taken.masked_fill(index < 0, 0.0).sum(dim=1)


def _checked_lengths(cost: Tensor, lengths: Sequence[int] | Tensor | None) -> list[int]:
    """Number of rows of each image, after the checks that all backends share."""
    if cost.ndim != 3:
        raise DataError(f"cost must be [images, rows, columns], got {tuple(cost.shape)}")
    if cost.dtype not in (torch.float32, torch.float64):
        raise DataError(
            f"cost is {cost.dtype}, which would change every match; compute it with pairwise_cost, "
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
    # A sum takes a quarter of the time of isfinite. If it is finite, all terms are.
    suspects = torch.nonzero(~torch.isfinite(cost.sum(dim=(1, 2)))).flatten().tolist()
    return [image for image in suspects if not cost[image, : rows[image]].isfinite().all()]


def _refuse(images: list[int]) -> NoReturn:
    raise DataError(f"matching cost of image(s) {images} of the micro-batch is not finite")
