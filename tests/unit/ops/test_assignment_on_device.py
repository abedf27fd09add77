"""Operations of matching on a GPU, with tensors that pretend to be on one."""

import pytest
import torch

from megatron_croc.errors import ConfigError
from megatron_croc.ops.assignment import nearest, pairwise_cost
from tests.support.host_reads import host_reads
from tests.support.on_device import on_device, plain


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_no_cost_is_computed_in_tf32(precision):
    features, pool = on_device(torch.randn(1, 4, 8)), on_device(torch.randn(6, 8))
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        if precision == "highest":
            assert pairwise_cost(features, pool).shape == (1, 4, 6)
        else:
            with pytest.raises(ConfigError, match=r"TF32.*set_float32_matmul_precision"):
                pairwise_cost(features, pool)
        assert pairwise_cost(plain(features), plain(pool)).shape == (1, 4, 6)
    finally:
        torch.set_float32_matmul_precision(before)


def test_the_nearest_of_a_finite_cost_are_not_waited_for():
    cost = torch.randn(3, 20, 7)
    with host_reads() as reads:
        found = nearest(cost, check=False)
    assert not reads
    assert torch.equal(found.index, nearest(cost).index) and found.solved.all()
