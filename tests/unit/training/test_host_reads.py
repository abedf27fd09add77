"""A step reads the device once: on a GPU every other place would wait for it."""

import sys

import pytest
import torch
import torch.distributed as dist

from tests.support.host_reads import host_reads
from tests.support.synthetic import make_step, tiny_run

ON_HOST = {
    "megatron_croc/data/batch.py:num_label_tokens",  # before the batch is moved
    "megatron_croc/model/interface.py:of_pack",  # before the batch is moved
    "megatron_croc/training/reporting/metrics.py:count_batch",
}
"""Places that read tensors of the host."""

CPU_SEARCH = {"megatron_croc/ops/assignment/solve.py:_solve_on_host"}
"""Place of the CPU's assignment search; a GPU uses Triton's search instead."""


@pytest.mark.parametrize(
    "changes",
    [
        {},
        dict(assign_mode="nearest"),
        dict(loss_reduction="micro_batch"),
        dict(overlap_assignment=False),
        dict(freeze_ViT=False),
    ],
    ids=str,
)
def test_forward_backward_and_metrics_read_the_device_once(pg_collection, changes):
    from megatron_croc.training.build import build_training_state

    run = tiny_run(**changes)
    training = build_training_state(run, pg_collection, train_iters=2)
    for chunk in training.chunks:
        chunk.train()
        chunk.zero_grad_buffer()
    batches = make_step(run, 0, dp_rank=0, dp_size=1)
    assert len(batches) > 1 and sum(batch.num_images for batch in batches) > 1
    with host_reads() as reads:
        training.train_step.forward_backward(batches).reduce()
    known = ON_HOST | (CPU_SEARCH if run.model.prompt_pool.assign_mode == "hungarian" else set())
    waits = {place: count for place, count in reads.items() if place not in known}
    assert waits == {"megatron_croc/training/reporting/metrics.py:reduce": 1}


def test_every_way_to_read_is_counted():
    x = torch.arange(4.0)
    with host_reads() as reads:
        x.tolist(), x.cpu(), x.numpy(), float(x[0]), x.nonzero(), x[x > 1.0], x.long().bincount()
        bool(x[0] > 1.0), x.sum().item(), torch.masked_select(x, x > 1.0), x.unique()
    assert reads.total() == 11
    with host_reads() as reads:
        x[x > 1.0] = 0.0
        x.scatter_add_(0, torch.tensor([0, 1]), torch.ones(2))
        x.where(x > 1.0, 0.0), x + 1.0, x[1:], x.index_select(0, torch.tensor([1]))
    assert not reads


def test_groups_of_one_exchange_nothing(pg_collection, monkeypatch):
    from megatron_croc.training.build import build_training_state

    run = tiny_run()
    training = build_training_state(run, pg_collection, train_iters=2)
    for name in ("all_reduce", "all_gather", "broadcast"):
        real = getattr(dist, name)

        def refuse(*args, real=real, **kwargs):
            caller = sys._getframe(1).f_globals["__name__"]
            assert not caller.startswith("megatron_croc"), f"{caller} calls {real.__name__}"
            return real(*args, **kwargs)

        monkeypatch.setattr(dist, name, refuse)
    training.train_step.train(
        make_step(run, 0, dp_rank=0, dp_size=1), training.optimizer, training.scheduler
    )
