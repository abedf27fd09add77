"""Whole images shared over TP x CP: the single process's numbers, no work twice, one checkpoint."""

from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron_croc.convert.checkpoint_reader import CheckpointReader
from megatron_croc.model.vision_tower import VisionTower
from megatron_croc.parallel.groups import start_distributed
from megatron_croc.parallel.image_share import ImageShare
from megatron_croc.training import build
from megatron_croc.verification.layouts.compare import BOUNDS, compare, row
from megatron_croc.verification.layouts.layout import Layout, every_layout
from megatron_croc.verification.layouts.observe import RankObservation, assemble, observe
from tests.distributed.test_checkpoint import train_from
from tests.distributed.test_layouts import run_layout
from tests.support.distributed import run_distributed
from tests.support.synthetic import tiny_run

SHARED = {"split_vision": "images"}
TRAINED = {"freeze_ViT": False}

UNEVEN = (1, 0, 2, 1, 0, 0, 1, 1)
"""Micro-batches of one, three, no and two images."""


def check(changes: dict, layouts: tuple[str, ...], images: tuple[int, ...] = UNEVEN) -> None:
    """Losses, gradients and weights of one process that knows nothing of the share."""
    _, alone = run_layout("tp1", "pretrain_croc", changes, images=images)
    parts = {"vision_tower"} if "freeze_ViT" in changes else set()
    assert parts <= {name.split(".")[0] for name, g in alone.gradients.items() if g.any()}
    failures = []
    for name in layouts:
        ours = run_layout(name, "pretrain_croc", {**changes, **SHARED}, images=images)
        difference = compare(*ours, alone)
        if difference.failures(BOUNDS["fp32"]):
            failures.append(row(difference, BOUNDS["fp32"]))
    assert not failures, "\n".join(failures)


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("changes", "layouts"),
    [
        ({}, ("tp2+sp", "pp2+vpp2+cp2")),
        (TRAINED, ("tp2", "tp2+sp", "cp2", "tp2+cp2", "tp2+pp2", "tp2+dp2")),
        ({**TRAINED, "recompute_vision": True}, ("tp2+sp+cp2",)),
    ],
    ids=["frozen", "trained", "recomputed"],
)
def test_shared_images_keep_every_number(changes: dict, layouts: tuple[str, ...]) -> None:
    check(changes, layouts)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("changes", [{}, TRAINED], ids=["frozen", "trained"])
def test_every_layout_with_shared_images(changes: dict) -> None:
    check(changes, tuple(layout.name for layout in every_layout(4)))


def observe_small_buckets(changes: dict, images: tuple[int, ...]) -> RankObservation:
    """Every parameter in a bucket of its own, reduced and gathered as soon as it may be."""
    build.DistributedDataParallelConfig = partial(  # type: ignore[misc,assignment]
        build.DistributedDataParallelConfig, bucket_size=1
    )
    overlap = {"overlap_grad_reduce": True, "overlap_param_gather": True}
    run = Layout.parse("tp2+cp2").apply(tiny_run("pretrain_croc", **changes, **overlap))
    return observe(run, 3, images)


@pytest.mark.distributed
def test_ranks_without_images_reduce_and_gather_buckets_in_the_order_of_the_others() -> None:
    images = (1, 0, 0, 0, 2, 1, 1, 0)
    _, alone = run_layout("tp1", "pretrain_croc", TRAINED, images=images)
    ranks = run_distributed(observe_small_buckets, 4, {**TRAINED, **SHARED}, images)
    difference = compare("tp2+cp2", assemble(ranks), alone)
    assert not difference.failures(BOUNDS["fp32"]), row(difference, BOUNDS["fp32"])


