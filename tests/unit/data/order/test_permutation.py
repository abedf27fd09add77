"""The computed shuffle is a permutation, and no statistic tells it from a drawn one."""

import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from megatron_croc.data.order.permutation import Permutation

SIGNIFICANT = 1e-4
"""The keys are fixed, so a p-value below it means a worse shuffle, never bad luck."""


@settings(deadline=None, max_examples=50)
@given(n=st.integers(0, 3000), seed=st.integers(0, 2**62), epoch=st.integers(0, 5))
def test_every_element_once(n, seed, epoch):
    order = Permutation(n, (seed, epoch))(np.arange(n))
    assert order.dtype == np.int64
    assert np.array_equal(np.sort(order), np.arange(n))


def test_places_can_be_asked_in_any_order_and_shape():
    order = Permutation(1000, (1, 2))
    whole = order(np.arange(1000))
    places = np.random.default_rng(0).integers(0, 1000, (7, 13))
    assert np.array_equal(Permutation(1000, (1, 2))(places), whole[places])


def test_keys_give_different_orders():
    orders = [Permutation(1000, (0, seed, epoch)) for seed in range(3) for epoch in range(3)]
    drawn = [order(np.arange(1000)) for order in orders]
    for a, b in itertools.combinations(drawn, 2):
        assert (a == b).sum() < 12  # Poisson of mean 1


def test_orders_are_those_recorded():
    """A checkpoint keeps counts alone: another order would repeat and leave out samples."""
    assert Permutation(10, (0, 1234, 0))(np.arange(10)).tolist() == [4, 9, 2, 8, 7, 6, 5, 0, 1, 3]
    places = np.array([0, 1, 10**9])
    recorded = [1395636973, 1260615846, 1128051474]
    assert Permutation(1_500_000_007, (0, 1234, 0, 7))(places).tolist() == recorded
    assert Permutation(1, (0,))(np.zeros(3)).tolist() == [0, 0, 0]


@pytest.mark.parametrize("n", [2, 3, 4, 5])
def test_all_orders_of_few_elements_are_equally_likely(n):
    seen = Counter(tuple(Permutation(n, (3, seed))(np.arange(n)).tolist()) for seed in range(1200))
    counts = [seen[order] for order in itertools.permutations(range(n))]
    assert stats.chisquare(counts).pvalue > SIGNIFICANT


@pytest.mark.parametrize("n", [12, 100, 1023, 1024, 1025])
def test_any_place_gets_any_element(n):
    """Chi-square of (block of places, block of elements) over many keys."""
    blocks, keys = 6, 400 if n < 1000 else 100
    table = np.zeros((blocks, blocks))
    block = np.arange(n) * blocks // n
    for seed in range(keys):
        np.add.at(table, (block, block[Permutation(n, (seed, 1))(np.arange(n))]), 1)
    sizes = np.bincount(block)
    expected = keys * np.outer(sizes, sizes) / n
    # Rows and columns are fixed, and cells vary less than independent ones by (n - 1) / n.
    statistic = ((table - expected) ** 2 / expected).sum() * (n - 1) / n
    assert stats.chi2.sf(statistic, (blocks - 1) ** 2) > SIGNIFICANT


def test_a_large_range_is_shuffled_well():
    n = 1_500_000_007
    places = np.arange(1_000_000_000, 1_000_200_000)
    drawn = Permutation(n, (1234, 0))(places)
    assert drawn.min() >= 0 and drawn.max() < n
    assert np.unique(drawn).size == drawn.size
    assert stats.kstest(drawn / n, "uniform").pvalue > SIGNIFICANT
    for lag in (1, 2, 3, 7, 64, 1024):
        assert stats.pearsonr(drawn[:-lag], drawn[lag:]).pvalue > SIGNIFICANT
        steps = (drawn[lag:] - drawn[:-lag]) % n  # uniform when neighbours are unrelated
        assert stats.kstest(steps[::lag] / n, "uniform").pvalue > SIGNIFICANT
    low_bits = np.bincount(drawn & 1023, minlength=1024)
    assert stats.chisquare(low_bits).pvalue > SIGNIFICANT
    up = (np.diff(drawn) > 0).mean()  # half of the neighbours ascend; variance (n + 1) / 12
    assert abs(up - 0.5) < 4 / np.sqrt(12 * drawn.size)
