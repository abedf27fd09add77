"""Changes by training do not change a share that is not written yet."""

from pathlib import Path

import pytest
import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor

from megatron_croc.checkpoint.writer import Share


@pytest.mark.parametrize("is_live", [True, False])
def test_live_tensors_are_copied_and_others_are_not(pg_collection, tmp_path: Path, is_live: bool):
    weight = torch.ones(4, 4)
    content = {"model0": {"weight": ShardedTensor.from_rank_offsets("weight", weight)}}
    share = Share(content, tmp_path, live=[weight] if is_live else [])
    weight.zero_()
    ((_, _, (_, ((_, kept),))),) = share.buckets
    assert kept.sum().item() == (16 if is_live else 0)
