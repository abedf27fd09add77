"""Configurations that the model's attention refuses when it is built."""

from types import SimpleNamespace

import pytest
from megatron.core.transformer.enums import AttnMaskType

from megatron_croc.errors import ConfigError
from megatron_croc.model.core_attention import FullAttention, MixedMaskAttention
from megatron_croc.model.transformer_configs import language_model_config
from megatron_croc.recipes import get_recipe


def build(attention=MixedMaskAttention, **changes):
    run = get_recipe("tiny/pretrain_croc")
    config = language_model_config(
        run.model.language_model, parallel=run.parallel, training=run.training
    )
    for name, value in changes.items():
        setattr(config, name, value)
    groups = SimpleNamespace(cp=None)
    return attention(config, 1, AttnMaskType.causal, "self", pg_collection=groups)


@pytest.mark.parametrize("attention", [MixedMaskAttention, FullAttention])
def test_dropout_of_attention_is_refused_with_its_value(attention):
    with pytest.raises(ConfigError, match=r"attention_dropout=0\.1: .* set it to 0"):
        build(attention, attention_dropout=0.1)


def test_a_backend_that_cannot_run_is_refused_when_the_model_is_built(monkeypatch):
    attention = build(kv_channels=12)
    attention.set_backend("flip")
    assert attention.backend == "flip"
    with pytest.raises(ConfigError, match="--attention-backend fast is not known"):
        attention.set_backend("fast")
    like = SimpleNamespace(is_cuda=True, device="cuda:0", shape=(1, 1, 12), dtype=None)
    monkeypatch.setattr("megatron_croc.model.core_attention.torch.empty", lambda *_, **__: like)
    with pytest.raises(ConfigError, match=r"flex cannot run here: head dim 12, .* takes 16"):
        attention.set_backend("flex")
    with pytest.raises(ConfigError, match=r"flip cannot run here: flash-attn 3: None tensors"):
        attention.set_backend("flip")
    assert attention.backend == "flip"
