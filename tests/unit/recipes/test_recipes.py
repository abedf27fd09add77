import pytest

from megatron_croc.config.checks import find_faults
from megatron_croc.errors import ConfigError
from megatron_croc.planning.memory import estimate_memory
from megatron_croc.recipes import get_recipe, list_recipes


@pytest.mark.parametrize("name", list_recipes())
def test_a_recipe_runs_on_one_node_and_fits(name: str):
    run = get_recipe(name)
    assert find_faults(run, 8) == []
    assert name.endswith("/" + run.stage)
    # A tenth of 80 GiB is left for the CUDA context and fragmentation.
    assert max(stage.total for stage in estimate_memory(run, 8)) < 0.9 * 80 * 2**30


def test_every_family_has_every_stage():
    assert list_recipes() == [
        f"{family}/{stage}"
        for family in ("tiny", "croc_7b", "croc_13b", "victor_7b")
        for stage in ("pretrain_mlp", "pretrain_croc", "finetune")
    ]


def test_recipes_are_fresh_each_time():
    get_recipe("tiny/finetune").model.language_model.num_layers = 99
    assert get_recipe("tiny/finetune").model.language_model.num_layers == 4


def test_an_unknown_recipe_names_the_nearest():
    with pytest.raises(ConfigError, match=r"did you mean croc_7b/pretrain_croc\?"):
        get_recipe("croc-7b/pretrain_crok")


# Stage settings of the paper and the released scripts (8 GPUs): stage, batch, length, template,
# image, mask, lr, projector_lr.
PUBLISHED_CROC = {
    "pretrain_mlp": (256, 2048, "plain", "square", "causal", 1e-3, None),
    "pretrain_croc": (128, 8192, "v1", "pad", "visual", 2e-5, 1.5e-4),
    "finetune": (128, 4096, "v1", "pad", "causal", 2e-5, 1.5e-4),
}


@pytest.mark.parametrize("family", ["croc_7b", "croc_13b"])
@pytest.mark.parametrize("stage", PUBLISHED_CROC)
def test_croc_as_published(family: str, stage: str):
    run = get_recipe(f"{family}/{stage}")
    assert (
        run.training.global_batch_size,
        run.data.seq_length,
        run.data.conversation_template,
        run.data.image_aspect_ratio,
        run.model.attention_mask_type,
        run.optimizer.lr,
        run.optimizer.projector_lr,
    ) == PUBLISHED_CROC[stage]
    assert run.training.freeze_ViT
    assert run.training.freeze_LM == (stage == "pretrain_mlp")
    assert run.model.vision_tower.num_visual_tokens == 576
    assert run.model.num_replaced_tokens == 432
    assert run.model.reconstruction.reconstruction_head == "bert"
    assert (run.optimizer.adam_beta1, run.optimizer.adam_beta2) == (0.9, 0.999)
    assert (run.optimizer.weight_decay, run.optimizer.clip_grad) == (0.0, 1.0)
    assert (run.optimizer.lr_decay_style, run.optimizer.lr_warmup_fraction) == ("cosine", 0.03)
    assert run.training.bf16 and run.training.train_epochs == 1.0


def test_victor_as_released():
    first, second, third = (
        get_recipe(f"victor_7b/{stage}") for stage in ("pretrain_mlp", "pretrain_croc", "finetune")
    )
    assert (first.training.global_batch_size, first.optimizer.lr) == (256, 1e-3)
    assert first.training.freeze_ViT and first.training.freeze_LM
    assert first.data.conversation_template == "plain"
    for run in (second, third):
        assert run.training.global_batch_size == 128
        assert (run.optimizer.lr, run.optimizer.vision_lr) == (1e-5, 2e-6)
        assert run.optimizer.projector_lr is None
        assert not run.training.freeze_ViT and not run.training.freeze_LM
        assert run.data.conversation_template == "qwen_1_5"
    assert second.optimizer.prompt_pool_lr == 1.5e-4
    assert third.optimizer.prompt_pool_lr is None
    for run in (first, second, third):
        assert run.model.attention_mask_type == "causal"
        assert run.model.reconstruction.reconstruction_head == "linear"
        assert run.model.vision_tower.num_visual_tokens == 729
        assert run.model.vision_tower.covered_img_size == 378
        assert run.model.num_replaced_tokens == 547


@pytest.mark.parametrize(
    ("tp", "pp", "vpp", "cp"), [(2, 1, None, 1), (1, 4, None, 1), (1, 2, 2, 1), (2, 2, None, 2)]
)
def test_tiny_can_be_cut_every_way(tp: int, pp: int, vpp: int | None, cp: int):
    run = get_recipe("tiny/pretrain_croc")
    run.parallel.tensor_model_parallel_size = tp
    run.parallel.pipeline_model_parallel_size = pp
    run.parallel.virtual_pipeline_model_parallel_size = vpp
    run.parallel.context_parallel_size = cp
    assert find_faults(run, run.parallel.model_parallel_size) == []
