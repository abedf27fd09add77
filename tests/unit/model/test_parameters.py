import pytest

from megatron_croc.config.parts import PARTS, trained_parts
from megatron_croc.model.parameters import (
    Parameters,
    count_parameters,
    padded_vocab_size,
    stage_parameters,
)
from megatron_croc.recipes import get_recipe


# Language models: as Hugging Face counts the published checkpoints. CLIP-L/14-336: its vision
# model has 303,507,456, less the 24th layer (12,596,224) and the post-layernorm (2,048).
def test_published_sizes():
    croc = count_parameters(get_recipe("croc_7b/finetune").model)
    assert croc["language_model"] == 6_738_415_616
    assert croc["vision_tower"] == 303_507_456 - 12_596_224 - 2_048
    assert croc["projector"] == 20_979_712
    assert croc["prompt_pool"] == 2048 * 4096
    assert count_parameters(get_recipe("croc_13b/finetune").model)["language_model"] == (
        13_015_864_320
    )
    victor = count_parameters(get_recipe("victor_7b/finetune").model)
    assert victor["language_model"] == 7_615_616_512
    assert victor["reconstruction_head"] == 3584 * 3584 + 3584


def test_counts_equal_the_modules_of_transformers():
    transformers = pytest.importorskip("transformers")
    model = get_recipe("tiny/pretrain_croc").model
    llm, vision = model.language_model, model.vision_tower
    common = {
        "hidden_size": llm.hidden_size,
        "intermediate_size": llm.ffn_hidden_size,
        "num_hidden_layers": llm.num_layers,
        "num_attention_heads": llm.num_attention_heads,
        "num_key_value_heads": llm.num_query_groups,
        "vocab_size": llm.vocab_size,
        "tie_word_embeddings": False,
    }
    counted = count_parameters(model)
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(**common))
    assert counted["language_model"] == llama.num_parameters()
    clip = transformers.CLIPVisionModel(
        transformers.CLIPVisionConfig(
            hidden_size=vision.vision_hidden_size,
            intermediate_size=vision.vision_ffn_hidden_size,
            num_hidden_layers=vision.num_active_layers,
            num_attention_heads=vision.vision_num_attention_heads,
            image_size=vision.img_size,
            patch_size=vision.patch_dim,
        )
    )
    post_layernorm = 2 * vision.vision_hidden_size
    assert counted["vision_tower"] == clip.num_parameters() - post_layernorm
    llm.add_qkv_bias, llm.untie_embeddings_and_output_weights = True, False
    qwen = transformers.Qwen2ForCausalLM(
        transformers.Qwen2Config(**{**common, "tie_word_embeddings": True})
    )
    assert count_parameters(model)["language_model"] == qwen.num_parameters()
    bert = transformers.BertModel(
        transformers.BertConfig(
            hidden_size=llm.hidden_size,
            intermediate_size=4 * llm.hidden_size,
            num_hidden_layers=1,
            num_attention_heads=2,
        )
    )
    layer = sum(p.numel() for p in bert.encoder.layer[0].parameters())
    around = vision.num_visual_tokens * llm.hidden_size + llm.hidden_size**2 + llm.hidden_size
    assert counted["reconstruction_head"] == layer + around


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (1, 4), (2, 2)])
def test_ranks_together_hold_the_model(tp: int, pp: int):
    run = get_recipe("tiny/pretrain_croc")
    run.parallel.tensor_model_parallel_size = tp
    run.parallel.pipeline_model_parallel_size = pp
    stages = stage_parameters(run.model, run.parallel, reconstructs=run.reconstructs)
    assert len(stages) == pp
    counted = count_parameters(run.model)
    for part in PARTS:
        held = sum((stage[part] for stage in stages if part in stage), Parameters())
        assert held.total == counted[part]
        assert held.on_rank(tp) * tp == held.cut + tp * held.whole
    assert {"vision_tower", "projector", "prompt_pool"} <= set(stages[0])
    assert "reconstruction_head" in stages[-1]


def test_a_tied_table_stands_twice_when_the_pipeline_is_cut():
    run = get_recipe("tiny/finetune")
    run.model.language_model.untie_embeddings_and_output_weights = False
    table = run.model.language_model.vocab_size * run.model.language_model.hidden_size
    one = stage_parameters(run.model, run.parallel, reconstructs=run.reconstructs)[0][
        "language_model"
    ].total
    run.parallel.pipeline_model_parallel_size = 2
    two = sum(
        stage["language_model"].total
        for stage in stage_parameters(run.model, run.parallel, reconstructs=run.reconstructs)
    )
    assert two - one == table


def test_the_vocabulary_is_padded_to_the_ranks():
    assert padded_vocab_size(32000, 1) == 32000
    assert padded_vocab_size(32003, 4) == 32004


@pytest.mark.parametrize(
    ("recipe", "expected"),
    [
        ("croc_7b/pretrain_mlp", {"projector"}),
        ("croc_7b/pretrain_croc", set(PARTS) - {"vision_tower"}),
        ("croc_7b/finetune", {"projector", "language_model"}),
        ("victor_7b/pretrain_croc", set(PARTS)),
    ],
)
def test_trained_parts_by_stage(recipe, expected):
    run = get_recipe(recipe)
    assert trained_parts(run.training, reconstructs=run.reconstructs) == expected
