"""Optimizer and schedule against torch's AdamW and transformers' cosine, step by step."""

from pathlib import Path

import pytest
import torch
import transformers

from tests.support.synthetic import make_step, tiny_run

RATES = {
    "vision_tower": 1e-4,
    "projector": 3e-3,
    "prompt_pool": 2e-2,
    "language_model": 1e-3,
    "reconstruction_head": 5e-3,
}
DECAY = 0.1
SETTINGS = dict(
    freeze_ViT=False,
    lr=RATES["language_model"],
    vision_lr=RATES["vision_tower"],
    projector_lr=RATES["projector"],
    prompt_pool_lr=RATES["prompt_pool"],
    reconstruction_head_lr=RATES["reconstruction_head"],
    reconstruction_dropout=0.0,
)


def build(run, pg_collection, train_iters=10):
    from megatron_croc.training.build import build_training_state

    return build_training_state(run, pg_collection, train_iters=train_iters)


def parameters_of(training) -> dict[str, torch.nn.Parameter]:
    return dict(training.chunks[0].module.named_parameters())


def inner(training) -> torch.optim.AdamW:
    return training.optimizer.chained_optimizers[0].optimizer


def step_tensors(training) -> list[torch.Tensor]:
    return [state["step"] for state in inner(training).state.values()]


class Reference:
    """torch's AdamW over copies of the weights, given the same gradients."""

    def __init__(self, training) -> None:
        self.copies = {n: p.detach().clone() for n, p in parameters_of(training).items()}
        groups = []
        for name, copy in self.copies.items():
            part = name.split(".")[0]
            decayed = copy.ndim > 1 and part != "prompt_pool"
            groups.append(
                {"params": [copy], "lr": RATES[part], "weight_decay": DECAY if decayed else 0.0}
            )
        self.adam = torch.optim.AdamW(groups, betas=(0.9, 0.999), eps=1e-8)

    def step(self, gradients: dict[str, torch.Tensor], clip: float) -> float:
        norm = torch.stack([g.double().norm() for g in gradients.values()]).norm().item()
        scale = min(1.0, clip / (norm + 1e-6))
        for name, copy in self.copies.items():
            copy.grad = gradients[name] * scale
        self.adam.step()
        return norm


def train_step(training, number: int) -> tuple[dict[str, torch.Tensor], object]:
    """Run one real step; return the gradients given to the optimizer, and the metrics."""
    gradients = {}

    def note_gradients():
        for name, parameter in parameters_of(training).items():
            gradients[name] = parameter.main_grad.detach().clone()

    batches = make_step(training.run, number, dp_rank=0, dp_size=1, images=(1, 0, 2, 1))
    metrics = training.train_step.train(
        batches, training.optimizer, training.scheduler, on_gradients=note_gradients
    )
    return gradients, metrics


def test_steps_before_and_after_a_resume_are_torchs(pg_collection, tmp_path: Path):
    """Rates, decay, clipping and bias corrections of each part, all the way through a checkpoint.

    megatron's own loading gives all parameters one step tensor, which then counts as many steps
    as there are parameters: the weights after the resume would differ by percents of a rate.
    """
    from tests.support.checkpoints import save_checkpoint

    constant = dict(lr_decay_style="constant", lr_warmup_fraction=0.0, weight_decay=DECAY)
    save = str(tmp_path / "checkpoints")
    run = tiny_run(**SETTINGS, **constant, clip_grad=1.0, save=save, load=save)
    training = build(run, pg_collection)
    reference = Reference(training)
    for number in range(5):
        if number == 3:
            training.state.iteration = 3
            save_checkpoint(run, training.state, training.chunks, training.optimizer, pg_collection)
            training = build(run, pg_collection)
            assert training.state.iteration == 3
            addresses = {tensor.data_ptr() for tensor in step_tensors(training)}
            assert len(addresses) == len(step_tensors(training)) > 50
            assert {tensor.item() for tensor in step_tensors(training)} == {3.0}
        gradients, metrics = train_step(training, number)
        norm = reference.step(gradients, clip=1.0)
        assert metrics.grad_norm == pytest.approx(norm, rel=1e-5)
        assert norm > 1.0  # clipping takes part
        assert {tensor.item() for tensor in step_tensors(training)} == {number + 1.0}
        for name, parameter in parameters_of(training).items():
            rate = RATES[name.split(".")[0]]
            # A step moves a weight by about the rate; a few roundings of it, and of the weight.
            torch.testing.assert_close(
                parameter.detach(), reference.copies[name], rtol=1e-6, atol=2e-4 * rate, msg=name
            )


def test_a_warm_up_of_the_whole_run_leaves_a_step_to_decay(pg_collection):
    run = tiny_run(**SETTINGS, lr_warmup_fraction=1.0)
    scheduler = build(run, pg_collection, train_iters=10).scheduler
    size = run.training.global_batch_size
    assert (scheduler.lr_warmup_steps, scheduler.lr_decay_steps) == (9 * size, 10 * size)
    short = build(run, pg_collection, train_iters=1).scheduler
    assert (short.lr_warmup_steps, short.lr_decay_steps) == (0, size)


