"""The memory estimate against what real models allocate, on every axis. Rows of docs/planning.md.

Weights, gradients and optimizer must agree to half a per cent (the rest is the padding of buffers),
what is kept for backward to ten.
"""

from dataclasses import replace
from typing import Any

import pytest

from megatron_croc.config.run import RunConfig
from megatron_croc.config.settings import set_setting, settings_of
from megatron_croc.planning.memory import estimate_memory, longest_pack
from megatron_croc.recipes import get_recipe
from tests.support.distributed import run_distributed
from tests.support.memory import full_batch, measure

CASES: dict[str, tuple[str, int, dict[str, Any]]] = {
    "dp2": ("finetune", 2, {}),
    "bf16": ("finetune", 1, {"bf16": True, "num_layers": 2}),
    "vision trained": ("finetune", 1, {"freeze_ViT": False}),
    "vision recomputed": ("finetune", 1, {"freeze_ViT": False, "recompute_vision": True}),
    "grouped queries": ("finetune", 1, {"num_query_groups": 2}),
    "frozen LM": ("pretrain_mlp", 1, {}),
    "reconstruction": ("pretrain_croc", 1, {}),
    "full recompute": ("finetune", 1, {"recompute_granularity": "full"}),
    "block recompute": (
        "finetune",
        1,
        {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": 2},
    ),
    "tp2": ("finetune", 2, {"tensor_model_parallel_size": 2}),
    "tp2+sp": (
        "pretrain_croc",
        2,
        {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    ),
    "pp2": ("finetune", 2, {"pipeline_model_parallel_size": 2, "global_batch_size": 8}),
    "pp2+vpp2": (
        "finetune",
        2,
        {
            "pipeline_model_parallel_size": 2,
            "virtual_pipeline_model_parallel_size": 2,
            "global_batch_size": 8,
        },
    ),
    "cp2": ("finetune", 2, {"context_parallel_size": 2}),
    "tp2, images shared": (
        "finetune",
        2,
        {"tensor_model_parallel_size": 2, "split_vision": "images", "freeze_ViT": False},
    ),
}


def build_run(name: str) -> tuple[RunConfig, int]:
    """A model small enough for a CPU whose samples are all as long as seq_length."""
    stage, world_size, changes = CASES[name]
    run = get_recipe(f"tiny/{stage}")
    llm = run.model.language_model
    llm.hidden_size, llm.ffn_hidden_size, llm.num_layers, llm.vocab_size = 64, 192, 4, 512
    llm.num_attention_heads = llm.num_query_groups = 4
    run.model.attention_backend = "flip"
    run.training.bias_swiglu_fusion = False  # as it runs here
    run.data.seq_length = 96
    run.training.micro_batch_size, run.training.global_batch_size = 2, 4
    paths = {setting.name: setting.path for setting in settings_of(RunConfig)}
    for key, value in changes.items():
        set_setting(run, paths[key], value)
    return run, world_size


def measure_case(name: str) -> dict[str, float]:
    return measure(build_run(name)[0])


@pytest.mark.distributed
@pytest.mark.parametrize("name", CASES)
def test_estimate_is_what_is_allocated(name: str) -> None:
    run, world_size = build_run(name)
    ranks = run_distributed(measure_case, world_size, name)
    pack = replace(longest_pack(run), labels=full_batch(run, 0).num_label_tokens)
    stages = estimate_memory(run, world_size, pack)
    for stage, estimate in enumerate(stages):
        measured = ranks[stage * world_size // len(stages)]
        for kind in ("weights", "gradients", "optimizer"):
            assert getattr(estimate, kind) == pytest.approx(measured[kind], rel=0.005), kind
        kept = estimate.activations + estimate.logits + estimate.recomputed
        print(f"| {name} | {stage} | {measured['activations']:,} | {kept:,.0f} |")
        assert kept == pytest.approx(measured["activations"], rel=0.1)
