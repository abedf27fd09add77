"""Loads of the replicas are those of the rows that each would rehearse."""

from dataclasses import replace

from megatron_croc.recipes import get_recipe
from megatron_croc.rehearsal.job import Rows
from megatron_croc.rehearsal.loads import replica_loads
from megatron_croc.rehearsal.rows import make_rows


def test_loads_of_drawn_rows() -> None:
    run = get_recipe("tiny/finetune")
    run = replace(run, training=replace(run.training, micro_batch_size=2, global_batch_size=12))
    rows = Rows(kind="drawn", text_tokens=30.0, images=0.7)
    loads = replica_loads(run, rows, dp_size=3)
    assert loads is not None and [len(its) for its in loads] == [2, 2, 2]
    for replica, its in enumerate(loads):
        batches = make_rows(run, rows, dp_rank=replica, dp_size=3)
        for load, batch in zip(its, batches, strict=True):
            assert load["vision_tower"] == load["projector"] == batch.num_images
            padding = batch.mixed_mask.length - load["language_model"]
            assert 0 <= padding < 8  # the pack is padded to a multiple
    assert len({load["language_model"] for its in loads for load in its}) > 1


def test_equal_rows_have_no_loads() -> None:
    assert replica_loads(get_recipe("tiny/finetune"), Rows(kind="longest"), dp_size=2) is None
