"""Assignment against scipy in float64, every backend on every kind of cost."""

import subprocess
import sys
from itertools import permutations

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from scipy.sparse import csr_array
from scipy.sparse.csgraph import min_weight_full_bipartite_matching

from megatron_croc.errors import DataError
from megatron_croc.ops.assignment import (
    assign,
    bounds,
    choose_backend,
    nearest,
    optimality_gap,
    pairwise_cost,
    shortest_paths,
    solve,
)
from tests.support.assignment import (
    KINDS,
    NUM_COLUMNS,
    NUM_ROWS,
    check_optimal,
    check_ties,
    costs,
    made,
)

BACKENDS = ("auto", "cpu", "scipy", "torch")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_guarantee(kind, backend):
    cost = made(kind)
    result = assign(cost, backend=backend, certify=True)
    assert (
        result.solved.all()
        and result.index.dtype == torch.int64
        and result.index.shape == cost.shape[:2]
    )
    assert result.objective.dtype == result.bound.dtype == torch.float64
    for matrix, index, *numbers in zip(cost, *result[:3], strict=True):
        check_optimal(matrix, index.tolist(), *(number.item() for number in numbers))
    again = assign(cost.clone(), backend=backend, certify=True)
    assert all(torch.equal(one, two) for one, two in zip(result, again, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_best_of_all_permutations(backend):
    cost = costs(6, 3, 5, seed=1)
    objective = assign(cost, backend=backend).objective
    for matrix, ours in zip(cost.double().numpy(), objective, strict=True):
        sums = (matrix[range(3), list(p)].sum() for p in permutations(range(5), 3))
        assert ours.item() == pytest.approx(min(sums), rel=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_images_of_different_length(backend):
    cost = made("randn").repeat(2, 1, 1)
    lengths = [NUM_ROWS, 7, 0, 1]
    for image, length in enumerate(lengths):
        cost[image, length:] = float("nan")  # padding may hold anything
    result = assign(cost, lengths, backend, certify=True)
    for image, length in enumerate(lengths):
        index = result.index[image]
        assert (index[length:] == -1).all() and (index[:length] >= 0).all()
        alone = assign(cost[image : image + 1, :length], backend=backend, certify=True)
        assert torch.equal(index[:length], alone.index[0])
        assert result.objective[image] == alone.objective[0]
        assert result.bound[image] == alone.bound[0]
    as_tensor = assign(cost, torch.tensor(lengths), backend)
    assert torch.equal(as_tensor.index, result.index)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_images_give_no_matches(backend):
    for result in (assign(torch.empty(0, 12, 32), backend=backend), nearest(torch.empty(0, 12, 8))):
        assert result.index.shape == (0, 12) and result.objective.shape == (0,)


@pytest.mark.parametrize("num_values", [1, 2, 3])
@pytest.mark.parametrize("backend", BACKENDS)
def test_any_number_of_ties(backend, num_values):
    check_ties(lambda cost, lengths: assign(cost, lengths, backend, certify=True), num_values)


@pytest.mark.parametrize("backend", BACKENDS)
def test_images_that_are_not_finite_can_be_left_out(backend):
    cost = costs(3, 4, 6)
    cost[1, 2, 0] = float("nan")
    result = assign(cost, None, backend, check=False)
    assert result.solved.tolist() == [True, False, True]
    assert (result.index[1] == -1).all()
    others = assign(cost[[0, 2]], None, backend)
    assert torch.equal(result.index[[0, 2]], others.index)


@pytest.mark.parametrize("backend", BACKENDS)
def test_errors_say_what_is_wrong(backend):
    with pytest.raises(DataError, match=r"\(4, 5\)"):
        assign(costs(4, 5), backend=backend)
    cost = costs(4, 3, 5)
    cost[1, 2, 0], cost[3, 0, 0] = float("nan"), float("inf")
    with pytest.raises(DataError, match=r"image\(s\) \[1, 3\]"):
        assign(cost, backend=backend)
    with pytest.raises(DataError, match=r"image\(s\) \[3\]"):  # NaN lies in the padding of image 1
        assign(cost, [3, 2, 3, 3], backend)
    with pytest.raises(DataError, match=r"6 visual tokens .* 5 pool tokens.*at least 6"):
        assign(costs(1, 6, 5), backend=backend)
    assert assign(costs(1, 6, 5), [5], backend).index.shape == (1, 6)
    for lengths in ([3], [3, 4], [3, -1]):
        with pytest.raises(DataError, match=r"2 numbers from 0 to 3.*got \[3"):
            assign(costs(2, 3, 5), lengths, backend)
    with pytest.raises(DataError, match=r"bfloat16.*float32"):
        assign(costs(1, 3, 5).bfloat16(), backend=backend)


def test_an_unknown_backend_is_refused_with_the_known_ones():
    with pytest.raises(DataError, match=r"'gpu'.*auto, triton, cpu, scipy, torch"):
        assign(costs(1, 3, 5), backend="gpu")  # type: ignore[arg-type]


@pytest.mark.parametrize("backend", BACKENDS)
def test_large_finite_costs_are_not_mistaken_for_infinite_ones(backend):
    cost = torch.full((1, 2, 3), 3e38)
    cost[0, 1, 2] = 0.0
    assert assign(cost, backend=backend).index[0].tolist() in ([0, 2], [1, 2])


def test_auto_takes_triton_on_cuda_and_says_once_what_keeps_it_from_it(monkeypatch):
    said = []
    monkeypatch.setattr(solve, "log_once", lambda *args: said.append(args[-1]))
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    monkeypatch.setattr(solve.on_gpu, "unsupported_reason", lambda device: None)
    assert choose_backend("auto", cuda) == "triton"
    assert choose_backend("auto", cpu) == "cpu"
    monkeypatch.setattr(
        solve.on_gpu, "unsupported_reason", lambda device: "Triton is not installed"
    )
    assert not said
    assert choose_backend("auto", cuda) == "cpu"
    assert said == ["tokens are matched on the CPU: Triton is not installed"]
    with pytest.raises(DataError, match="triton: Triton is not installed; use auto"):
        choose_backend("triton", cuda)
    assert choose_backend("scipy", cuda) == "scipy"


def test_triton_needs_cuda_or_its_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(DataError, match=r"--assign-backend triton: Triton .*; use auto"):
        assign(costs(1, 3, 5), backend="triton")


def test_triton_is_imported_only_where_it_runs():
    code = "import sys, megatron_croc.ops.assignment as a, torch; a.assign(torch.rand(1, 2, 3)); "
    code += "sys.exit('megatron_croc.ops.assignment.triton_kernel' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("seed", range(20))
def test_the_bound_exposes_a_worse_assignment(seed):
    cost = costs(6, 9, seed=seed).numpy()
    columns = np.random.default_rng(seed).permutation(9)[:6]
    best = cost.astype(float)[linear_sum_assignment(cost)].sum()
    proof = bounds.prove(cost, columns)
    assert proof.bound <= best + 1e-6
    assert proof.objective > best + 1e-3 and not proof.is_optimal
    assert bounds.prove(cost, linear_sum_assignment(cost)[1]).is_optimal


def test_duals_converge_among_the_entries_an_assignment_is_best_of():
    cost = costs(200, 240, seed=3).numpy()
    cheapest = np.partition(cost, 4, axis=1)[:, 4:5]
    graph = csr_array(np.where(cost <= cheapest, cost, 0.0))
    columns = min_weight_full_bipartite_matching(graph)[1]
    proof = bounds.prove(cost, columns, among=graph)
    assert not proof.is_optimal
    reduced = cost - proof.row_duals[:, None] - proof.column_duals
    assert reduced[graph.nonzero()].min() > -1e-6  # nobody would rather have another of those
    assert reduced.min() < -1e-3  # somebody would of the rest
    assert (proof.feasible_duals < proof.column_duals - 1e-3).sum() == (
        reduced.min(axis=0) < -1e-3
    ).sum()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("start", ["zero", "random", "far below", "sinkhorn"])
def test_any_initial_duals_lead_to_the_optimum(kind, start):
    cost = made(kind)[0]
    generator = torch.Generator().manual_seed(5)
    duals = {
        "zero": torch.zeros(cost.shape[1]),
        "random": -torch.rand(cost.shape[1], generator=generator) * cost.abs().max()
        if cost.numel()
        else torch.zeros(cost.shape[1]),
        "far below": torch.full((cost.shape[1],), -1e4),
        "sinkhorn": None,
    }[start]
    solution = shortest_paths.solve_image(cost, duals)
    objective = cost.double().gather(1, solution.columns[:, None]).sum().item()
    check_optimal(cost, solution.columns.tolist(), objective, solution.bound.item())
    assert (solution.duals <= 0).all()


def test_good_duals_shorten_the_search():
    cost = made("randn")[0]
    cold = shortest_paths.solve_image(cost, torch.zeros(NUM_COLUMNS)).num_steps
    assert shortest_paths.solve_image(cost).num_steps < cold / 5


def test_the_gap_to_scipy():
    cost = made("randn")[0]
    index = assign(cost.unsqueeze(0)).index[0]
    assert optimality_gap(cost, index) == pytest.approx(0.0, abs=1e-12)
    swapped = index.clone()
    swapped[0] = cost.max(dim=1).indices[0]
    worse = (cost[0, swapped[0]] - cost[0, index[0]]).double()
    best = cost.double().gather(1, index[:, None]).sum()
    assert optimality_gap(cost, swapped) == pytest.approx(float(worse / best), rel=1e-6)


# nearest, and the cost.


def test_rows_that_want_the_same_column_are_kept_apart():
    # Row 0 loses least by giving way: 1 + 2 < 0 + 10.
    cost = torch.tensor([[[0.0, 1.0], [2.0, 12.0]]])
    assert assign(cost).index.tolist() == [[1, 0]]
    assert nearest(cost).index.tolist() == [[0, 0]]


def test_nearest_is_the_argmin_of_each_row():
    cost = costs(3, 20, 7)
    result = nearest(cost)
    assert (result.index.numpy() == cost.numpy().argmin(axis=2)).all()
    minimum = cost.double().numpy().min(axis=2).sum(axis=1)
    assert result.objective.numpy() == pytest.approx(minimum, rel=1e-12)
    cost[1, 0, 0] = float("nan")
    with pytest.raises(DataError, match=r"image\(s\) \[1\]"):
        nearest(cost)


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
