"""The language model against LlamaForCausalLM and Qwen2ForCausalLM with the same weights."""

import pytest
import torch
import transformers
from torch.nn.functional import cross_entropy

from megatron_croc.ops.mixed_mask import MixedMask
from tests.support.synthetic import tiny_run
from tests.unit.model.huggingface import fill, randomise, state_with_prefix

COMMON = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 128,
    "attention_dropout": 0.0,
    "max_position_embeddings": 2048,
    "attn_implementation": "eager",
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def llama(**changes):
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**COMMON, **changes}))


def qwen2(**changes):
    return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**{**COMMON, **changes}))


MODELS = {
    # transformers' model, our settings
    "mha": (
        lambda: llama(num_key_value_heads=4, rms_norm_eps=1e-5, tie_word_embeddings=False),
        dict(num_query_groups=4),
    ),
    "gqa": (
        lambda: llama(num_key_value_heads=2, rms_norm_eps=1e-6, tie_word_embeddings=False),
        dict(num_query_groups=2, norm_epsilon=1e-6),
    ),
    "wide heads": (
        lambda: llama(num_key_value_heads=2, head_dim=32, rms_norm_eps=1e-5),
        dict(num_query_groups=2, kv_channels=32),
    ),
    "llama3 rope": (
        lambda: llama(
            num_key_value_heads=2,
            rms_norm_eps=1e-5,
            max_position_embeddings=65536,
            rope_parameters={**LLAMA3, "rope_theta": 500000.0},
        ),
        dict(
            num_query_groups=2,
            rotary_base=500000.0,
            rope_scaling_type="llama3",
            rope_scaling_factor=8.0,
        ),
    ),
    "linear rope": (
        lambda: llama(
            num_key_value_heads=2,
            rms_norm_eps=1e-5,
            rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0},
        ),
        dict(num_query_groups=2, rope_scaling_type="linear", rope_scaling_factor=2.0),
    ),
    "qwen": (
        lambda: qwen2(
            num_key_value_heads=2,
            rms_norm_eps=1e-6,
            tie_word_embeddings=False,
            rope_parameters={"rope_type": "default", "rope_theta": 1000000.0},
        ),
        dict(num_query_groups=2, norm_epsilon=1e-6, rotary_base=1e6, add_qkv_bias=True),
    ),
    "qwen tied": (
        lambda: qwen2(
            num_key_value_heads=2,
            rms_norm_eps=1e-6,
            tie_word_embeddings=True,
            rope_parameters={"rope_type": "default", "rope_theta": 1000000.0},
        ),
        dict(
            num_query_groups=2,
            norm_epsilon=1e-6,
            rotary_base=1e6,
            add_qkv_bias=True,
            untie_embeddings_and_output_weights=False,
        ),
    ),
}


def build_pair(name, pg_collection):
    """transformers' model and ours with its weights."""
    from megatron_croc.model.language_model import LanguageModel
    from megatron_croc.model.transformer_configs import language_model_config

    make, changes = MODELS[name]
    theirs = make()
    randomise(theirs)
    run = tiny_run(num_layers=2, **changes)
    model = run.model.language_model
    ours = LanguageModel(
        model,
        language_model_config(model, parallel=run.parallel, training=run.training),
        pg_collection,
        implementation="local",
        attention_backend="auto",
        logits_chunk=8192,
        pre_process=True,
        post_process=True,
    ).eval()
    tensors = state_with_prefix(theirs, lambda key: key)
    used = fill(ours, "language_model.", run.model, tensors)
    tied = {"lm_head.weight"} if "tied" in name else set()  # the same tensor as the table
    assert set(tensors) - used == tied
    return theirs, ours


def run_ours(model, ids, mask, labels=None):
    from megatron_croc.model.core_attention import MixedMaskParams
    from megatron_croc.model.interface import Labels

    return model(
        input_ids=None,
        position_ids=None,
        attention_mask=None,
        decoder_input=model.embed_text(ids),
        labels=None if labels is None else Labels.of_pack(labels, model.pg_collection.cp),
        packed_seq_params=MixedMaskParams.of(mask),
    )


