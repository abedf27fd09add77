import math

import pytest

from megatron_croc.scaling.statistics import difference_of, holm, mean_of


def test_mean_and_standard_error():
    mean = mean_of([0.6, 0.7, 0.8])  # deviation 0.1, over the root of 3
    assert mean.value == pytest.approx(0.7) and mean.error == pytest.approx(0.1 / math.sqrt(3))
    assert math.isnan(mean_of([0.5]).error)
    with pytest.raises(ValueError, match="no values"):
        mean_of([])


def test_a_difference_is_taken_seed_by_seed():
    # Differences 1, 2, 3: mean 2, s.e. 1 / sqrt(3), t = 3.4641 with 2 degrees of freedom.
    # There p = 1 - t / sqrt(t^2 + 2) = 1 - 3.4641 / 3.7417, and t(0.975) = 4.3027.
    one = difference_of([11, 22, 33], [10, 20, 30])
    assert (one.value, one.num_seeds) == (2, 3)
    assert one.error == pytest.approx(0.57735, abs=1e-5)
    assert one.p == pytest.approx(1 - math.sqrt(12 / 14), abs=1e-9)
    assert one.low == pytest.approx(2 - 4.30265 * 0.57735, abs=1e-4)
    assert one.high == pytest.approx(2 + 4.30265 * 0.57735, abs=1e-4)


def test_differences_that_do_not_vary():
    assert difference_of([1, 2, 3], [1, 2, 3]).p == 1
    assert difference_of([2, 3, 4], [1, 2, 3]).p == 0
    assert math.isnan(difference_of([2], [1]).p) and math.isnan(difference_of([2], [1]).low)
    two = difference_of([2, 3], [1, 2])  # agree by accident: not tested
    assert math.isnan(two.p) and two.low == two.high == 1
    with pytest.raises(ValueError):
        difference_of([1, 2], [1])


def test_holm_by_hand():
    # 0.01 x 3, 0.03 x 2, 0.04 x 1 that is raised to the 0.06 before it.
    assert holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
    assert holm([0.9, 0.6]) == [1, 1]
    first, second = holm([math.nan, 0.02])
    assert math.isnan(first) and second == 0.02
