"""Epsilons and dropout of the built model: too small to move a comparison at usual sizes."""

import torch
from torch import nn

from megatron_croc.model.norm import Norm
from tests.support.synthetic import make_batch, make_sample, tiny_run


def build(run, pg_collection) -> nn.Module:
    from megatron_croc.training.build import build_model

    (model,) = build_model(run, pg_collection)
    return model


def test_every_norm_has_its_own_epsilon(pg_collection):
    run = tiny_run(norm_epsilon=3e-6, vision_norm_epsilon=7e-6)
    model = build(run, pg_collection)
    numbers = {"language_model": 0, "vision_tower": 0}
    for name, module in model.named_modules():
        part = name.split(".")[0]
        if part in numbers and isinstance(module, Norm | nn.LayerNorm):
            assert module.eps == {"language_model": 3e-6, "vision_tower": 7e-6}[part], name
            numbers[part] += 1
    assert min(numbers.values()) >= 4


def test_a_visual_token_of_any_size_gets_length_one(pg_collection):
    projector = build(tiny_run("pretrain_mlp"), pg_collection).projector
    features = torch.randn(2, 16, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for scale in (1.0, 1e-4):
            tokens = projector(scale * features)
            torch.testing.assert_close(tokens.norm(dim=-1), torch.ones(2, 16), rtol=1e-5, atol=0)
        for parameter in projector.parameters():
            parameter.mul_(1e-5)
        tokens = projector(features)
    torch.testing.assert_close(tokens.norm(dim=-1), torch.ones(2, 16), rtol=1e-3, atol=0)


def test_only_the_reconstruction_head_drops(pg_collection):
    """Training and evaluation of tower, projector and language model are the same function."""
    from megatron_croc.training.step import to_model_inputs

    run = tiny_run(reconstruction_dropout=0.0)
    model = build(run, pg_collection)
    batch = make_batch(run, [make_sample(run, n, 1) for n in range(2)])
    inputs = to_model_inputs(batch, pg_collection.cp)
    with torch.no_grad():
        train, evaluate = model.train()(inputs), model.eval()(inputs)
    assert torch.equal(train.text_loss_sum, evaluate.text_loss_sum)
    assert torch.equal(train.reconstruction_loss_sum, evaluate.reconstruction_loss_sum)
