"""Each epoch is a permutation that depends on seed and epoch alone."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_croc.data.order import SampleOrder
from megatron_croc.errors import DataError


@given(num_samples=st.integers(1, 50), seed=st.integers(0, 2**31), epoch=st.integers(0, 5))
def test_every_sample_once_per_epoch(num_samples, seed, epoch):
    order = SampleOrder(num_samples, seed)
    pairs = [order[epoch * num_samples + place] for place in range(num_samples)]
    assert {e for e, _ in pairs} == {epoch}
    assert sorted(sample for _, sample in pairs) == list(range(num_samples))


def test_a_position_does_not_depend_on_what_was_asked_before():
    order = SampleOrder(100, seed=1)
    forward = [order[k] for k in range(300)]
    assert [SampleOrder(100, seed=1)[k] for k in reversed(range(300))] == forward[::-1]


def test_epochs_and_seeds_differ():
    epoch_0, epoch_1 = (
        [SampleOrder(100, seed=1)[e * 100 + k][1] for k in range(100)] for e in (0, 1)
    )
    assert epoch_0 != epoch_1
    assert epoch_0 != [SampleOrder(100, seed=2)[k][1] for k in range(100)]


def test_unshuffled():
    order = SampleOrder(3, seed=1, shuffle=False)
    assert [order[k] for k in range(5)] == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]


def test_refused():
    with pytest.raises(DataError, match="no samples"):
        SampleOrder(0, seed=1)
    with pytest.raises(IndexError):
        SampleOrder(3, seed=1)[-1]
