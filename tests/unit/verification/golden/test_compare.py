"""The comparison with recorded runs, apart from the recordings (tests/golden)."""

import torch

from megatron_croc.verification.golden.run import Recorder
from tests.support.on_device import OnDevice, on_device


def test_what_a_gpu_computed_is_compared_on_the_cpu(pg_collection):
    recorder = Recorder([], pg_collection.tp)
    recorder.seen = {name: on_device(torch.ones(2, 3)) for name in ("logits", "pool_index")}
    collected = recorder.collect()
    assert set(collected) == set(recorder.seen)
    for tensor in collected.values():
        assert not isinstance(tensor, OnDevice) and torch.equal(tensor, torch.ones(2, 3))
