"""A model small enough for a test of a second, and samples to go with it."""

from megatron_croc.config.run import RunConfig
from megatron_croc.config.settings import set_setting, settings_of
from megatron_croc.data.synthetic import make_batch as make_batch
from megatron_croc.data.synthetic import make_sample as make_sample
from megatron_croc.data.synthetic import make_step as make_step
from megatron_croc.recipes import get_recipe


def tiny_run(stage: str = "pretrain_croc", **changes: object) -> RunConfig:
    """The tiny recipe, smaller still, with `changes` to leaf settings (`lr=1e-3`)."""
    run = get_recipe(f"tiny/{stage}")
    run.model.vision_tower.img_size = 56
    run.model.vision_tower.vision_num_layers = 3
    run.model.vision_tower.vision_hidden_size = 32
    run.model.vision_tower.vision_ffn_hidden_size = 64
    run.model.language_model.hidden_size = 64
    run.model.language_model.ffn_hidden_size = 96
    run.model.language_model.vocab_size = 128
    run.model.prompt_pool.pool_size = 32
    run.training.micro_batch_size = 2
    run.training.global_batch_size = 8
    paths = {setting.path.rsplit(".", 1)[-1]: setting.path for setting in settings_of(RunConfig)}
    for name, value in changes.items():
        set_setting(run, paths[name], value)  # type: ignore[arg-type]
    return run
