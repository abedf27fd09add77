"""Assignment on the CPU: search in a part of the cost, threads, and the bound as a by-product."""

import threading

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment

from megatron_croc.ops.assignment import assign, native, on_cpu, restricted
from tests.support.assignment import (
    KINDS,
    check_optimal,
    costs,
    made,
)

LARGE = 256, 800
"""Rows and columns from which a part of the cost is tried first."""


@pytest.fixture(autouse=True)
def without_compiled_code(monkeypatch):
    """These tests are of scipy's side; test_assignment_native.py has the compiled code."""
    monkeypatch.setattr(native, "load", lambda: "no C++ compiler is installed (c++)")


@pytest.mark.parametrize("kind", KINDS)
def test_the_guarantee_where_a_part_of_the_cost_is_tried(kind):
    cost = made(kind, *LARGE)
    result = assign(cost, backend="cpu", certify=True)
    for matrix, index, *numbers in zip(cost, *result[:3], strict=True):
        check_optimal(matrix, index.tolist(), *(number.item() for number in numbers))
    again = assign(cost.clone(), backend="cpu", certify=True)
    assert all(torch.equal(one, two) for one, two in zip(result, again, strict=True))


@pytest.mark.parametrize("kind", ["randn", "correlated"])
def test_columns_are_left_out_where_rows_agree_on_the_cheap_ones(kind, searched):
    assign(made(kind, *LARGE), backend="cpu")
    assert searched["whole"] == searched["entries"] == []
    assert len(searched["columns"]) >= 2
    assert all(rows == columns < LARGE[1] / 2 for rows, columns in searched["columns"])


@pytest.mark.parametrize("kind", ["unit", "clustered"])
def test_entries_are_left_out_where_each_row_can_have_a_cheap_one(kind, searched):
    assign(made(kind, *LARGE), backend="cpu")
    assert searched["whole"] == searched["columns"] == []
    assert len(searched["entries"]) >= 2


def test_more_entries_are_tried_where_few_rows_find_no_column(searched):
    cost = made("unit", *LARGE)
    cost[:, :20] = cost[:, :1] + 1e-6 * costs(2, 20, LARGE[1])  # 20 tokens nearly the same
    cheapest = [on_cpu.cheapest_entries(matrix.numpy(), 16) for matrix in cost]
    crowded = [
        on_cpu.unmatched_share(matrix.numpy(), places)
        for matrix, places in zip(cost, cheapest, strict=True)
    ]
    assert all(0.0 < share < 0.05 for share in crowded)
    check_as_good_as_scipy(cost, assign(cost, backend="cpu").index)
    assert searched["whole"] == searched["columns"] == []
    assert len(searched["entries"]) >= 2


@pytest.mark.parametrize(("kind", "sizes"), [("unit", (24, 80)), ("ties", LARGE)])
def test_the_whole_is_searched_where_it_is_small_or_all_alike(kind, sizes, searched):
    assign(made(kind, *sizes), backend="cpu")
    assert searched == {"whole": [sizes] * 2, "columns": [], "entries": []}


@pytest.mark.parametrize("num_rounds", [1, 4])
def test_entries_that_are_missing_are_let_in_while_it_pays(num_rounds, searched, monkeypatch):
    monkeypatch.setattr(on_cpu, "NUM_CANDIDATES", (3,))  # too few, for both images
    monkeypatch.setattr(restricted, "NUM_ROUNDS", num_rounds)
    cost = costs(2, 380, 800)
    check_as_good_as_scipy(cost, assign(cost, backend="cpu").index)
    assert len(searched["entries"]) == (2 if num_rounds == 1 else 4)
    assert len(searched["whole"]) == (2 if num_rounds == 1 else 0)


