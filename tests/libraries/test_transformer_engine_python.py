"""Our use of Transformer Engine against its own Python, on a CPU (`make libraries` fetches it).

Nothing that brings megatron-core is imported up here: Transformer Engine must come before it.
"""

import pytest

from tests.support import transformer_engine as te
from tests.support.distributed import run_distributed

pytestmark = [pytest.mark.libraries, pytest.mark.distributed]


@pytest.fixture(params=te.VERSIONS)
def version(request) -> str:
    if not (te.BUILD / f"transformer_engine-{request.param}").is_dir():
        pytest.fail("Transformer Engine's Python is not there; `make libraries` fetches it")
    return request.param


def tiny_run(**changes):
    from tests.support import synthetic

    return synthetic.tiny_run(**changes)


def run_with_te(version, function, *args, world_size=1):
    return run_distributed(installed, world_size, version, function, *args, context=te.spawned)


def installed(version, function, *args):
    te.install(version)
    return function(*args)


# ------------------------------------------------------------------------------------ layers


def build_both(run):
    """The same model of our layers and of Transformer Engine's."""
    from megatron_croc.parallel.groups import start_distributed
    from megatron_croc.training.build import build_model

    groups, models = start_distributed(run.parallel, seed=1), {}
    for implementation in ("local", "te"):
        run.training.transformer_impl = implementation
        models[implementation] = build_model(run, groups)[0]
    names = {cls.__module__ for module in models["te"].modules() for cls in type(module).__mro__}
    for layer in ("linear", "layernorm_linear", "rmsnorm"):
        assert f"transformer_engine.pytorch.module.{layer}" in names
    return models


def outputs(run):
    """Logits and features of both models."""
    import torch

    from megatron_croc.model.core_attention import MixedMaskParams
    from megatron_croc.ops.mixed_mask import MixedMask

    models = build_both(run).values()
    ids, mask = torch.arange(24), MixedMask.build([0, 24], length=24)
    size = run.model.vision_tower.img_size
    pixels = torch.randint(0, 256, (1, 3, size, size), dtype=torch.uint8)
    with torch.no_grad():
        logits = [
            model.language_model(
                input_ids=None,
                position_ids=None,
                attention_mask=None,
                decoder_input=model.language_model.embed_text(ids),
                packed_seq_params=MixedMaskParams.of(mask),
            ).logits.float()
            for model in models
        ]
        features = [model.vision_tower(pixels).float() for model in models]
    return logits, features


def test_both_compute_the_same(version):
    import torch

    run = tiny_run()
    run.model.language_model.add_qkv_bias = True
    ((logits, features),) = run_with_te(version, outputs, run)
    assert torch.equal(*logits) and torch.equal(*features)


def descriptions(run):
    """Of both models' shards and parameters: all that a checkpoint and a reduction go by."""
    from megatron_croc.model.sharded_weights import iter_shards

    answer = []
    for model in build_both(run).values():
        shards = {s.name: (s.shape, s.block, s.data.dtype) for s in iter_shards(model)}
        values = {s.name: s.data.detach().float().numpy() for s in iter_shards(model)}
        attributes = {local_name(n): attributes_of(p) for n, p in model.named_parameters()}
        answer.append((shards, values, attributes))
    return answer


def local_name(name: str) -> str:
    """The parameter's name in a model of our own layers."""
    for ours, theirs in (
        ("input_layernorm.", "self_attention.linear_qkv.layer_norm_"),
        ("pre_mlp_layernorm.", "mlp.linear_fc1.layer_norm_"),
    ):
        name = name.replace(theirs, ours)
    return name


def attributes_of(parameter):
    return {
        "shape": tuple(parameter.shape),
        "dtype": parameter.dtype,
        "trained": parameter.requires_grad,
        "sequence_parallel": bool(getattr(parameter, "sequence_parallel", False)),
        "tensor_model_parallel": bool(getattr(parameter, "tensor_model_parallel", False)),
        "partition_dim": getattr(parameter, "partition_dim", -1),
        "allreduce": getattr(parameter, "allreduce", True),
    }


@pytest.mark.parametrize("biases", [False, True], ids=["without biases", "with biases"])
def test_both_are_stored_and_reduced_the_same(version, biases):
    """Two tensor-parallel ranks with sequence parallelism, in bf16."""
    run = tiny_run(bf16=True, tensor_model_parallel_size=2, sequence_parallel=True)
    run.model.language_model.add_qkv_bias = biases
    for (shards, values, attributes), (te_shards, te_values, te_attributes) in run_with_te(
        version, descriptions, run, world_size=2
    ):
        assert te_shards == shards and len(shards) > 50
        assert any("linear_qkv.bias" in name for name in shards if "language" in name) == biases
        assert all((te_values[name] == values[name]).all() for name in values)
        differences = {
            name: {k: (v, te_attributes[name][k]) for k, v in of.items()
                   if te_attributes[name][k] != v}
            for name, of in attributes.items()
        }  # fmt: skip
        assert attributes.keys() == te_attributes.keys()
        assert not {name: found for name, found in differences.items() if found}


# --------------------------------------------------------------------------------- optimizer


