"""Assignment against scipy in float64, every backend on every kind of cost."""

import threading
from itertools import permutations

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch.nn.functional import normalize

from megatron_croc.errors import DataError
from megatron_croc.ops.assignment import (
    assign,
    bounds,
    nearest,
    on_cpu,
    optimality_gap,
    pairwise_cost,
    shortest_paths,
)

BACKENDS = ("auto", "cpu", "scipy", "torch")
NUM_ROWS, NUM_COLUMNS, HIDDEN_SIZE = 24, 80, 32


def costs(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def features(kind, generator):
    """Tokens [2, n, h] of length 1 and a pool [P, h]."""

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    tokens, pool = draw(2, NUM_ROWS, HIDDEN_SIZE), draw(NUM_COLUMNS, HIDDEN_SIZE)
    if kind in ("unit", "clustered"):
        pool = normalize(pool, dim=-1)
    if kind == "clustered":
        centres = draw(4, HIDDEN_SIZE)
        tokens = centres[torch.arange(NUM_ROWS) % 4] + 0.2 * tokens
        pool = normalize(centres[torch.arange(NUM_COLUMNS) % 4] + 2.0 * pool, dim=-1)
    if kind == "correlated":  # tokens of an image share most of what they are
        tokens = draw(2, 1, HIDDEN_SIZE) + 0.3 * draw(2, NUM_ROWS, 3) @ draw(3, HIDDEN_SIZE)
    return normalize(tokens, dim=-1), pool


def made(kind):
    """A cost [2, n, P] of this kind."""
    generator = torch.Generator().manual_seed(3)
    if kind in ("randn", "unit", "clustered", "correlated"):
        return pairwise_cost(*features(kind, generator))
    cost = torch.rand(2, NUM_ROWS, NUM_COLUMNS, generator=generator)
    if kind == "ties":
        return (3 * cost).floor()
    if kind == "all equal":
        return torch.full_like(cost, 2.5)
    if kind == "equal rows":
        return cost[:, :1].expand_as(cost).contiguous()
    if kind == "duplicate columns":
        return cost[:, :, : NUM_COLUMNS // 8].repeat(1, 1, 8)
    if kind == "square":
        return cost[:, :, :NUM_ROWS]
    if kind == "square with a bias":
        return cost[:, :, :NUM_ROWS] + 100 * torch.rand(NUM_ROWS, generator=generator)
    if kind == "one row":
        return cost[:, :1]
    if kind == "one by one":
        return cost[:, :1, :1]
    if kind == "no rows":
        return cost[:, :0]
    if kind == "negative":
        return 1e4 * cost - 7e3
    if kind == "a cheap column only one row wants":
        # What only 8 probed rows cannot see: row 1 alone has a use for the dearest column.
        cost = cost + 100 * torch.arange(NUM_COLUMNS)
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
    assert ours - best <= 1e-5 * scale
    assert objective == pytest.approx(ours, rel=1e-12, abs=1e-12 * scale)
    # Prices are float32: 24 or 48 of them, each right to 6e-8 of the cost.
    assert -1e-5 * scale <= objective - bound <= 1e-5 * scale
    assert bound <= best + 1e-9 * scale


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_guarantee(kind, backend):
    cost = made(kind)
    result = assign(cost, backend=backend)
    assert result.index.dtype == torch.int64 and result.index.shape == cost.shape[:2]
    assert result.objective.dtype == result.bound.dtype == torch.float64
    for matrix, index, *numbers in zip(cost, *result, strict=True):
        check_optimal(matrix, index.tolist(), *(number.item() for number in numbers))
    again = assign(cost.clone(), backend=backend)
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
    result = assign(cost, lengths, backend)
    for image, length in enumerate(lengths):
        index = result.index[image]
        assert (index[length:] == -1).all() and (index[:length] >= 0).all()
        alone = assign(cost[image : image + 1, :length], backend=backend)
        assert torch.equal(index[:length], alone.index[0])
        assert result.objective[image] == alone.objective[0]
        assert result.bound[image] == alone.bound[0]
    as_tensor = assign(cost, torch.tensor(lengths), backend)
    assert torch.equal(as_tensor.index, result.index)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_images_give_no_matches(backend):
    for result in (assign(torch.empty(0, 12, 32), backend=backend), nearest(torch.empty(0, 12, 8))):
        assert result.index.shape == (0, 12) and result.objective.shape == (0,)


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
    with pytest.raises(DataError, match=r"'gpu'.*auto, cpu, scipy, torch"):
        assign(costs(1, 3, 5), backend="gpu")  # type: ignore[arg-type]


def test_large_finite_costs_are_not_mistaken_for_infinite_ones():
    cost = torch.full((1, 2, 3), 3e38)
    assert assign(cost, backend="scipy").index.shape == (1, 2)


# What makes it fast must not make it wrong.


@pytest.mark.parametrize("kind", ["randn", "correlated"])
def test_pruning_is_used_where_rows_agree(kind, monkeypatch):
    monkeypatch.setattr(on_cpu, "linear_sum_assignment", watch := Watch(linear_sum_assignment))
    assign(made(kind), backend="cpu")
    assert all(shape[1] < NUM_COLUMNS for shape in watch.shapes)
    watch.shapes.clear()
    assign(made("unit"), backend="cpu")
    assert watch.shapes == [(NUM_ROWS, NUM_COLUMNS)] * 2


def test_too_few_columns_are_noticed_by_the_bound(monkeypatch):
    """Row 1's best column is dear to all others, so no set of cheap columns holds it."""
    cost = made("a cheap column only one row wants")
    monkeypatch.setattr(on_cpu, "linear_sum_assignment", watch := Watch(linear_sum_assignment))
    index = assign(cost, backend="cpu").index
    assert (index[:, 1] == NUM_COLUMNS - 1).all()
    assert min(shape[1] for shape in watch.shapes) < NUM_COLUMNS  # pruning was tried
    assert max(shape[1] for shape in watch.shapes) == NUM_COLUMNS  # and given up


class Watch:
    """A function that notes the shapes it is called with."""

    def __init__(self, function):
        self.function, self.shapes = function, []

    def __call__(self, matrix):
        self.shapes.append(matrix.shape)
        return self.function(matrix)


def test_threads_solve_what_one_thread_solves(monkeypatch):
    cost = costs(5, 12, 40)
    names = set()
    whole = on_cpu._solve_whole

    def noted(*args, **options):
        names.add(threading.current_thread().name.split("_")[0])
        return whole(*args, **options)

    monkeypatch.setattr(on_cpu, "_solve_whole", noted)
    monkeypatch.setattr(on_cpu, "num_threads", lambda: 1)
    alone = assign(cost, backend="cpu")
    assert names == {"MainThread"}
    monkeypatch.setattr(on_cpu, "num_threads", lambda: 3)
    together = assign(cost, backend="cpu")
    assert names == {"MainThread", "assignment"}
    assert all(torch.equal(one, two) for one, two in zip(alone, together, strict=True))


def test_processes_of_a_machine_share_its_cores(monkeypatch):
    monkeypatch.setattr(on_cpu.os, "sched_getaffinity", lambda _: set(range(16)))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert on_cpu.num_threads() == 4
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "32")
    assert on_cpu.num_threads() == 1


def test_the_bound_is_left_out_only_where_it_costs_time():
    bound = assign(made("unit"), backend="cpu", certify=False).bound
    assert bound.isnan().all()
    pruned = assign(made("randn"), backend="cpu", certify=False)
    torch.testing.assert_close(pruned.bound, pruned.objective, rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("seed", range(20))
def test_the_bound_exposes_a_worse_assignment(seed):
    cost = costs(6, 9, seed=seed).numpy()
    columns = np.random.default_rng(seed).permutation(9)[:6]
    best = cost.astype(float)[linear_sum_assignment(cost)].sum()
    assert bounds.lower_bound(cost, columns) <= best + 1e-6


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("start", ["zero", "random", "far below", "sinkhorn"])
def test_any_starting_prices_lead_to_the_optimum(kind, start):
    cost = made(kind)[0]
    generator = torch.Generator().manual_seed(5)
    prices = {
        "zero": torch.zeros(cost.shape[1]),
        "random": -torch.rand(cost.shape[1], generator=generator) * cost.abs().max()
        if cost.numel()
        else torch.zeros(cost.shape[1]),
        "far below": torch.full((cost.shape[1],), -1e4),
        "sinkhorn": None,
    }[start]
    solution = shortest_paths.solve_image(cost, prices)
    objective = cost.double().gather(1, solution.columns[:, None]).sum().item()
    check_optimal(cost, solution.columns.tolist(), objective, solution.bound.item())
    assert (solution.prices <= 0).all()


def test_good_prices_shorten_the_search():
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
