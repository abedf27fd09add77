"""Any cut of the model or the batch gives the single process's losses, gradients and weights."""

from functools import partial

import pytest
from torch import Tensor

from megatron_croc.data.synthetic import MIXED_IMAGES
from megatron_croc.training import build
from megatron_croc.verification.layouts.compare import BOUNDS, compare, row
from megatron_croc.verification.layouts.faults import FAULTS
from megatron_croc.verification.layouts.layout import Layout, every_layout
from megatron_croc.verification.layouts.observe import (
    Observation,
    RankObservation,
    assemble,
    observe,
)
from tests.support.distributed import run_distributed
from tests.support.pipeline_sends import watched_sends
from tests.support.synthetic import tiny_run

STEPS = 3

COMPOSED = ("tp2+sp+pp2", "cp2+dp2", "pp2+vpp2")
"""Enough to meet every axis once; the full set runs on the stage that uses everything."""


def observe_layout(
    stage: str, changes: dict, name: str, fault: str | None, images: tuple[int, ...]
) -> RankObservation:
    run = Layout.parse(name).apply(tiny_run(stage, **changes))
    if fault is not None:
        FAULTS[fault][0](run)
    with watched_sends() as lost:
        observation = observe(run, STEPS, images)
    assert not any(lost), f"{name}: {sum(lost)} of {len(lost)} sends lost their memory"
    return observation


def run_layout(
    name: str,
    stage: str,
    changes: dict,
    fault: str | None = None,
    images: tuple[int, ...] = MIXED_IMAGES,
) -> tuple[str, Observation]:
    world_size = Layout.parse(name).world_size
    ranks = run_distributed(observe_layout, world_size, stage, changes, name, fault, images)
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
        (
            {"vocab_size": 511, "untie_embeddings_and_output_weights": False, "logits_chunk": 5},
            ["tp2", "tp2+sp"],
        ),
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
    ids=[
        "cp-rows",
        "tied",
        "padded",
        "victor",
        "uneven",
        "overlap",
        "selective",
        "uniform",
        "block",
    ],
)
def test_options_keep_the_numbers(changes: dict, names: list[str]) -> None:
    """Compared with one process without the options that only save time or memory."""
    only_cost = ("overlap", "recompute", "decoder_first", "logits_chunk")
    plain = {k: v for k, v in changes.items() if not k.startswith(only_cost)}
    _, alone = run_layout("tp1", "pretrain_croc", plain)
    for name in names:
        difference = compare(*run_layout(name, "pretrain_croc", changes), alone)
        assert not difference.failures(BOUNDS["fp32"]), row(difference, BOUNDS["fp32"])


@pytest.mark.distributed
def test_batches_without_any_image_do_not_hang() -> None:
    text_only = (0,)
    _, alone = run_layout("tp1", "pretrain_croc", {}, images=text_only)
    for name in ("tp2+sp", "pp2+vpp2", "cp2+dp2"):
        overlap = {"overlap_grad_reduce": True} if "dp2" in name else {}
        ours = run_layout(name, "pretrain_croc", overlap, images=text_only)
        difference = compare(*ours, alone)
        assert not difference.failures(BOUNDS["fp32"]), row(difference, BOUNDS["fp32"])


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("mask", ["causal", "prefix", "visual"])
@pytest.mark.parametrize("stage", ["pretrain_mlp", "pretrain_croc", "finetune"])
def test_every_layout_of_every_stage_and_mask(stage: str, mask: str) -> None:
    names = [layout.name for layout in every_layout(4)]
    names += ["tp2+sp+pp2+dp2"] if stage == "pretrain_croc" else []  # eight processes
    check(stage, {"attention_mask_type": mask}, names)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("stage", ["pretrain_mlp", "pretrain_croc", "finetune"])
def test_no_layout_hangs_on_text(stage: str) -> None:
    _, alone = run_layout("tp1", stage, {}, images=(0,))
    for layout in every_layout(4):
        ours = run_layout(layout.name, stage, {}, images=(0,))
        difference = compare(*ours, alone)
        assert not difference.failures(BOUNDS["fp32"]), row(difference, BOUNDS["fp32"])


def count_targets_in_flight() -> int:
    """Largest number of reconstruction targets on their way (each rank of a PP 2 run)."""
    from megatron_croc.parallel.target_channel import TargetChannel

    largest, put = [0], TargetChannel.put

    def counted(self: TargetChannel, target: Tensor) -> None:
        put(self, target)
        largest[0] = max(largest[0], len(self._in_flight))

    TargetChannel.put = counted  # type: ignore[method-assign]
    changes = {"pipeline_model_parallel_size": 2, "micro_batch_size": 1, "global_batch_size": 24}
    observe(tiny_run("pretrain_croc", **changes), 1, (1,))
    return largest[0]


@pytest.mark.distributed
def test_targets_in_flight_are_bounded_by_the_pipelines_depth() -> None:
    first, last = run_distributed(count_targets_in_flight, 2)
    assert 1 <= first <= 3  # of 24 micro-batches
    assert last == 0


@pytest.mark.distributed
@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_seen(fault: str) -> None:
    _, alone = run_layout("tp1", "pretrain_croc", {})
    name = FAULTS[fault][1]
    difference = compare(*run_layout(name, "pretrain_croc", {}, fault), alone)
    assert difference.failures(BOUNDS["fp32"]), row(difference, BOUNDS["fp32"])


def observe_small_buckets(changes: dict, images: tuple[int, ...]) -> RankObservation:
    """Every parameter in a bucket of its own, gathered while the forward pass runs."""
    build.DistributedDataParallelConfig = partial(  # type: ignore[misc,assignment]
        build.DistributedDataParallelConfig, bucket_size=1
    )
    overlap = {"overlap_grad_reduce": True, "overlap_param_gather": True}
    run = Layout.parse("dp2").apply(tiny_run("pretrain_croc", **changes, **overlap))
    return observe(run, STEPS, images)


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("changes", "images"),
    [({}, MIXED_IMAGES), ({}, (0,) * len(MIXED_IMAGES)), ({"freeze_ViT": False}, MIXED_IMAGES)],
    ids=["mixed", "text", "trained tower"],
)
def test_every_parameter_is_gathered_before_it_is_read(
    changes: dict, images: tuple[int, ...]
) -> None:
    _, alone = run_layout("tp1", "pretrain_croc", changes, images=images)
    ours = assemble(run_distributed(observe_small_buckets, 2, changes, images))
    difference = compare("dp2", ours, alone)
    assert not difference.failures(BOUNDS["fp32"]), row(difference, BOUNDS["fp32"])
