"""The name map is total in both directions, and weights come back bit for bit."""

import pytest
import torch
from torch import Tensor, nn

from megatron_croc.convert.names import CROC, VICTOR, Layout, build_rules
from megatron_croc.convert.state import gather_state, load_state
from megatron_croc.errors import CheckpointError
from tests.support.distributed import run_distributed
from tests.support.synthetic import tiny_run

QWEN = dict(add_qkv_bias=True, reconstruction_head="linear")
MODELS = {
    "croc": (CROC, {}),
    "victor": (VICTOR, QWEN),
    "victor tied": (VICTOR, dict(QWEN, untie_embeddings_and_output_weights=False)),
    "siglip": (VICTOR, dict(QWEN, vision_model_type="siglip", vision_activation="gelu_tanh")),
    "odd vocabulary": (CROC, dict(vocab_size=127)),
}


def build(run, pg_collection) -> nn.Module:
    from megatron_croc.training.build import build_model

    (model,) = build_model(run, pg_collection)
    return model


def weights_of(model: nn.Module, run, layout: Layout) -> dict[str, Tensor]:
    return gather_state([model], build_rules(run.model, layout), lambda parameter: parameter)


@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_has_a_rule_and_every_rule_a_parameter(name, pg_collection):
    from megatron_croc.model.sharded_weights import iter_shards

    layout, changes = MODELS[name]
    run = tiny_run(**changes)
    model = build(run, pg_collection)
    rules = build_rules(run.model, layout)
    keys = {shard.key for shard in iter_shards(model)}
    tied = {"language_model.output_layer.weight"} if "tied" in name else set()
    assert keys - tied == set(rules) - tied
    # iter_shards itself must miss nothing: as many numbers as the model has.
    numbers = sum(shard.data.numel() for shard in iter_shards(model) if shard.key not in tied)
    assert numbers == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", MODELS)
def test_there_and_back_in_hugging_face_names(name, pg_collection):
    layout, changes = MODELS[name]
    run = tiny_run(**changes)
    first, second = (build(run, pg_collection) for _ in range(2))
    with torch.no_grad():
        for parameter in second.parameters():
            parameter.fill_(torch.nan)
    state = weights_of(first, run, layout)
    used = load_state(second, state, build_rules(run.model, layout))
    assert used == set(state)
    for (key, ours), theirs in zip(second.named_parameters(), first.parameters(), strict=True):
        assert torch.equal(ours, theirs), key
    names = set(state)
    llm = run.model.language_model
    assert state["model.embed_tokens.weight"].shape == (llm.vocab_size, llm.hidden_size)
    assert ("lm_head.weight" in names) == ("tied" not in name)
    assert (layout.prompt_pool in names) and "model.layers.3.mlp.up_proj.weight" in names
    assert "model.layers.4.mlp.up_proj.weight" not in names


def test_names_are_those_of_transformers(pg_collection):
    """Language model and tower of one whole state, loaded into transformers' own modules."""
    import transformers

    run = tiny_run(num_query_groups=2)
    state = weights_of(build(run, pg_collection), run, CROC)
    llama = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=128,
            tie_word_embeddings=False,
        )
    )
    parts = ("model.mm_projector.", "model.vision_tower.", "model.mask_token")
    mine = {
        name: tensor
        for name, tensor in state.items()
        if name.startswith(("model.", "lm_head.")) and not name.startswith(parts)
    }
    llama.load_state_dict(mine)  # strict: names and shapes
    clip = transformers.CLIPVisionModel(
        transformers.CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,  # the layers that run
            num_attention_heads=4,
            image_size=56,
            patch_size=14,
        )
    )
    prefix = CROC.vision_tower
    theirs = {name.removeprefix("vision_model.") for name in clip.state_dict()}
    ours = {name.removeprefix(prefix) for name in state if name.startswith(prefix)}
    assert theirs - ours == {"post_layernorm.weight", "post_layernorm.bias"}
    assert not ours - theirs


def test_a_missing_tensor_is_named(pg_collection):
    run = tiny_run()
    model = build(run, pg_collection)
    state = weights_of(model, run, CROC)
    name = "model.layers.2.self_attn.k_proj.weight"
    del state[name]
    with pytest.raises(CheckpointError, match=rf"{name} is missing .*layers\..*linear_qkv"):
        load_state(model, state, build_rules(run.model, CROC))


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("model.layers.0.mlp.down_proj.weight", (64, 95)),
        ("model.norm.weight", (63,)),
        ("model.embed_tokens.weight", (128, 63)),
        ("model.mask_token", (33, 64)),
        ("model.mm_projector.2.bias", (1,)),
    ],
)
def test_a_wrong_shape_is_named_with_both_shapes(pg_collection, name, shape):
    run = tiny_run()
    model = build(run, pg_collection)
    state = weights_of(model, run, CROC)
    wanted = tuple(state[name].shape)
    state[name] = torch.zeros(shape)
    with pytest.raises(CheckpointError) as error:
        load_state(model, state, build_rules(run.model, CROC))
    assert name in str(error.value)
    assert str(shape) in str(error.value) and str(wanted) in str(error.value)


def test_a_shorter_vocabulary_is_padded_and_longer_positions_are_cut(pg_collection):
    run = tiny_run()
    model = build(run, pg_collection)
    state = weights_of(model, run, CROC)
    table, positions = "model.embed_tokens.weight", "transform_block.position_embeddings.weight"
    state[table] = state[table][:120]
    longer = torch.randn(576, 64)  # as released: 576 whatever the image
    state[positions] = longer
    load_state(model, state, build_rules(run.model, CROC))
    weight = model.language_model.embedding.word_embeddings.weight
    assert torch.equal(weight[:120], state[table]) and (weight[120:] == 0).all()
    assert torch.equal(model.reconstruction_head.position_embeddings.weight, longer[:16])


def load_and_gather(changes: dict, state: dict) -> dict:
    """Load a state at this layout, gather it again (on each rank)."""
    from megatron_croc.parallel.groups import start_distributed

    run = tiny_run(**changes)
    model = build(run, start_distributed(run.parallel, seed=1))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)
    tensors = {name: torch.from_numpy(array) for name, array in state.items()}
    load_state(model, tensors, build_rules(run.model, CROC))
    return {name: t.detach().numpy() for name, t in weights_of(model, run, CROC).items()}


@pytest.mark.distributed
@pytest.mark.parametrize(
    "changes",
    [dict(tensor_model_parallel_size=2), dict(pipeline_model_parallel_size=2)],
    ids=["tp2", "pp2"],
)
def test_there_and_back_over_two_ranks(changes, pg_collection):
    run = tiny_run(vocab_size=127)
    model = build(run, pg_collection)
    state = {name: t.detach().numpy() for name, t in weights_of(model, run, CROC).items()}
    for back in run_distributed(load_and_gather, 2, dict(changes, vocab_size=127), state):
        assert back.keys() == state.keys()
        for name, array in state.items():
            assert (back[name] == array).all(), name
