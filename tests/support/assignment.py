"""Matching problems of every kind, and what a right answer to one is."""

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch.nn.functional import normalize

from megatron_croc.ops.assignment import pairwise_cost

NUM_ROWS, NUM_COLUMNS, HIDDEN_SIZE = 24, 80, 32


def costs(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def features(kind, generator, num_images, num_rows, num_columns, hidden_size):
    """Tokens [B, n, h] of length 1 and a pool [P, h]."""

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    tokens, pool = draw(num_images, num_rows, hidden_size), draw(num_columns, hidden_size)
    if kind in ("unit", "clustered"):
        pool = normalize(pool, dim=-1)
    if kind == "clustered":
        centres = draw(4, hidden_size)
        tokens = centres[torch.arange(num_rows) % 4] + 0.2 * tokens
        pool = normalize(centres[torch.arange(num_columns) % 4] + 2.0 * pool, dim=-1)
    if kind == "correlated":  # tokens of an image share most of what they are
        tokens = draw(num_images, 1, hidden_size) + 0.3 * draw(num_images, num_rows, 3) @ draw(
            3, hidden_size
        )
    return normalize(tokens, dim=-1), pool


def made(
    kind, num_rows=NUM_ROWS, num_columns=NUM_COLUMNS, *, hidden_size=HIDDEN_SIZE, num_images=2
):
    """A cost [B, n, P] of this kind."""
    sizes = (num_images, num_rows, num_columns)
    generator = torch.Generator().manual_seed(3)
    if kind in ("randn", "unit", "clustered", "correlated"):
        return pairwise_cost(*features(kind, generator, *sizes, hidden_size))
    cost = torch.rand(*sizes, generator=generator)
    if kind == "ties":
        return (3 * cost).floor()
    if kind == "all equal":
        return torch.full_like(cost, 2.5)
    if kind == "equal rows":
        return cost[:, :1].expand_as(cost).contiguous()
    if kind == "duplicate columns":
        return cost[:, :, : num_columns // 8].repeat(1, 1, 8)
    if kind == "square":
        return cost[:, :, :num_rows]
    if kind == "square with a bias":
        return cost[:, :, :num_rows] + 100 * torch.rand(num_rows, generator=generator)
    if kind == "one row":
        return cost[:, :1]
    if kind == "one by one":
        return cost[:, :1, :1]
    if kind == "no rows":
        return cost[:, :0]
    if kind == "negative":
        return 1e4 * cost - 7e3
    if kind == "a cheap column only one row wants":
        # A probe of 8 rows cannot see this: only row 1 has a low cost in the most expensive column.
        cost = cost + 100 * torch.arange(num_columns)
        cost[:, 1, -1] = -50.0
        return cost
    raise AssertionError(kind)


KINDS = (
    *("randn", "unit", "clustered", "correlated"),
    *("ties", "all equal", "equal rows", "duplicate columns", "square", "square with a bias"),
    *("one row", "one by one", "no rows", "negative", "a cheap column only one row wants"),
)


def check_optimal(matrix, index, objective, bound):
    """One-to-one; as good as scipy in float64; a true bound that proves it."""
    assert len(set(index)) == len(index)
    matrix = matrix.double().numpy()
    best = matrix[linear_sum_assignment(matrix)].sum()
    ours = matrix[np.arange(len(index)), index].sum()
    scale = np.abs(matrix[np.arange(len(index)), index]).sum()
    scale = max(scale, 1e-6 * np.abs(matrix).max(initial=0.0))  # ties may cost nothing at all
    assert ours - best <= 1e-5 * scale
    assert objective == pytest.approx(ours, rel=1e-12, abs=1e-12 * scale)
    # Prices are float32: 24 or 48 of them, each right to 6e-8 of the cost.
    assert -1e-5 * scale <= objective - bound <= 1e-5 * scale
    assert bound <= best + 1e-9 * scale


def check_ties(solve, num_values, num_images=24):
    """Small problems of few distinct costs: duplicate rows and columns, n = P, n = 1, n = 0."""
    generator = torch.Generator().manual_seed(num_values)
    for num_columns in (1, 2, 5, 8):
        cost = torch.randint(num_values, (num_images, 8, num_columns), generator=generator).float()
        lengths = torch.randint(num_columns + 1, (num_images,), generator=generator)
        lengths[0] = num_columns
        result = solve(cost, lengths)
        assert result.solved.all()
        for matrix, length, index, *numbers in zip(cost, lengths, *result[:3], strict=True):
            numbers = [number.item() for number in numbers]
            check_optimal(matrix[:length], index[:length].tolist(), *numbers)
            assert (index[length:] == -1).all()