def count_work(layout: str, changes: dict, images: tuple[int, ...]) -> dict[str, list[int]]:
    """Images of each call of the tower, all-reduces inside it, and weights marked as cut."""
    seen: dict[str, list[int]] = {"images": [], "all_reduces": [], "cut": []}
    forward, all_reduce = VisionTower.forward, dist.all_reduce
    reduced = [0]

    def counted(*args: object, **kwargs: object) -> object:
        reduced[0] += 1
        return all_reduce(*args, **kwargs)

    def watched(tower: VisionTower, pixels: torch.Tensor) -> torch.Tensor:
        reduced[0] = 0
        features = forward(tower, pixels)
        seen["images"].append(len(pixels))
        seen["all_reduces"].append(reduced[0])
        marks = [getattr(p, "tensor_model_parallel", False) for p in tower.parameters()]
        seen["cut"].append(sum(marks))
        return features

    VisionTower.forward, dist.all_reduce = watched, counted  # type: ignore[method-assign]
    observe(Layout.parse(layout).apply(tiny_run("pretrain_croc", **changes)), 1, images)
    return seen


@pytest.mark.distributed
def test_no_image_is_embedded_twice_and_no_layer_waits_for_others() -> None:
    heads = run_distributed(count_work, 4, "tp2+cp2", {}, UNEVEN)
    assert [rank["images"] for rank in heads] == [[1, 3, 2]] * 4  # no call without images
    assert min(heads[0]["all_reduces"]) == 2 * 2  # two of each layer
    shared = run_distributed(count_work, 4, "tp2+cp2", SHARED, UNEVEN)
    assert [rank["images"] for rank in shared] == [[1, 1, 1], [1, 1], [1], []]
    assert not any(sum(rank["all_reduces"]) for rank in shared)
    # The gradient's norm counts a marked weight once on every tensor-parallel rank.
    assert min(heads[0]["cut"]) > 0 and not any(sum(rank["cut"]) for rank in shared)


def gather_shares() -> list[str]:
    """Gather images of any number, and their gradients; return what is wrong."""
    run = Layout.parse("tp2+cp2").apply(tiny_run())
    pg = start_distributed(run.parallel, seed=1)
    share = ImageShare(pg)
    wrong = [] if share.rank == share.group.rank() else ["rank"]
    for number in range(10):
        images = torch.arange(1.0, number * 3 + 1).view(number, 3)
        own = share.own(images).clone().requires_grad_()
        everyone = share.gather(own, number)
        if not torch.equal(everyone, images):
            wrong.append(f"{number} images: {everyone}")
        # The gradient of each value comes from one context-parallel rank, equal over TP.
        mine = (images % 2 == pg.cp.rank()).float()
        (everyone * mine * images).sum().backward()
        if not torch.equal(own.grad, share.own(images)):
            wrong.append(f"gradient of {number} images: {own.grad}")
    return wrong


@pytest.mark.distributed
def test_gathered_images_are_in_order_and_gradients_go_back_once() -> None:
    assert run_distributed(gather_shares, 4) == [[]] * 4


def read(save: str, step: int) -> dict[str, torch.Tensor]:
    reader = CheckpointReader(Path(save) / f"iter_{step:07d}")
    return {key: reader.read(key) for key in reader.tensors}


@pytest.mark.distributed
def test_a_checkpoint_does_not_depend_on_the_split(tmp_path: Path) -> None:
    """Saved with one, loaded and saved with the other: the same bits, weights and optimizer."""
    heads = {"tensor_model_parallel_size": 2, **TRAINED}
    images = {**heads, **SHARED}
    there, again = str(tmp_path / "heads"), str(tmp_path / "images")
    (unbroken,) = run_distributed(train_from, 1, TRAINED, 0, 5, None, None)
    run_distributed(train_from, 2, heads, 0, 3, there, None)
    run_distributed(train_from, 2, images, 3, 3, again, there)
    saved, resaved = read(there, 3), read(again, 3)
    assert saved.keys() == resaved.keys() and any("exp_avg" in key for key in saved)
    assert [key for key in saved if not torch.equal(saved[key], resaved[key])] == []
    for changes, load in ((images, there), (heads, again)):
        for rank in run_distributed(train_from, 2, changes, 3, 5, None, load):
            for ours, reference in zip(rank["rows"], unbroken["rows"][3:], strict=True):
                assert ours == pytest.approx(reference, rel=2e-5)
