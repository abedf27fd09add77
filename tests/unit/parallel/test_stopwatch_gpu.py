"""The stopwatch on a real device: times are the stream's, not the host's."""

import pytest
import torch

from megatron_croc.parallel.device import synchronize
from megatron_croc.parallel.stopwatch import Stopwatch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_work_counts_where_it_was_queued():
    factor = torch.randn(4096, 4096, device="cuda")
    factor @ factor
    synchronize()
    watch = Stopwatch()
    watch.start("forward")
    for _ in range(50):
        factor @ factor
    watch.stop("forward")
    watch.start("vision")
    watch.stop("vision")
    seconds = watch.read()
    # Queued, not yet done, when the region was left; nothing was queued in the other.
    assert seconds["forward"] > 20 * seconds["vision"]