def continue_run(folder, origin, kind):
    """Two steps after resuming `origin`, or from its weights alone; weights and step counts."""
    from megatron_croc.parallel.groups import start_distributed, stop_distributed

    run = train_settings(**{kind: str(folder / origin)})
    training = steps(run, start_distributed(run.parallel, seed=1), 2)
    inner = training.optimizer.chained_optimizers[0].optimizer
    counts = {float(group["step"]) for group in inner.param_groups}
    weights = {n: p.detach().numpy() for n, p in training.chunks[0].module.named_parameters()}
    stop_distributed()
    return weights, counts, type(inner).__name__


def train_settings(**changes):
    constant = dict(lr_decay_style="constant", lr_warmup_fraction=0.0, weight_decay=0.1, lr=1e-3)
    run = tiny_run(**constant, transformer_impl="local", **changes)
    run.model.reconstruction.reconstruction_dropout = 0.0
    return run


def steps(run, groups, number):
    from megatron_croc.training.build import build_training_state
    from tests.support.synthetic import make_step

    training = build_training_state(run, groups, train_iters=10)
    for _ in range(number):
        batches = make_step(run, training.state.iteration, dp_rank=0, dp_size=1)
        training.train_step.train(batches, training.optimizer, training.scheduler)
        training.state.iteration += 1
    return training


def save_two(folder, name):
    """Checkpoints <name>0, before the first step, and <name>2, after two."""
    from megatron_croc.parallel.groups import start_distributed, stop_distributed
    from tests.support.checkpoints import save_checkpoint

    for number in (0, 2):
        run = train_settings(save=str(folder / f"{name}{number}"))
        groups = start_distributed(run.parallel, seed=1)
        training = steps(run, groups, number)
        save_checkpoint(run, training.state, training.chunks, training.optimizer, groups)
        stop_distributed()


def save_and_continue(folder, own, others):
    """This process's AdamW: its own checkpoints, then two steps after each one of `others`."""
    save_two(folder, own)
    return continue_all(folder, others)


def continue_all(folder, origins):
    return {
        (origin, kind): continue_run(folder, origin, kind)
        for origin in origins
        for kind in ("load", "pretrained_checkpoint")
    }


def test_either_adam_goes_on_where_the_other_stopped(version, tmp_path):
    """All four pairs of torch's AdamW and FusedAdam: saved at step 0 and 2, resumed and started."""
    names = [f"{name}{number}" for name in ("torch", "fused") for number in (0, 2)]
    run_distributed(save_two, 1, tmp_path, "torch")
    (fused,) = run_with_te(version, save_and_continue, tmp_path, "fused", names)
    (torchs,) = run_distributed(continue_all, 1, tmp_path, names)
    for origin, kind in fused:
        reference, counts, name = torchs[f"torch{origin[-1]}", kind]
        assert name == "AdamW"
        assert counts == {2.0 + (int(origin[-1]) if kind == "load" else 0)}
        for run, adam in ((fused, "FusedAdam"), (torchs, "AdamW")):
            weights, steps_taken, name = run[origin, kind]
            assert name == adam and steps_taken == counts
            worst = max(abs(weights[n] - reference[n]).max() for n in weights)
            # A step moves a weight by about the rate, 1e-3.
            assert worst < 2e-6, (origin, kind, adam, worst)


# --------------------------------------------------------------------------------------- fp8


def quantizer_of(run):
    """The recipe megatron makes of our settings, and TE's quantizer of a layer's input."""
    import torch
    from megatron.core.fp8_utils import get_fp8_recipe
    from transformer_engine.pytorch.fp8 import RecipeState

    from megatron_croc.model.transformer_configs import language_model_config

    config = language_model_config(
        run.model.language_model, parallel=run.parallel, training=run.training
    )
    recipe = get_fp8_recipe(config)
    state = RecipeState.create(recipe, mode="forward", num_quantizers=3, device=torch.device("cpu"))
    return recipe, state.make_quantizers()[0]


def accepted_lengths(run, tried):
    """Recipe -> its class in TE, and which of some rows a rank a sequence-parallel layer takes."""
    import torch
    from transformer_engine.pytorch.utils import assert_dim_for_fp8_exec

    answer = {}
    for name, lengths in tried.items():
        run.training.fp8_recipe = name
        recipe, quantizer = quantizer_of(run)
        accepted = []
        for length in lengths:
            rows = torch.empty(length, run.model.language_model.hidden_size)
            try:
                assert_dim_for_fp8_exec(rows)
                accepted.append(quantizer.is_quantizable(rows))
            except (AssertionError, ValueError):
                accepted.append(False)
        answer[name] = type(recipe).__name__, accepted
    return answer


def test_rows_are_padded_to_what_fp8_takes(version):
    from megatron_croc.data.batch_builder import pack_multiple

    run = tiny_run(bf16=True, fp8_format="hybrid", hidden_size=256)
    least = {"tensorwise": 8, "blockwise": 128, "mxfp8": 32}
    run.parallel.sequence_parallel, run.parallel.tensor_model_parallel_size = True, 2
    tried = {}
    for name, rows in least.items():
        run.training.fp8_recipe = name
        tried[name] = [pack_multiple(run.parallel, run.training) // 2, rows, rows // 2]
    run.parallel.sequence_parallel, run.parallel.tensor_model_parallel_size = False, 1
    (found,) = run_with_te(version, accepted_lengths, run, tried)
    assert found == {
        "tensorwise": ("Float8CurrentScaling", [True, True, False]),
        "blockwise": ("Float8BlockScaling", [True, True, False]),
        "mxfp8": ("MXFP8BlockScaling", [True, True, False]),
    }