def test_columns_that_are_missing_are_let_in_while_it_pays(searched, monkeypatch):
    """Row 1's best column is dear to all others, so no set of cheap columns holds it."""
    cost = made("a cheap column only one row wants", *LARGE)
    index = assign(cost, backend="cpu").index
    assert (index[:, 1] == LARGE[1] - 1).all()
    check_as_good_as_scipy(cost, index)
    at_first = int(LARGE[0] * restricted.COLUMNS_PER_ROW[0])
    assert {columns for _, columns in searched["columns"]} == {at_first, at_first + 1}
    assert searched["whole"] == []
    monkeypatch.setattr(restricted, "COLUMNS_PER_ROW", (1.125, 1.125))
    check_as_good_as_scipy(cost, assign(cost, backend="cpu").index)
    assert searched["whole"] == [LARGE] * 2


def check_as_good_as_scipy(cost, index):
    for matrix, columns in zip(cost.double().numpy(), index.tolist(), strict=True):
        best = matrix[linear_sum_assignment(matrix)].sum()
        assert matrix[range(len(columns)), columns].sum() == pytest.approx(best, rel=1e-12)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "no rows"])
def test_a_part_is_called_optimal_only_if_it_is(kind):
    for matrix in made(kind, 100, 300):
        cost = matrix.numpy()
        best = cost.astype(float)[linear_sum_assignment(cost)].sum()
        proofs = [restricted.match_columns(cost).proof]
        in_reach = np.full(cost.shape, fill_value=True)
        in_reach[:, len(cost) + 1 :] = False  # any part in which all rows have room
        proofs.append(restricted.match_entries(cost, np.flatnonzero(in_reach)).proof)
        for proof in proofs:
            scale = max(1.0, abs(proof.objective))
            assert proof.bound <= best + 1e-6 * scale
            assert proof.objective >= best - 1e-9 * scale
            assert not proof.is_optimal or proof.objective <= best + 1e-6 * scale


@pytest.fixture
def searched(monkeypatch):
    """Shapes of what scipy searched: the whole cost, columns of it made square, and entries."""
    shapes = {"whole": [], "columns": [], "entries": []}

    def watch(module, name, key):
        function = getattr(module, name)

        def noted(matrix):
            shapes[key].append(matrix.shape)
            return function(matrix)

        monkeypatch.setattr(module, name, noted)

    watch(on_cpu, "linear_sum_assignment", "whole")
    watch(restricted, "linear_sum_assignment", "columns")
    watch(restricted, "min_weight_full_bipartite_matching", "entries")
    monkeypatch.setattr(on_cpu, "num_threads", lambda: 1)
    return shapes


def test_threads_solve_what_one_thread_solves(monkeypatch):
    cost = costs(5, 12, 40)
    names = set()
    whole = on_cpu._solve_whole

    def noted(*args, **options):
        names.add(threading.current_thread().name.split("_")[0])
        return whole(*args, **options)

    monkeypatch.setattr(on_cpu, "_solve_whole", noted)
    monkeypatch.setattr(on_cpu, "num_threads", lambda: 1)
    alone = assign(cost, backend="cpu", certify=True)
    assert names == {"MainThread"}
    monkeypatch.setattr(on_cpu, "num_threads", lambda: 3)
    together = assign(cost, backend="cpu", certify=True)
    assert names == {"MainThread", "assignment"}
    assert all(torch.equal(one, two) for one, two in zip(alone, together, strict=True))


def test_processes_of_a_machine_share_its_cores(monkeypatch):
    monkeypatch.setattr(on_cpu.os, "sched_getaffinity", lambda _: set(range(16)))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert on_cpu.num_threads() == 4
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "32")
    assert on_cpu.num_threads() == 1


def test_the_bound_is_left_out_only_where_it_costs_time():
    assert assign(made("unit"), backend="cpu").bound.isnan().all()
    for kind in ("randn", "unit"):
        partial = assign(made(kind, *LARGE), backend="cpu")
        torch.testing.assert_close(partial.bound, partial.objective, rtol=1e-6, atol=0.0)
