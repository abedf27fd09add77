"""Packed training is unpacked training: the same losses and every gradient, at any layout."""

import pytest

from megatron_croc.config.run import RunConfig
from megatron_croc.data.batch import Batch
from megatron_croc.data.order.packing import pack
from megatron_croc.data.synthetic import MIXED_IMAGES, make_batch, make_sample
from megatron_croc.verification.layouts import observe as observing
from megatron_croc.verification.layouts.compare import BOUNDS, compare, row
from megatron_croc.verification.layouts.layout import Layout
from megatron_croc.verification.layouts.observe import (
    Observation,
    RankObservation,
    assemble,
    observe,
)
from tests.support.distributed import run_distributed
from tests.support.synthetic import tiny_run

SAMPLES, CAPACITY = 12, 200


def packed_step(
    run: RunConfig, step: int, *, dp_rank: int, dp_size: int, images: tuple[int, ...]
) -> list[Batch]:
    """Stands in for `make_step`: the step's samples, several in a row."""
    assert dp_size == 1
    samples = [
        make_sample(run, step * SAMPLES + n, images[n % len(images)]) for n in range(SAMPLES)
    ]
    rows = pack([len(sample.tokens.input_ids) for sample in samples], CAPACITY)
    assert len(rows) < SAMPLES / 2
    batches = [make_batch(run, [samples[i] for i in members]) for members in rows]
    assert max(batch.num_images for batch in batches) > max(images)
    return batches


def observe_rank(layout: str, packing: bool, stage: str) -> RankObservation:
    changes = {"global_batch_size": SAMPLES, "micro_batch_size": 1}
    run = Layout.parse(layout).apply(tiny_run(stage, **changes))
    if packing:
        observing.make_step = packed_step
    return observe(run, 2, MIXED_IMAGES)


def run_layout(layout: str, packing: bool, stage: str) -> Observation:
    world_size = Layout.parse(layout).world_size
    return assemble(run_distributed(observe_rank, world_size, layout, packing, stage))


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("stage", "layouts"),
    [("pretrain_croc", ("tp1", "tp2+sp", "pp2", "cp2")), ("finetune", ("tp1", "pp2"))],
)
def test_packed_training_equals_unpacked_training(stage: str, layouts: tuple[str, ...]) -> None:
    alone = run_layout("tp1", False, stage)
    assert any(gradient.any() for gradient in alone.gradients.values())
    for layout in layouts:
        difference = compare(layout, run_layout(layout, True, stage), alone)
        print(row(difference, BOUNDS["fp32"]))
        assert not difference.failures(BOUNDS["fp32"]), row(difference, BOUNDS["fp32"])
