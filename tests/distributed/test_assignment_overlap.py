"""Matching the next micro-batch early changes when things are computed, and no bit of them."""

import logging

import pytest
import torch

from megatron_croc.data.synthetic import MIXED_IMAGES
from megatron_croc.verification.layouts.layout import Layout
from megatron_croc.verification.layouts.observe import RankObservation, observe
from tests.support.distributed import run_distributed
from tests.support.synthetic import tiny_run


def observe_overlap(
    name: str, changes: dict, images: tuple[int, ...]
) -> tuple[RankObservation, int, int, list[str]]:
    """The run, micro-batches matched early, the most embedded at once, and what was said."""
    from megatron_croc.model.croc_model import CrocModel
    from megatron_croc.model.prompt_pool import PromptPool

    start, forward = PromptPool.start_matching, CrocModel.forward
    early, most, said = [], [0], []

    def watched_start(self, *args, ahead=False):
        early.extend([1] if ahead else [])
        return start(self, *args, ahead=ahead)

    def watched_forward(self, inputs, upcoming, context):
        output = forward(self, inputs, upcoming, context)
        most[0] = max(most[0], int(context.embedded_ahead is not None))
        return output

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    logging.getLogger("megatron_croc").addHandler(Listener())
    PromptPool.start_matching, CrocModel.forward = watched_start, watched_forward
    seen = observe(Layout.parse(name).apply(tiny_run(**changes)), 2, images)
    return seen, len(early), most[0], [line for line in said if "not overlapped" in line]


def run_both(name: str, changes: dict, images: tuple[int, ...]):
    size = Layout.parse(name).world_size
    on = {**changes, "overlap_assignment": True}
    off = {**changes, "overlap_assignment": False}
    return (
        run_distributed(observe_overlap, size, name, on, images),
        run_distributed(observe_overlap, size, name, off, images),
    )


def check_same_bits(ours: RankObservation, plain: RankObservation) -> None:
    assert ours.steps == plain.steps
    for mine, theirs in ((ours.gradients, plain.gradients), (ours.weights, plain.weights)):
        assert len(mine) == len(theirs) > 0
        for one, other in zip(mine, theirs, strict=True):
            assert one[:-1] == other[:-1] and torch.equal(one[-1], other[-1]), one[0]


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("tp1", {}),
        ("tp2+sp", {}),
        ("cp2", {}),
        ("pp2", {}),
        ("pp2+vpp2", {}),
        ("dp2", {"overlap_grad_reduce": True, "overlap_param_gather": True}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_any_layout_gives_the_same_bits(name: str, changes: dict) -> None:
    ranks = run_both(name, changes, (1, 2))
    for (ours, *_), (plain, none_early, *_) in zip(*ranks, strict=True):
        check_same_bits(ours, plain)
        assert none_early == 0
    # All but the first micro-batch of both steps; only one at a time is held.
    first = ranks[0][0]
    num_microbatches = 2 if name == "dp2" else 4
    assert first[1:3] == (2 * (num_microbatches - 1), 1)


@pytest.mark.distributed
def test_batches_with_and_without_images() -> None:
    for images in (MIXED_IMAGES, (0,)):
        ((ours, *_),), ((plain, *_),) = run_both("tp1", {}, images)
        check_same_bits(ours, plain)


@pytest.mark.distributed
def test_a_trained_tower_is_not_run_ahead_and_that_is_said() -> None:
    ((ours, early, _, said),), ((plain, *_, nothing),) = run_both(
        "tp1", {"freeze_ViT": False}, (1,)
    )
    check_same_bits(ours, plain)
    assert early == 0 and len(said) == 1 and not nothing
