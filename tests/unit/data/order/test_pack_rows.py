"""Rows hold whole samples, never too many tokens, and are nearly full."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_croc.data.order.packing import pack


@settings(deadline=None, max_examples=50)
@given(lengths=st.lists(st.integers(1, 50), max_size=60), capacity=st.integers(50, 120))
def test_every_sample_once_and_no_row_too_long(lengths, capacity):
    rows = pack(lengths, capacity)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert all(0 < sum(lengths[i] for i in row) <= capacity for row in rows)
    assert all(row == sorted(row) for row in rows)


def fewest_rows(lengths, capacity):
    """By dynamic programming over all subsets: (rows, tokens in the last one), least first."""
    best = [(0, capacity)] * (1 << len(lengths))
    for subset in range(1, len(best)):
        choices = []
        for i, length in enumerate(lengths):
            if subset >> i & 1:
                rows, used = best[subset ^ (1 << i)]
                fits = used + length <= capacity
                choices.append((rows, used + length) if fits else (rows + 1, length))
        best[subset] = min(choices)
    return best[-1][0]


@settings(deadline=None, max_examples=50)
@given(lengths=st.lists(st.integers(1, 50), min_size=1, max_size=9))
def test_never_more_than_best_fit_decreasing_may_need(lengths):
    """Its bound (Johnson 1974): 11/9 of the fewest rows possible, and 6/9 of a row."""
    assert len(pack(lengths, 60)) <= 11 / 9 * fewest_rows(lengths, 60) + 6 / 9


def test_the_fullest_row_that_fits_is_taken():
    assert pack([7, 6, 3, 4], 10) == [[0, 2], [1, 3]]
    assert pack([10, 5, 5], 10) == [[0], [1, 2]]
    assert pack([], 10) == []


def llava_like(rng, n):
    """Tokens of samples with an image (576), and an answer and prompt of log-normal length.

    Medians and spreads are chosen to look like an instruction mix: short answers with a long tail,
    and one sample in seven without an image.
    """
    text = np.exp(rng.normal(5.2, 0.8, n)) + 40
    return np.clip(text + 576 * (rng.random(n) > 0.14), 1, 4096).astype(int)


def test_a_mix_like_llava_fills_its_rows():
    lengths = llava_like(np.random.default_rng(0), 4096)
    for capacity in (4096, 8192):
        rows = pack(lengths.tolist(), capacity)
        assert lengths.sum() / (len(rows) * capacity) > 0.95
