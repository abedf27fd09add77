"""Choice and settings of Transformer Engine; its layers: tests/libraries."""

import pytest

from megatron_croc.errors import ConfigError
from megatron_croc.model import transformer_engine
from tests.support.synthetic import tiny_run


def test_auto_is_local_without_a_gpu(pg_collection):
    run = tiny_run()
    assert transformer_engine.resolve_transformer_impl(run.training) == "local"


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
        transformer_engine.resolve_transformer_impl(run.training)


def test_a_package_that_does_not_import_is_said(monkeypatch):
    monkeypatch.setattr(transformer_engine, "has_cuda", lambda: True)
    transformer_engine.te_unsupported_reason.cache_clear()
    try:
        assert "Transformer Engine does not import" in (
            transformer_engine.te_unsupported_reason() or ""
        )
    finally:
        transformer_engine.te_unsupported_reason.cache_clear()


def test_fp8_reaches_the_language_model_alone():
    from megatron_croc.model.transformer_configs import vision_tower_config

    run = tiny_run()
    assert transformer_engine.fp8_settings(run.training) == {}
    run.training.fp8_format, run.training.fp8_recipe = "hybrid", "blockwise"
    assert transformer_engine.fp8_settings(run.training) == {
        "fp8": "hybrid",
        "fp8_recipe": "blockwise",
        "first_last_layers_bf16": False,
    }
    tower = vision_tower_config(
        run.model.vision_tower, parallel=run.parallel, training=run.training
    )
    assert tower.fp8 is None


def test_its_version_is_looked_at_when_it_is_used(monkeypatch):
    looked_at = []
    monkeypatch.setattr(transformer_engine, "name_unknown_version", looked_at.append)
    run = tiny_run()
    transformer_engine.resolve_transformer_impl(run.training)
    assert looked_at == []
    monkeypatch.setattr(transformer_engine, "te_unsupported_reason", lambda: None)
    assert transformer_engine.resolve_transformer_impl(run.training) == "te"
    assert looked_at == ["transformer-engine"]