def draw_ids(*lengths):
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, 128, (n,), generator=generator) for n in lengths]


@pytest.mark.parametrize("name", MODELS)
def test_a_packed_row_gives_each_samples_own_logits(name, pg_collection):
    theirs, ours = build_pair(name, pg_collection)
    samples = draw_ids(37, 20)
    mask = MixedMask.build([0, 37, 57], length=60)
    row = torch.cat([*samples, torch.zeros(3, dtype=torch.int64)])
    with torch.no_grad():
        output = run_ours(ours, row, mask)
        for begin, sample in zip((0, 37), samples, strict=True):
            expected = theirs(sample[None], output_hidden_states=True)
            here = slice(begin, begin + len(sample))
            # The second sample stands at positions 37.. of our row: rotary angles differ by a
            # constant turn, which costs a few roundings.
            torch.testing.assert_close(
                output.logits[here], expected.logits[0], rtol=1e-5, atol=1e-5
            )
            torch.testing.assert_close(
                output.hidden_states[here, 0], expected.hidden_states[-1][0], rtol=1e-5, atol=1e-5
            )
    assert output.logits.isfinite().all()


@pytest.mark.parametrize("name", ["gqa", "qwen"])
def test_mixed_masks_reach_every_layer(name, pg_collection):
    """transformers with the dense mask handed over as a bias."""
    theirs, ours = build_pair(name, pg_collection)
    (ids,) = draw_ids(24)
    mask = MixedMask.build([0, 24], [(3, 9), (9, 15)])
    bias = torch.zeros(24, 24).masked_fill(~mask.visible(), torch.finfo(torch.float32).min)
    with torch.no_grad():
        expected = theirs(ids[None], attention_mask=bias[None, None]).logits[0]
        causal = theirs(ids[None]).logits[0]
        logits = run_ours(ours, ids, mask).logits
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    assert (logits - causal).abs().max() > 0.01


@pytest.mark.parametrize("chunk", [8192, 7])
def test_losses_and_gradients_are_transformers(chunk, pg_collection):
    """Losses of labelled positions only, also when their logits are computed in chunks."""
    theirs, ours = build_pair("gqa", pg_collection)
    ours.logits_chunk = chunk
    (ids,) = draw_ids(30)
    labels = ids.roll(-1)
    labels[::3] = -100
    calls = []
    ours.output_layer.register_forward_pre_hook(lambda _, args: calls.append(len(args[0])))
    output = run_ours(ours, ids, MixedMask.build([0, 30]), labels)
    assert calls == ([20] if chunk > 20 else [7, 7, 6])
    expected = cross_entropy(theirs(ids[None]).logits[0], labels, reduction="none")
    torch.testing.assert_close(output.token_losses, expected[labels != -100], rtol=1e-5, atol=1e-5)
    output.token_losses.sum().backward()
    expected.sum().backward()
    for mine, reference in [
        (ours.embedding.word_embeddings.weight, theirs.model.embed_tokens.weight),
        (ours.output_layer.weight, theirs.lm_head.weight),
        (ours.decoder.final_layernorm.weight, theirs.model.norm.weight),
        (ours.decoder.layers[0].mlp.linear_fc2.weight, theirs.model.layers[0].mlp.down_proj.weight),
    ]:
        scale = reference.grad.abs().max()
        assert (mine.grad - reference.grad).abs().max() < 1e-5 * scale


def test_a_pack_without_labels_has_one_position_that_is_not_counted(pg_collection):
    _, ours = build_pair("mha", pg_collection)
    (ids,) = draw_ids(8)
    with torch.no_grad():
        output = run_ours(ours, ids, MixedMask.build([0, 8]), torch.full((8,), -100))
    assert output.token_losses.shape == (1,) and output.token_losses.isfinite().all()
