"""Compiled assignment: exact on thousands of small costs, from any beginning, on any processor."""

import ctypes

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment

from megatron_croc.errors import DataError
from megatron_croc.native_code import compile_library
from megatron_croc.ops.assignment import assign, native, on_cpu
from megatron_croc.ops.assignment.native import CROWDED, SOURCE, Native
from tests.support.assignment import KINDS, check_optimal, made

LARGE = 256, 800
"""Rows and columns, so many that paths, chunks and shortlists matter."""


@pytest.fixture(scope="module")
def compiled():
    found = native.load()
    if isinstance(found, str):
        pytest.skip(found)
    return found


def small_costs(num_cases, dtype):
    """Whole numbers, so that sums are exact: few or many values, repeated rows and columns."""
    generator = np.random.default_rng(7)
    for _ in range(num_cases):
        low, high = (1, 30) if generator.random() < 0.7 else (60, 150)  # rows with a shortlist
        num_columns = int(generator.integers(low, high))
        num_rows = int(generator.integers(1, num_columns + 1))
        high = int(generator.choice([2, 3, 10, 1000]))
        cost = generator.integers(-high, high, (num_rows, num_columns)).astype(dtype)
        if generator.random() < 0.3:
            cost = cost[generator.integers(num_rows, size=num_rows)]
        if generator.random() < 0.3:
            cost = cost[:, generator.integers(num_columns, size=num_columns)]
        yield generator, np.ascontiguousarray(cost)


def check_exact(cost, steps, columns, bound):
    """One-to-one, scipy's sum to the last bit, and a bound that proves it."""
    assert steps >= 0
    assert len(set(columns.tolist())) == len(columns)
    assert (columns >= 0).all() and (columns < cost.shape[1]).all()
    objective = cost[np.arange(len(columns)), columns].sum(dtype=np.float64)
    assert objective == cost[linear_sum_assignment(cost)].sum(dtype=np.float64)
    assert bound == objective


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_thousands_of_small_costs(compiled, dtype):
    for _, cost in small_costs(2000, dtype):
        check_exact(cost, *compiled.search(cost, certify=True))


def test_any_beginning_leads_to_the_optimum(compiled):
    for generator, cost in small_costs(2000, np.float32):
        num_rows, num_columns = cost.shape
        size = int(generator.integers(num_rows, num_columns + 1))
        part = np.sort(generator.permutation(num_columns)[:size])
        duals = -generator.integers(0, 30, size).astype(float)
        check_exact(cost, *compiled.search(cost, certify=True, part=part, duals=duals))


@pytest.mark.parametrize("num_columns", [63, 64, 65, 71, 72, 130])
def test_columns_that_do_not_fill_a_vector(compiled, num_columns):
    generator = np.random.default_rng(num_columns)
    for high in (2, 50, 10_000):
        cost = generator.integers(0, high, (60, num_columns)).astype(np.float32)
        check_exact(cost, *compiled.search(cost, certify=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_the_guarantee_on_large_costs(compiled, kind, dtype):
    cost = made(kind, *LARGE).to(dtype)
    result = assign(cost, backend="cpu", certify=True)
    for matrix, index, *numbers in zip(cost, *result[:3], strict=True):
        check_optimal(matrix, index.tolist(), *(number.item() for number in numbers))
        best = matrix.double().numpy()[linear_sum_assignment(matrix.double().numpy())].sum()
        assert numbers[0] == pytest.approx(best, rel=1e-12)


@pytest.mark.parametrize(
    ("kind", "is_part"),
    [("randn", True), ("correlated", True), ("unit", False), ("clustered", False)],
)
def test_some_columns_are_searched_only_where_rows_agree(compiled, kind, is_part, monkeypatch):
    parts = []
    search = Native.search

    def noted(self, cost, **options):
        parts.append(options.get("part"))
        return search(self, cost, **options)

    monkeypatch.setattr(Native, "search", noted)
    assert compiled.solve(made(kind, *LARGE)[0].numpy(), certify=False) is not None
    assert len(parts) == (2 if is_part else 1)
    if is_part:
        assert len(parts[1]) == int(LARGE[0] * native.COLUMNS_PER_ROW)


def test_rows_that_are_alike_but_want_many_columns_do_not_agree(compiled):
    cost = made("unit", *LARGE)[0].numpy()
    cost = np.repeat(cost[:4], LARGE[0] // 4, axis=0)
    assert compiled.search(cost, asked=32, fewest=10)[0] == CROWDED
    assert native.columns_of_agreement(cost) is None
    assert compiled.solve(cost, certify=False) is not None


def test_fewer_steps_where_rows_agree(compiled):
    cost = made("randn", *LARGE)[0].numpy()
    part = native.columns_of_agreement(cost)
    duals = native.duals_of(np.take(cost, part, axis=1))
    assert compiled.search(cost, part=part, duals=duals)[0] < compiled.search(cost)[0] / 10


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_cost_that_is_not_finite_is_refused_wherever_it_is(compiled, value):
    cost = torch.rand(1, 5, 141)
    for place in (0, 15, 63, 64, 127, 128, 140):
        for row in (0, 4):
            bad = cost.clone()
            bad[0, row, place] = value
            assert compiled.search(bad[0].numpy())[0] < 0
            with pytest.raises(DataError, match=r"image\(s\) \[0\] of the micro-batch is not"):
                assign(bad, backend="cpu")
            assert not assign(bad, backend="cpu", check=False).solved.any()


@pytest.mark.filterwarnings("ignore:overflow", "ignore:invalid value")
def test_costs_beyond_the_range_of_sums_are_left_to_scipy(compiled):
    cost = 1.7e308 * (2.0 * torch.rand(1, 6, 9, dtype=torch.float64) - 1.0)
    cost[0, :, 0] = -1.7e308
    result = assign(cost, backend="cpu")
    assert result.solved.all()
    assert result.index[0].unique().numel() == 6


def test_every_processor_computes_the_same_bits(compiled):
    options = ("-O1", "-std=c++17", "-ffp-contract=off")
    plain = Native(ctypes.CDLL(str(compile_library(SOURCE, options, "no vector instructions"))))
    for kind in ("unit", "clustered", "ties", "equal rows", "duplicate columns"):
        cost = made(kind, *LARGE)[0].numpy()
        for part in (None, np.arange(0, LARGE[1], 2)):
            duals = None if part is None else np.linspace(-1.0, 0.0, len(part))
            one, two = (
                solver.search(cost, certify=True, part=part, duals=duals)
                for solver in (compiled, plain)
            )
            assert one[0] == two[0] and one[2] == two[2] and (one[1] == two[1]).all()


def test_without_a_compiler_scipy_matches_and_the_log_says_so(monkeypatch):
    said = []
    monkeypatch.setattr(native, "load", lambda: "no C++ compiler is installed (c++)")
    monkeypatch.setattr(on_cpu, "log_once", lambda _, level, *args: said.append(args))
    cost = made("unit")
    result = assign(cost, backend="cpu")
    assert torch.equal(result.objective, assign(cost, backend="scipy").objective)
    assert said == [
        ("tokens are matched by scipy, slower: %s", "no C++ compiler is installed (c++)")
    ]


def test_a_compiler_that_is_missing_is_a_reason(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert native.load.__wrapped__() == "no C++ compiler is installed (no-such-compiler)"
