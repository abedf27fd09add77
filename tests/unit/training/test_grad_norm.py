"""Norm of the gradient without fused kernels: same number, without a read of the device."""

import torch

from tests.support.synthetic import make_step, tiny_run


def test_the_norm_is_megatrons(pg_collection, monkeypatch):
    from megatron.core.optimizer import clip_grads
    from megatron.core.utils import local_multi_tensor_l2_norm

    from megatron_croc.training.build import build_training_state
    from megatron_croc.training.optimizer import measure_gradients

    run = tiny_run(freeze_ViT=False)
    training = build_training_state(run, pg_collection, train_iters=10)
    norms = []

    def measure_both():
        norms.append(measure_gradients(training.optimizer))
        with monkeypatch.context() as patch:
            patch.setattr(clip_grads, "l2_norm_impl", local_multi_tensor_l2_norm)
            norms.append(measure_gradients(training.optimizer))

    batches = make_step(run, 0, dp_rank=0, dp_size=1)
    training.train_step.train(
        batches, training.optimizer, training.scheduler, on_gradients=measure_both
    )
    assert norms[0] == norms[1] > 0


def test_the_norm_waits_for_no_shard(pg_collection):
    """Tensors without values: a read on the host raises an error."""
    from megatron.core.optimizer import clip_grads

    from megatron_croc.training.build import build_training_state

    build_training_state(tiny_run(), pg_collection, train_iters=10)
    shards = [torch.empty(size, device="meta") for size in (3, 5)]
    norm, _ = clip_grads.multi_tensor_applier(clip_grads.l2_norm_impl, None, [shards], False)
    assert norm.is_meta and norm.shape == (1,)
