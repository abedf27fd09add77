"""Norm and clipping without fused kernels: same numbers, no read of the device, one pass."""

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


def test_clipping_is_megatrons_without_a_copy(pg_collection):
    """Same values bit for bit, and no operation but the product that writes in place."""
    from megatron.core.optimizer import clip_grads
    from megatron.core.utils import local_multi_tensor_scale
    from torch.utils._python_dispatch import TorchDispatchMode

    from megatron_croc.training.build import build_training_state

    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            names.append(func._schema.name)
            return func(*args, **(kwargs or {}))

    build_training_state(tiny_run(), pg_collection, train_iters=10)
    generator = torch.Generator().manual_seed(0)
    gradients = [torch.randn(size, generator=generator) for size in (3, 5)]
    expected = [gradient.clone() for gradient in gradients]
    clip_grads.multi_tensor_applier(local_multi_tensor_scale, None, [expected, expected], 0.3)
    names: list[str] = []
    with Names():
        clip_grads.multi_tensor_applier(
            clip_grads.multi_tensor_scale_impl, None, [gradients, gradients], 0.3
        )
    assert set(names) == {"aten::mul"}
    assert all(torch.equal(a, b) for a, b in zip(gradients, expected, strict=True))
