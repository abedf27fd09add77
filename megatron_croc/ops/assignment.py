"""Which pool token stands in for which visual token.

`hungarian` is the one-to-one assignment of least total distance (paper; released ViCToR code).
`nearest` lets one pool token serve many rows (released Croc code; it collapses to a few rows).
"""

from typing import Literal, NamedTuple

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from megatron_croc.errors import DataError


class Assignment(NamedTuple):
    """Result of `assign`."""

    index: Tensor
    """int64 [B, n], the column taken by each row."""

    objective: Tensor
    """float64 [B], total cost of each image's assignment."""


def pairwise_cost(features: Tensor, pool: Tensor) -> Tensor:
    """Euclidean distances in float32 whatever the autocast: bfloat16 would change every match.

    Args:
        features: [B, n, h].
        pool: [P, h].

    Returns:
        float32 [B, n, P], without a gradient.
    """
    with torch.no_grad(), torch.autocast(features.device.type, enabled=False):
        return torch.cdist(features.float(), pool.float().unsqueeze(0))


def assign(cost: Tensor, mode: Literal["hungarian", "nearest"] = "hungarian") -> Assignment:
    """Match every row of each cost matrix to a column.

    Args:
        cost: [B, n, P], finite; n <= P for `hungarian`.
        mode: see the module.

    Returns:
        Indices on the device of `cost`.

    Raises:
        DataError: wrong shape, n > P, or a cost that is not finite; names the images.
    """
    if cost.ndim != 3:
        raise DataError(f"cost must be [images, rows, columns], got {tuple(cost.shape)}")
    num_images, num_rows, num_columns = cost.shape
    finite = torch.isfinite(cost).flatten(1).all(dim=1) if num_images else None
    if finite is not None and not bool(finite.all()):
        bad = torch.nonzero(~finite).flatten().tolist()
        raise DataError(f"matching cost of image(s) {bad} of the micro-batch is not finite")
    if mode == "nearest":
        index = cost.argmin(dim=2)
    else:
        if num_rows > num_columns:
            raise DataError(
                f"{num_rows} visual tokens cannot each get one of {num_columns} pool tokens; "
                f"set --pool-size to at least {num_rows}"
            )
        matrices = cost.detach().double().cpu().numpy()
        columns = np.empty((num_images, num_rows), dtype=np.int64)
        for image, matrix in enumerate(matrices):
            columns[image] = linear_sum_assignment(matrix)[1]  # rows come back as arange
        index = torch.from_numpy(columns).to(cost.device)
    objective = cost.detach().gather(2, index.unsqueeze(2)).squeeze(2).double().sum(dim=1)
    return Assignment(index, objective)
