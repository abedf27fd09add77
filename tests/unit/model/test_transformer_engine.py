"""Layers of Transformer Engine, with modules of the same names and shapes in their place."""

import pytest
import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import nn
from torch.nn import functional

from megatron_croc.errors import ConfigError
from megatron_croc.model import transformer_engine
from megatron_croc.model.core_attention import MixedMaskParams
from megatron_croc.model.sharded_weights import iter_shards
from megatron_croc.ops.mixed_mask import MixedMask
from megatron_croc.training.build import build_model
from tests.support.synthetic import tiny_run


class NormColumn(ColumnParallelLinear):
    """A norm and the linear layer behind it, with TE's parameter names."""

    def __init__(self, input_size, output_size, *, config, **kwargs):
        super().__init__(input_size, output_size, config=config, **kwargs)
        self.norm_config = config
        self.layer_norm_weight = nn.Parameter(torch.ones(input_size, dtype=config.params_dtype))
        if config.normalization == "LayerNorm":
            self.layer_norm_bias = nn.Parameter(torch.zeros(input_size, dtype=config.params_dtype))

    def forward(self, x):
        eps, shape = self.norm_config.layernorm_epsilon, self.layer_norm_weight.shape
        if self.norm_config.normalization == "RMSNorm":
            normed = functional.rms_norm(x, shape, self.layer_norm_weight, eps)
        else:
            normed = functional.layer_norm(
                x, shape, self.layer_norm_weight, self.layer_norm_bias, eps
            )
        return super().forward(normed)

    def sharded_state_dict(self, prefix="", sharded_offsets=(), metadata=None):
        state = self.state_dict(prefix="", keep_vars=True)
        axes = {"weight": 0, "bias": 0}
        return make_sharded_tensors_for_checkpoint(state, prefix, axes, sharded_offsets)


@pytest.fixture
def te(monkeypatch, pg_collection):
    """A machine on which Transformer Engine seems to work."""
    from megatron_croc.model.norm import Norm

    modules = transformer_engine.LinearModules(Norm, NormColumn, RowParallelLinear)
    for name in ("megatron_croc.model.transformer_engine", "megatron_croc.model.layer_specs"):
        monkeypatch.setattr(f"{name}.linear_modules", lambda: modules)
    monkeypatch.setattr(transformer_engine, "te_fault", lambda: None)


def test_both_implementations_name_and_compute_the_same(te, pg_collection):
    run = tiny_run()
    models = {}
    for name in ("local", "te"):
        run.training.transformer_impl = name
        models[name] = build_model(run, pg_collection)[0]
    assert any(isinstance(module, NormColumn) for module in models["te"].modules())
    assert not any(isinstance(module, NormColumn) for module in models["local"].modules())

    shards = {
        name: {shard.name: shard.data for shard in iter_shards(model)}
        for name, model in models.items()
    }
    assert shards["te"].keys() == shards["local"].keys()
    for name, data in shards["local"].items():
        assert torch.equal(shards["te"][name], data), name

    ids, mask = torch.arange(24), MixedMask.build([0, 24], length=24)
    size = run.model.vision_tower.img_size
    pixels = torch.randint(0, 256, (1, 3, size, size), dtype=torch.uint8)
    with torch.no_grad():
        logits = {
            name: model.language_model(
                input_ids=None,
                position_ids=None,
                attention_mask=None,
                decoder_input=model.language_model.embed_text(ids),
                packed_seq_params=MixedMaskParams.of(mask),
            ).logits
            for name, model in models.items()
        }
        features = {name: model.vision_tower(pixels) for name, model in models.items()}
    assert torch.equal(logits["te"], logits["local"])
    assert torch.equal(features["te"], features["local"])


def test_auto_is_local_without_a_gpu(pg_collection):
    run = tiny_run()
    assert transformer_engine.resolve_transformer_impl(run) == "local"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"transformer_impl": "te"}, "transformer_impl=te: Transformer Engine needs a GPU"),
        ({"fp8_format": "hybrid"}, "fp8_format=hybrid: Transformer Engine needs a GPU"),
    ],
)
def test_what_cannot_be_had_is_refused(change, named):
    run = tiny_run()
    for name, value in change.items():
        setattr(run.training, name, value)
    with pytest.raises(ConfigError, match=named):
        transformer_engine.resolve_transformer_impl(run)


def test_a_package_that_does_not_import_is_said(monkeypatch):
    monkeypatch.setattr(transformer_engine, "has_cuda", lambda: True)
    transformer_engine.te_fault.cache_clear()
    try:
        assert "Transformer Engine does not import" in (transformer_engine.te_fault() or "")
    finally:
        transformer_engine.te_fault.cache_clear()


def test_fp8_reaches_the_language_model_alone():
    from megatron_croc.model.transformer_configs import vision_tower_config

    run = tiny_run()
    assert transformer_engine.fp8_settings(run) == {}
    run.training.fp8_format, run.training.fp8_recipe = "hybrid", "blockwise"
    assert transformer_engine.fp8_settings(run) == {
        "fp8": "hybrid",
        "fp8_recipe": "blockwise",
        "first_last_layers_bf16": False,
    }
    assert vision_tower_config(run).fp8 is None
