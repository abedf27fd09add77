"""Matching against scipy, numpy and all permutations."""

from itertools import permutations

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment

from megatron_croc.errors import DataError
from megatron_croc.ops.assignment import assign, pairwise_cost


def costs(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(3, 12, 12), (4, 12, 32), (1, 1, 1), (2, 1, 9)])
def test_hungarian_is_one_to_one_and_as_good_as_scipy(shape):
    cost = costs(*shape)
    result = assign(cost, "hungarian")
    assert result.index.dtype == torch.int64 and result.index.shape == shape[:2]
    assert result.objective.dtype == torch.float64 and result.objective.shape == shape[:1]
    for image, matrix in enumerate(cost.double().numpy()):
        index = result.index[image].tolist()
        assert len(set(index)) == len(index)
        best = matrix[linear_sum_assignment(matrix)].sum()
        ours = matrix[np.arange(len(index)), index].sum()
        # Equal up to the order of a float64 sum.
        assert ours == pytest.approx(best, rel=1e-12)
        assert result.objective[image].item() == pytest.approx(best, rel=1e-12)


def test_hungarian_is_the_best_of_all_permutations():
    cost = costs(6, 3, 5, seed=1)
    objective = assign(cost).objective
    for matrix, ours in zip(cost.double().numpy(), objective, strict=True):
        sums = (matrix[range(3), list(p)].sum() for p in permutations(range(5), 3))
        assert ours.item() == pytest.approx(min(sums), rel=1e-12)


def test_rows_that_want_the_same_column_are_kept_apart():
    # Row 0 loses least by giving way: 1 + 2 < 0 + 10.
    cost = torch.tensor([[[0.0, 1.0], [2.0, 12.0]]])
    assert assign(cost, "hungarian").index.tolist() == [[1, 0]]
    assert assign(cost, "nearest").index.tolist() == [[0, 0]]


def test_nearest_is_the_argmin_of_each_row():
    cost = costs(3, 20, 7)
    result = assign(cost, "nearest")
    assert (result.index.numpy() == cost.numpy().argmin(axis=2)).all()
    minimum = cost.double().numpy().min(axis=2).sum(axis=1)
    assert result.objective.numpy() == pytest.approx(minimum, rel=1e-12)


def test_no_images_give_no_matches():
    for mode in ("hungarian", "nearest"):
        result = assign(torch.empty(0, 12, 32), mode)
        assert result.index.shape == (0, 12) and result.objective.shape == (0,)


def test_a_negative_or_large_cost_is_no_obstacle():
    cost = costs(2, 5, 8) * 1e6 - 3e5
    for matrix, ours in zip(cost.double().numpy(), assign(cost).objective, strict=True):
        best = matrix[linear_sum_assignment(matrix)].sum()
        assert ours.item() == pytest.approx(best, rel=1e-9)


def test_errors_say_what_is_wrong():
    with pytest.raises(DataError, match=r"\(4, 5\)"):
        assign(costs(4, 5))
    cost = costs(4, 3, 5)
    cost[1, 2, 0], cost[3, 0, 0] = float("nan"), float("inf")
    for mode in ("hungarian", "nearest"):
        with pytest.raises(DataError, match=r"image\(s\) \[1, 3\]"):
            assign(cost, mode)
    with pytest.raises(DataError, match=r"6 visual tokens .* 5 pool tokens.*at least 6"):
        assign(costs(1, 6, 5), "hungarian")
    assert assign(costs(1, 6, 5), "nearest").index.shape == (1, 6)


def exact_distance(features, pool):
    difference = features.double()[:, :, None] - pool.double()[None, None]
    return difference.square().sum(dim=-1).sqrt()


def test_cost_is_the_euclidean_distance():
    generator = torch.Generator().manual_seed(0)
    features = torch.nn.functional.normalize(torch.randn(2, 12, 64, generator=generator), dim=-1)
    pool = torch.randn(30, 64, generator=generator)
    # float32 through |a|^2 - 2ab + |b|^2: about 1e-6 at distances near 8.
    cost = pairwise_cost(features, pool)
    torch.testing.assert_close(cost.double(), exact_distance(features, pool), rtol=1e-5, atol=0)


def test_cost_stays_float32_under_bfloat16_autocast(monkeypatch):
    real = torch.cdist

    def watched(*tensors):
        assert not torch.is_autocast_enabled("cpu")
        return real(*tensors)

    monkeypatch.setattr(torch, "cdist", watched)
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(1, 40, 32, generator=generator).bfloat16().requires_grad_()
    pool = torch.nn.Parameter(torch.randn(50, 32, generator=generator).bfloat16())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cost = pairwise_cost(features, pool)
    assert cost.dtype == torch.float32 and not cost.requires_grad
    # bfloat16 arithmetic would be off by 1e-2; inputs are exact in float32.
    exact = exact_distance(features.detach(), pool.detach())
    torch.testing.assert_close(cost.double(), exact, rtol=1e-5, atol=0)
