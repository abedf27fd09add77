"""Any cut of the model or the batch gives the single process's losses, gradients and weights."""

import pytest
from layout_parity.compare import BOUNDS, compare, row
from layout_parity.faults import FAULTS
from layout_parity.layout import Layout, every_layout
from layout_parity.observe import Observation, RankObservation, assemble, observe

from tests.support.distributed import run_distributed
from tests.support.synthetic import tiny_run

STEPS = 3

COMPOSED = ("tp2+sp+pp2", "cp2+dp2", "pp2+vpp2")
"""Enough to meet every axis once; the full set runs on the stage that uses everything."""


def observe_layout(stage: str, changes: dict, name: str, fault: str | None) -> RankObservation:
    run = Layout.parse(name).apply(tiny_run(stage, **changes))
    if fault is not None:
        FAULTS[fault][0](run)
    return observe(run, STEPS)


def run_layout(
    name: str, stage: str, changes: dict, fault: str | None = None
) -> tuple[str, Observation]:
    world_size = Layout.parse(name).world_size
    ranks = run_distributed(observe_layout, world_size, stage, changes, name, fault)
    for rank in ranks:  # metrics are the same on every rank
        assert rank.steps == ranks[0].steps
    return name, assemble(ranks)


def check(stage: str, changes: dict, names: list[str]) -> None:
    _, alone = run_layout("tp1", stage, changes)
    assert any(gradient.any() for gradient in alone.gradients.values())
    failures = []
    for name in names:
        difference = compare(*run_layout(name, stage, changes), alone)
        if difference.failures(BOUNDS["fp32"]):
            failures.append(row(difference, BOUNDS["fp32"]))
    assert not failures, "\n".join(failures)


@pytest.mark.distributed
@pytest.mark.parametrize("half", [0, 1])
def test_every_layout_of_the_stage_that_uses_everything(half: int) -> None:
    check("pretrain_croc", {}, [layout.name for layout in every_layout(4)][half::2])


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("stage", "mask"),
    [
        ("pretrain_mlp", "causal"),
        ("pretrain_croc", "prefix"),
        ("finetune", "causal"),
        ("finetune", "visual"),
    ],
)
def test_other_stages_and_masks(stage: str, mask: str) -> None:
    check(stage, {"attention_mask_type": mask}, list(COMPOSED))


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("changes", "names"),
    [
        # One query group: heads do not divide by CP, so keys and values are gathered instead.
        ({"num_query_groups": 1}, ["cp2", "cp2+pp2"]),
        ({"untie_embeddings_and_output_weights": False}, ["pp2", "tp2+pp2"]),
        ({"add_qkv_bias": True, "reconstruction_head": "linear", "freeze_ViT": False}, ["tp2+sp"]),
        ({"decoder_first_pipeline_num_layers": 1}, ["pp2"]),
        ({"overlap_grad_reduce": True, "overlap_param_gather": True}, ["dp2", "pp2+dp2"]),
        ({"recompute_granularity": "selective"}, ["tp2+sp"]),
        ({"recompute_granularity": "full"}, ["pp2", "cp2"]),
        (
            {
                "recompute_granularity": "full",
                "recompute_method": "block",
                "freeze_ViT": False,
                "recompute_vision": True,
            },
            ["tp2+sp"],
        ),
    ],
    ids=["cp-rows", "tied", "victor", "uneven", "overlap", "selective", "uniform", "block"],
)
def test_options_keep_the_numbers(changes: dict, names: list[str]) -> None:
    """Compared with one process without the options that only save time or memory."""
    only_cost = ("overlap", "recompute", "decoder_first")
    plain = {k: v for k, v in changes.items() if not k.startswith(only_cost)}
    _, alone = run_layout("tp1", "pretrain_croc", plain)
    for name in names:
        difference = compare(*run_layout(name, "pretrain_croc", changes), alone)
        assert not difference.failures(BOUNDS["fp32"]), row(difference, BOUNDS["fp32"])


@pytest.mark.distributed
@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_seen(fault: str) -> None:
    _, alone = run_layout("tp1", "pretrain_croc", {})
    name = FAULTS[fault][1]
    difference = compare(*run_layout(name, "pretrain_croc", {}, fault), alone)
    assert difference.failures(BOUNDS["fp32"]), row(difference, BOUNDS["fp32"])
