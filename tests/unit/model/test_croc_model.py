"""The composite model in one process: freezing, fresh weights, micro-batches without images."""

import math

import pytest
import torch
from torch import nn

from tests.support.synthetic import make_batch, make_sample, tiny_run

PARTS = ("vision_tower", "projector", "prompt_pool", "language_model", "reconstruction_head")


def build(run, pg_collection) -> nn.Module:
    from megatron_croc.training.build import build_model

    (model,) = build_model(run, pg_collection)
    return model


def forward(run, model, images, context=None):
    from megatron_croc.training.step import to_model_inputs

    batch = make_batch(run, [make_sample(run, n, k) for n, k in enumerate(images)])
    return model(to_model_inputs(batch, model.pg_collection.cp), context=context), batch


@pytest.mark.parametrize(
    ("stage", "changes", "trained"),
    [
        # SPEC section 4: what each stage trains.
        ("pretrain_mlp", {}, {"projector"}),
        ("pretrain_croc", {}, set(PARTS) - {"vision_tower"}),
        ("finetune", {}, {"projector", "language_model"}),
        ("pretrain_croc", {"freeze_ViT": False}, set(PARTS)),
        ("finetune", {"freeze_projector": True}, {"language_model"}),
    ],
)
def test_each_stage_trains_its_parts(pg_collection, stage, changes, trained):
    run = tiny_run(stage, **changes)
    model = build(run, pg_collection)
    held = set(PARTS) if stage == "pretrain_croc" else set(PARTS[:2]) | {"language_model"}
    assert {part for part in PARTS if getattr(model, part) is not None} == held
    model.train()
    output, _ = forward(run, model, (1, 2))
    (output.text_loss_sum + output.reconstruction_loss_sum).backward()
    for part in held:
        grads = [p.grad for p in getattr(model, part).parameters()]
        assert all((g is not None) == (part in trained) for g in grads), part
        if part in trained:
            assert sum(g.abs().sum() for g in grads) > 0, part


@pytest.mark.parametrize("overlaps", [False, True])
@pytest.mark.parametrize("images", [(0, 0), (0,)])
def test_text_only_micro_batches_give_every_trained_part_a_gradient(
    pg_collection, images, overlaps
):
    run = tiny_run(freeze_ViT=False, overlap_grad_reduce=overlaps)
    model = build(run, pg_collection)
    model.train()
    output, batch = forward(run, model, images)
    assert batch.num_images == 0 and output.reconstruction_loss_sum.item() == 0.0
    (output.text_loss_sum + output.reconstruction_loss_sum).backward()
    for part in PARTS:
        grads = [p.grad for p in getattr(model, part).parameters()]
        if part == "vision_tower" and not overlaps:  # left out: no bucket waits for it
            assert all(g is None for g in grads)
            continue
        assert all(g is not None for g in grads), part
        if part == "language_model":
            assert sum(g.abs().sum() for g in grads) > 0
        else:
            assert all((g == 0).all() for g in grads), part


def test_the_sums_are_taken_over_labels_and_visual_elements(pg_collection):
    """Against losses put together from the model's own outputs."""
    from megatron_croc.training.step import to_model_inputs

    run = tiny_run()
    model = build(run, pg_collection).eval()
    seen = {}
    model.projector.register_forward_hook(lambda *args: seen.update(target=args[-1].detach()))
    batch = make_batch(run, [make_sample(run, 0, 2), make_sample(run, 1, 0)])
    inputs = to_model_inputs(batch, pg_collection.cp)
    with torch.no_grad():
        output = model(inputs)
        logits = model(type(inputs)(**{**vars(inputs), "labels": None})).logits
    labelled = batch.labels != -100
    losses = nn.functional.cross_entropy(logits, batch.labels.clamp(min=0), reduction="none")
    expected = losses[labelled].double().sum().item()
    assert output.text_loss_sum.item() == pytest.approx(expected, rel=1e-6)
    difference = (output.reconstruction - seen["target"]).double().abs()
    beta = 0.01
    elements = torch.where(difference < beta, difference**2 / (2 * beta), difference - beta / 2)
    assert elements.numel() == 2 * 16 * 64
    assert output.reconstruction_loss_sum.item() == pytest.approx(elements.sum().item(), rel=1e-5)


