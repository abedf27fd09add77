"""A tiny run's losses do not depend on the backend that matched its tokens."""

import pytest
from layout_parity.observe import RankObservation, observe

from tests.support.distributed import run_distributed
from tests.support.synthetic import tiny_run


def observe_backend(backend: str) -> RankObservation:
    return observe(tiny_run(assign_backend=backend, pool_init="randn"), 4, (1, 2))


@pytest.mark.distributed
@pytest.mark.parametrize("backend", ["auto", "cpu", "torch"])
def test_the_loss_curve_is_that_of_scipy(backend: str) -> None:
    (ours,) = run_distributed(observe_backend, 1, backend)
    (scipys,) = run_distributed(observe_backend, 1, "scipy")
    assert len(ours.steps) == 4
    assert ours.steps == scipys.steps