@pytest.mark.parametrize("clip", [0.5, 1e6, 0.0])
def test_every_part_is_clipped_by_the_norm_of_all(pg_collection, clip):
    """Two optimizers under one, as for several model chunks: the whole gradient is scaled alike."""
    from megatron.core.optimizer import ChainedOptimizer

    from megatron_croc.training.optimizer import measure_gradients, update_weights

    run = tiny_run(**SETTINGS, clip_grad=clip, lr_warmup_fraction=0.0)
    trainings = [build(run, pg_collection) for _ in range(2)]
    for number, training in enumerate(trainings):
        batches = make_step(run, number, dp_rank=0, dp_size=1, images=(1, 0, 2, 1))
        training.train_step.forward_backward(batches)
    both = ChainedOptimizer([training.optimizer.chained_optimizers[0] for training in trainings])
    norm = measure_gradients(both)
    gradients = [p.grad for part in both.chained_optimizers for p in part.get_parameters()]
    before = [gradient.clone() for gradient in gradients]
    assert norm == pytest.approx(torch.stack([g.norm() for g in before]).norm().item(), rel=1e-5)
    assert norm > 1.0
    update_weights(both, norm)
    scale = min(1.0, clip / (norm + 1e-6)) if clip > 0.0 else 1.0
    for gradient, old in zip(gradients, before, strict=True):
        torch.testing.assert_close(gradient, scale * old, rtol=1e-5, atol=0)


def test_a_run_can_be_saved_before_its_first_step(pg_collection, tmp_path: Path):
    from tests.support.checkpoints import save_checkpoint

    save = str(tmp_path / "checkpoints")
    run = tiny_run(**SETTINGS, save=save, load=save)
    first = build(run, pg_collection)
    save_checkpoint(run, first.state, first.chunks, first.optimizer, pg_collection)
    second = build(run, pg_collection)
    assert {tensor.item() for tensor in step_tensors(second)} == {0.0}
    for training in (first, second):
        train_step(training, 0), train_step(training, 1)
    for a, b in zip(parameters_of(first).values(), parameters_of(second).values(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("fraction", [0.2, 0.16, 0.24])
def test_rates_are_transformers_cosine_with_warm_up(pg_collection, fraction):
    """Two steps of warm-up of ten: a fraction is rounded to the nearest step."""
    run = tiny_run(**SETTINGS, lr_warmup_fraction=fraction, lr_decay_style="cosine", min_lr=0.0)
    training = build(run, pg_collection)
    theirs = torch.optim.SGD(
        [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": rate} for rate in RATES.values()]
    )
    schedule = transformers.get_cosine_schedule_with_warmup(theirs, 2, 10)
    from megatron_croc.training.optimizer import part_of_group

    for _ in range(10):
        expected = dict(zip(RATES, (group["lr"] for group in theirs.param_groups), strict=True))
        used = {}
        for group in training.optimizer.param_groups:
            used.setdefault(part_of_group(group), set()).add(group["lr"])
        assert {part: len(rates) for part, rates in used.items()} == dict.fromkeys(RATES, 1)
        ours = {part: rates.pop() for part, rates in used.items()}
        assert ours == pytest.approx(expected, rel=1e-6, abs=1e-12)
        training.scheduler.step(increment=run.training.global_batch_size)
        schedule.step()


@pytest.mark.parametrize("style", ["cosine", "linear"])
def test_every_part_ends_at_the_same_fraction_of_its_rate(pg_collection, style):
    run = tiny_run(**SETTINGS, lr_decay_style=style, min_lr=RATES["language_model"] / 10)
    training = build(run, pg_collection)
    training.scheduler.step(increment=10 * run.training.global_batch_size)
    from megatron_croc.training.optimizer import part_of_group

    for group in training.optimizer.param_groups:
        assert group["lr"] == pytest.approx(RATES[part_of_group(group)] / 10, rel=1e-6)


def test_groups_hold_every_trained_parameter_once_under_its_own_rate(pg_collection):
    from megatron_croc.training.optimizer import part_of_group

    run = tiny_run(**SETTINGS, lr_warmup_fraction=0.0, weight_decay=DECAY)
    training = build(run, pg_collection)
    numbers = dict.fromkeys(RATES, 0)
    for group in training.optimizer.param_groups:
        part = part_of_group(group)
        numbers[part] += sum(parameter.numel() for parameter in group["params"])
        assert group["max_lr"] == RATES[part]
    held = dict.fromkeys(RATES, 0)
    for name, parameter in parameters_of(training).items():
        held[name.split(".")[0]] += parameter.numel()
    assert numbers == held


def test_parts_without_a_rate_of_their_own_take_the_common_one():
    from megatron_croc.training.optimizer import learning_rates

    rates = learning_rates(tiny_run(lr=3e-4, projector_lr=1e-3).optimizer)
    assert rates.pop("projector") == 1e-3
    assert set(rates.values()) == {3e-4}
    none = learning_rates(tiny_run(lr=3e-4, projector_lr=None).optimizer)
    assert set(none.values()) == {3e-4} and len(none) == 5


def test_frozen_parts_do_not_move_and_have_no_reported_rate(pg_collection):
    run = tiny_run("finetune", weight_decay=DECAY, lr_warmup_fraction=0.0)
    training = build(run, pg_collection)
    before = {name: p.detach().clone() for name, p in parameters_of(training).items()}
    batches = make_step(run, 0, dp_rank=0, dp_size=1, images=(1, 0))
    metrics = training.train_step.train(batches, training.optimizer, training.scheduler)
    assert set(metrics.learning_rates) == {"projector", "language_model"}
    for name, parameter in parameters_of(training).items():
        is_frozen = name.startswith("vision_tower.")
        assert torch.equal(parameter, before[name]) == is_frozen, name
