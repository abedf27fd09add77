"""Steps of one modality, as in LLaVA's sampler, wherever a window begins."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_croc.data.order.grouping import group_by_modality_length


def arranged(rng, n, size, begin, share=0.7):
    lengths = rng.integers(1, 500, n)
    has_image = rng.random(n) < share
    order = group_by_modality_length(
        lengths, has_image, global_batch_size=size, begin=begin, key=(1, begin)
    )
    return lengths, has_image, order


@settings(deadline=None, max_examples=50)
@given(
    n=st.integers(1, 200),
    size=st.integers(1, 16),
    begin=st.integers(0, 300),
    share=st.floats(0, 1),
    seed=st.integers(0, 9),
)
def test_whole_steps_have_one_modality_but_for_one(n, size, begin, share, seed):
    lengths, has_image, order = arranged(np.random.default_rng(seed), n, size, begin, share)
    assert np.array_equal(np.sort(order), np.arange(n))
    first = -begin % size
    steps = [order[i : i + size] for i in range(first, n - size + 1, size)]
    assert sum(len(set(has_image[step])) > 1 for step in steps) <= 1
    assert all((np.diff(lengths[step]) <= 0).all() for step in steps)


def test_as_the_released_sampler_in_one_window():
    """The same counts of steps as LLaVA's, whose mixed step takes what both kinds leave over."""
    rng = np.random.default_rng(1)
    _, has_image, order = arranged(rng, 64 * 8, 8, 0)
    kinds = [tuple(sorted(set(has_image[step]))) for step in order.reshape(-1, 8)]
    assert kinds.count((True,)) == has_image.sum() // 8
    assert kinds.count((False,)) == (~has_image).sum() // 8
    assert kinds.count((False, True)) == (has_image.sum() % 8 > 0)


def test_steps_come_in_another_order_for_every_window():
    rng = np.random.default_rng(2)
    _, has_image, order = arranged(rng, 64 * 8, 8, 0)
    _, _, again = arranged(np.random.default_rng(2), 64 * 8, 8, 64 * 8)
    kinds = has_image[order[::8]]
    assert 10 < np.abs(np.diff(kinds.astype(int))).sum() < 50  # not all images first
    assert not np.array_equal(order, again)
