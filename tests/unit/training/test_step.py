"""Denominators of the two losses: whole batches, single micro-batches, and replicas."""

import pytest
import torch

from tests.support.distributed import run_distributed
from tests.support.synthetic import make_step, tiny_run

IMAGES = (1, 0, 2, 1, 0, 0, 3, 0)
"""Images of each sample: the third of the four micro-batches has none."""


def gradients_of(training) -> dict[str, torch.Tensor]:
    return {n: p.main_grad.clone() for n, p in training.chunks[0].module.named_parameters()
            if p.requires_grad}  # fmt: skip


def losses_of(training, batches) -> tuple[float, float, dict[str, torch.Tensor]]:
    """Text loss, reconstruction loss, gradients of one step of these micro-batches."""
    for chunk in training.chunks:
        chunk.train()
        chunk.zero_grad_buffer()
    metrics = training.train_step.forward_backward(batches).reduce()
    return metrics.text_loss, metrics.reconstruction_loss, gradients_of(training)


def build(run, pg_collection):
    from megatron_croc.training.build import build_training_state

    return build_training_state(run, pg_collection, train_iters=10)


def steps_of(run) -> list:
    return make_step(run, 0, dp_rank=0, dp_size=1, images=IMAGES)


@pytest.mark.parametrize("reduction", ["global_batch", "micro_batch"])
def test_each_micro_batch_has_its_weight(pg_collection, reduction):
    """The step of four micro-batches from four steps of one each.

    `micro_batch` is the mean of their means, as in the released code; `global_batch` weighs each
    by its labels and its visual tokens. The text loss alone (weight 0), then both.
    """
    for weight in (0.0, 10.0):
        settings = dict(reconstruction_dropout=0.0, reconstruction_loss_weight=weight)
        alone = build(tiny_run(**settings), pg_collection)
        batches = steps_of(alone.run)
        assert len(batches) == 4 and [b.num_images for b in batches] == [1, 3, 0, 3]
        labels = [b.num_label_tokens for b in batches]
        assert len(set(labels)) > 1
        steps = [losses_of(alone, [batch]) for batch in batches]
        training = build(tiny_run(loss_reduction=reduction, **settings), pg_collection)
        text, reconstruction, gradients = losses_of(training, steps_of(training.run))
        equal = [1 / 4] * 4
        by_labels = [n / sum(labels) for n in labels] if reduction == "global_batch" else equal
        by_images = [n / 7 for n in (1, 3, 0, 3)] if reduction == "global_batch" else equal
        assert text == pytest.approx(sum(s[0] * w for s, w in zip(steps, by_labels, strict=True)))
        expected = sum(s[1] * w for s, w in zip(steps, by_images, strict=True))
        assert reconstruction == pytest.approx(expected) and expected > 0.01
        if weight == 0.0 or reduction == "micro_batch":
            for name, gradient in gradients.items():
                parts = [s[2][name] * w for s, w in zip(steps, by_labels, strict=True)]
                scale = max(part.abs().max().item() for part in parts)
                torch.testing.assert_close(
                    gradient, sum(parts), rtol=1e-4, atol=2e-5 * scale + 1e-12, msg=name
                )


def one_step(reduction: str, changes: dict) -> tuple[float, float | None, float | None]:
    """Losses and gradient norm of the same global batch at any layout (on each rank)."""
    from megatron_croc.parallel.groups import start_distributed

    run = tiny_run(loss_reduction=reduction, reconstruction_dropout=0.0, **changes)
    pg = start_distributed(run.parallel, seed=1)
    training = build(run, pg)
    batches = make_step(run, 0, dp_rank=pg.dp.rank(), dp_size=pg.dp.size(), images=IMAGES)
    metrics = training.train_step.train(batches, training.optimizer, training.scheduler)
    return metrics.text_loss, metrics.reconstruction_loss, metrics.grad_norm


@pytest.mark.distributed
@pytest.mark.parametrize("changes", [{}, dict(pipeline_model_parallel_size=2)], ids=["dp2", "pp2"])
def test_the_mean_of_micro_batches_is_the_same_on_several_ranks(changes):
    (alone,) = run_distributed(one_step, 1, "micro_batch", {})
    for several in run_distributed(one_step, 2, "micro_batch", changes):
        assert several == pytest.approx(alone, rel=1e-5)


