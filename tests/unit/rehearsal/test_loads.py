"""Loads of the replicas are those of the rows that each would rehearse."""

from dataclasses import replace
from pathlib import Path

import pytest

from megatron_croc.config.run import RunConfig
from megatron_croc.data.demo.small import write_demo
from megatron_croc.planning.workload import from_numbers
from megatron_croc.recipes import get_recipe
from megatron_croc.rehearsal.job import Rows
from megatron_croc.rehearsal.loads import replica_loads
from megatron_croc.rehearsal.rows import make_rows
from megatron_croc.rehearsal.sizes import Loads, drawn_loads, load_of_samples, step_sizes
from tests.unit.data.small_samples import measure_lengths

REPLICAS = 3


def tiny(**data) -> RunConfig:
    run = get_recipe("tiny/finetune")
    run = replace(run, training=replace(run.training, micro_batch_size=2, global_batch_size=12))
    return replace(run, data=replace(run.data, **data))


def check(run: RunConfig, rows: Rows) -> Loads:
    """Loads are the sizes of the batches that each replica makes."""
    loads = replica_loads(run, rows, dp_size=REPLICAS)
    assert loads is not None and [len(its) for its in loads] == [2] * REPLICAS
    for replica, its in enumerate(loads):
        batches = make_rows(run, rows, dp_rank=replica, dp_size=REPLICAS)
        for load, batch in zip(its, batches, strict=True):
            assert load["vision_tower"] == load["projector"] == batch.num_images
            padding = batch.mixed_mask.length - load["language_model"]
            assert 0 <= padding < 8  # the pack is padded to a multiple
    assert len({load["language_model"] for its in loads for load in its}) > 1
    return loads


@pytest.mark.parametrize("balance", [None, REPLICAS])
def test_loads_of_drawn_rows(balance: int | None) -> None:
    check(tiny(balance_replicas=balance), Rows(kind="drawn", text_tokens=30.0, images=0.7))


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_demo(tmp_path_factory.mktemp("demo"), ("finetune",), num_images=40)


def test_loads_of_stored_lengths(demo: Path) -> None:
    tokenizer = str(demo / "tokenizer.model")
    run = tiny(data_path=(str(demo / "finetune"),), tokenizer_model=tokenizer)
    rows = Rows(kind="data")
    assert replica_loads(run, rows, dp_size=REPLICAS) is None  # no lengths are stored yet
    measure_lengths(str(demo / "finetune"), tokenizer, run.data.conversation_template)
    drawn = check(run, rows)
    # Balanced steps are of other samples, and dealt to the replicas by cost, not in their order.
    assert check(replace(run, data=replace(run.data, balance_replicas=REPLICAS)), rows) != drawn


def test_equal_rows_have_no_loads() -> None:
    for kind in ("longest", "mean"):
        assert replica_loads(get_recipe("tiny/finetune"), Rows(kind=kind), dp_size=2) is None


@pytest.mark.parametrize("images", [0.0, 0.4, 1.0, 1.5])
def test_mean_rows_are_as_much_work_as_drawn_ones_on_average(images: float) -> None:
    run = tiny()
    run.training.global_batch_size = 2 * 1000
    workload = from_numbers(run, text_tokens=60.0, images=images, spread=0.3)
    (mean,) = step_sizes(run, "mean", workload, dp_rank=0, dp_size=1000)
    assert len(mean) == 2
    base = load_of_samples(mean)
    drawn = [its[0] for its in drawn_loads(run, workload, 1000)]
    span = run.model.vision_tower.num_visual_tokens
    text = sum(load["language_model"] - span * load["vision_tower"] for load in drawn) / 1000
    assert base["language_model"] - span * base["vision_tower"] == pytest.approx(text, rel=0.03)
    assert abs(base["vision_tower"] - 2 * images) <= 0.5
