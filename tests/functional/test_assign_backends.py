"""A tiny run's losses do not depend on the backend that matched its tokens."""

import pytest

from megatron_croc.ops.assignment import on_cpu
from megatron_croc.verification.layouts.observe import RankObservation, observe
from tests.support.distributed import run_distributed
from tests.support.synthetic import tiny_run


def observe_backend(backend: str, pool_init: str) -> RankObservation:
    on_cpu.SMALL = 0  # else a cost as small as this is scipy's as a whole
    run = tiny_run(assign_backend=backend, pool_init=pool_init, pool_size=256)
    return observe(run, 4, (1, 2))


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("backend", "pool_init"),
    [("auto", "randn"), ("cpu", "randn"), ("cpu", "unit"), ("torch", "randn")],
)
def test_the_loss_curve_is_that_of_scipy(backend: str, pool_init: str) -> None:
    (ours,) = run_distributed(observe_backend, 1, backend, pool_init)
    (scipys,) = run_distributed(observe_backend, 1, "scipy", pool_init)
    assert len(ours.steps) == 4
    assert ours.steps == scipys.steps