def test_a_batch_without_labels_or_images_has_no_loss(pg_collection):
    run = tiny_run(reconstruction_dropout=0.0)
    training = build(run, pg_collection)
    batches = make_step(run, 0, dp_rank=0, dp_size=1, images=(0,))
    for batch in batches:
        batch.labels.fill_(-100)
    for reduction in ("global_batch", "micro_batch"):
        run.training.loss_reduction = reduction
        text, reconstruction, gradients = losses_of(training, batches)
        assert (text, reconstruction) == (0.0, 0.0)
        assert all((gradient == 0).all() for gradient in gradients.values())


@pytest.mark.parametrize("reduction", ["global_batch", "micro_batch"])
def test_a_single_label_is_divided_by_one(pg_collection, reduction):
    from megatron_croc.training.step import to_model_inputs

    run = tiny_run("finetune", loss_reduction=reduction)
    training = build(run, pg_collection)
    (batch, *_) = make_step(run, 0, dp_rank=0, dp_size=1, images=(1,))
    last = int((batch.labels >= 0).nonzero().max())
    batch.labels[:last] = -100
    assert batch.num_label_tokens == 1
    with torch.no_grad():
        inputs = to_model_inputs(batch, pg_collection.cp)
        alone = training.chunks[0].module(inputs).text_loss_sum.item()
    assert training.train_step.evaluate([batch]).text_loss == pytest.approx(alone, rel=1e-6)
    assert alone > 1.0


def test_validation_drops_nothing_and_training_goes_on_dropping(pg_collection):
    """The seeds of dropout belong to the images, so that a step can be repeated exactly."""
    without = build(tiny_run(reconstruction_dropout=0.0, lr_warmup_fraction=0.4), pg_collection)
    dropping = build(tiny_run(reconstruction_dropout=0.5, lr_warmup_fraction=0.4), pg_collection)

    def evaluated(training) -> float:
        return training.train_step.evaluate(steps_of(training.run)).reconstruction_loss

    def trained(training) -> float:
        return training.train_step.train(
            steps_of(training.run), training.optimizer, training.scheduler
        ).reconstruction_loss

    assert evaluated(dropping) == evaluated(without)
    assert all(parameter.grad is None for parameter in dropping.chunks[0].module.parameters())
    # The first step of a warm-up has rate 0: the weights are still the same.
    assert abs(trained(dropping) - trained(without)) > 1e-5


def test_gradients_of_a_step_are_not_those_of_two(pg_collection):
    training = build(tiny_run(lr_warmup_fraction=0.4), pg_collection)
    norms = [
        training.train_step.train(
            steps_of(training.run), training.optimizer, training.scheduler
        ).grad_norm
        for _ in range(2)
    ]
    assert norms[0] == pytest.approx(norms[1], rel=1e-6)  # the first step has rate 0


def test_rates_follow_the_steps_also_over_a_refused_one(pg_collection):
    class Refusing:
        def accepts(self, metrics) -> bool:
            return False

        def examine(self, metrics, batches, totals, chunks) -> None:
            assert metrics.num_samples == 8 and len(batches) == 4

    run = tiny_run(lr=1e-3, projector_lr=2e-3, lr_warmup_fraction=0.4)
    training = build(run, pg_collection)
    rates, weights = [], []
    for guard in (None, Refusing(), None):
        metrics = training.train_step.train(
            steps_of(run), training.optimizer, training.scheduler, guard=guard
        )
        assert metrics.is_skipped == (guard is not None)
        rates.append([metrics.learning_rates[p] for p in ("language_model", "projector")])
        weights.append(training.chunks[0].module.prompt_pool.weight.detach().clone())
    expected = [[0.0, 0.0], [0.25e-3, 0.5e-3], [0.5e-3, 1e-3]]
    assert rates == [pytest.approx(pair, abs=1e-12) for pair in expected]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[1], weights[2])