def test_replaced_tokens_are_what_the_language_model_reads(pg_collection):
    from megatron_croc.model.interface import StepContext

    run = tiny_run()
    model = build(run, pg_collection).eval()
    seen = {}
    model.language_model.decoder.register_forward_pre_hook(
        lambda module, args, kwargs: seen.update(kwargs), with_kwargs=True
    )
    replacements = []
    _, batch = forward(run, model, (1, 1), StepContext(on_replacement=replacements.append))
    (replacement,) = replacements
    row = seen["hidden_states"].squeeze(1)
    table = model.language_model.embedding.word_embeddings.weight
    text = batch.input_ids >= 0
    assert torch.equal(row[text], table[batch.input_ids[text]])
    for image, start in enumerate(batch.image_starts.tolist()):
        tokens = row[start : start + 16]
        assert torch.equal(
            tokens[batch.replaced[image]], model.prompt_pool.weight[replacement.index[image]]
        )
        kept = tokens[~batch.replaced[image]]
        torch.testing.assert_close(kept.norm(dim=-1), torch.ones(4), rtol=1e-6, atol=1e-6)


def test_forward_passes_leave_nothing_on_the_model(pg_collection):
    """Early embedded images are held by the context, and used by the next forward pass only."""
    from megatron_croc.model.interface import StepContext
    from megatron_croc.training.step import to_model_inputs

    run = tiny_run()
    model = build(run, pg_collection).train()
    batches = [make_batch(run, [make_sample(run, n, 1)]) for n in range(2)]
    first, second = (to_model_inputs(batch, pg_collection.cp) for batch in batches)
    calls, replacements = [], []
    model.vision_tower.register_forward_hook(lambda *_: calls.append(1))
    attributes = dict(vars(model))
    alone = [model(inputs) for inputs in (first, second)]
    assert len(calls) == 2
    context = StepContext(on_replacement=replacements.append)
    model(first, second, context)
    assert len(calls) == 4 and context.embedded_ahead[0] is second
    output = model(second, None, context)
    assert len(calls) == 4 and context.embedded_ahead is None and len(replacements) == 2
    assert torch.equal(output.text_loss_sum, alone[1].text_loss_sum)
    model(first, second)  # without a context there is nothing that could hold the images
    assert len(calls) == 5
    assert vars(model) == attributes


def test_fresh_weights_have_the_sizes_they_should(pg_collection):
    run = tiny_run(freeze_ViT=False, pool_init="randn")
    model = build(run, pg_collection)
    std = 0.02
    depth = {"language_model": 4, "vision_tower": 2}  # layers that run
    for name, parameter in model.named_parameters():
        part = name.split(".")[0]
        if parameter.ndim == 1:
            wanted = 0.0 if name.endswith("bias") else 1.0
            assert (parameter == wanted).all(), name
            continue
        expected = std
        if part in depth and name.endswith(("linear_proj.weight", "linear_fc2.weight")):
            expected = std / math.sqrt(2 * depth[part])
        if part == "prompt_pool":
            expected = 1.0  # torch.randn, as released
        # Five standard errors of a standard deviation.
        error = 5 * expected / math.sqrt(2 * parameter.numel())
        assert parameter.std().item() == pytest.approx(expected, abs=error), name
        assert abs(parameter.mean().item()) < 5 * expected / math.sqrt(parameter.numel()), name


def test_fresh_weights_follow_the_seed_and_no_two_are_alike(pg_collection):
    drawn = [
        {n: p.detach() for n, p in build(tiny_run(seed=seed), pg_collection).named_parameters()}
        for seed in (1, 1, 2)
    ]
    matrices = {name for name, tensor in drawn[0].items() if tensor.ndim > 1}
    assert all(torch.equal(drawn[0][name], drawn[1][name]) for name in drawn[0])
    assert not any(torch.equal(drawn[0][name], drawn[2][name]) for name in matrices)
    starts = {tuple(drawn[0][name].flatten()[:4].tolist()) for name in matrices}
    assert len(starts) == len(matrices)  # layers of a stack included
    unit = build(tiny_run(pool_init="unit"), pg_collection).prompt_pool.weight
    torch.testing.assert_close(unit.norm(dim=1), torch.ones(32), rtol=1e-6, atol=1e-6)
