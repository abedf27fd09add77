"""With one replica nothing is sent for gradients and parameters, and the weights are the same."""

import pytest
import torch
import torch.distributed as dist
from megatron.core.distributed import param_and_grad_buffer
from torch.utils._python_dispatch import TorchDispatchMode

from tests.support.distributed import run_distributed
from tests.support.synthetic import make_step, tiny_run

NAMES = {
    "dist_reduce_scatter_func": dist.reduce_scatter_tensor,
    "dist_all_gather_func": dist.all_gather_into_tensor,
}


class Collectives(TorchDispatchMode):
    """Names of the collectives of gradient and parameter buffers."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func)
        if "c10d" in name and ("scatter" in name or "gather" in name):
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


def train_two_steps(changes: dict, skip: bool) -> tuple[list[str], dict[str, torch.Tensor]]:
    from megatron_croc.parallel.groups import start_distributed
    from megatron_croc.training import build

    run = tiny_run(**changes)
    pg = start_distributed(run.parallel, seed=1)
    if not skip:
        build.skip_groups_of_one = lambda: None
        for name, collective in NAMES.items():
            setattr(param_and_grad_buffer, name, collective)
    training = build.build_training_state(run, pg, train_iters=10)
    with Collectives() as collectives:
        for step in range(2):
            batches = make_step(run, step, dp_rank=pg.dp.rank(), dp_size=pg.dp.size())
            training.train_step.train(batches, training.optimizer, training.scheduler)
    weights = training.chunks[0].module.named_parameters()
    return collectives.seen, {name: weight.detach().clone() for name, weight in weights}


@pytest.mark.distributed
@pytest.mark.parametrize("overlap", [False, True])
def test_one_replica_sends_nothing_and_trains_the_same_weights(overlap):
    changes = dict(overlap_grad_reduce=overlap, overlap_param_gather=overlap)
    ((sent, weights),) = run_distributed(train_two_steps, 1, changes, True)
    ((before, expected),) = run_distributed(train_two_steps, 1, changes, False)
    assert not sent and len(before) >= 3
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


@pytest.mark.distributed
def test_two_replicas_send_as_before():
    for sent, _ in run_distributed(train_two_steps, 2, {}, True):
        assert len(sent) >= 3
