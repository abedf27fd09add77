"""Objects, tensors and reconstruction targets between two processes."""

import pytest
import torch

from megatron_croc.config.parallel import ParallelConfig
from tests.support.distributed import run_distributed


def exchange() -> dict:
    """Everything that is sent within a tensor-parallel pair (on each rank)."""
    from megatron_croc.parallel.broadcast import broadcast_object, broadcast_tensor, is_source
    from megatron_croc.parallel.groups import start_distributed

    pg = start_distributed(ParallelConfig(tensor_model_parallel_size=2), seed=1)
    first = pg.tp.rank() == 0

    def mine(value):
        return value if first else None

    objects = [
        broadcast_object(mine(value), pg.tp)
        for value in (
            {"a": [1, "text"], "t": torch.arange(5)},
            None,
            "x" * 100_000,
            ValueError("no"),
        )
    ]
    tensors = []
    for shape in ((2, 3), (0, 3), (4,)):
        sent = torch.arange(torch.Size(shape).numel()).reshape(shape).to(torch.uint8)
        received = broadcast_tensor(mine(sent), shape, dtype=torch.uint8, group=pg.tp)
        tensors.append(received.tolist())
    wrong = None
    if first:
        try:
            broadcast_tensor(torch.zeros(3), (4,), dtype=torch.float32, group=pg.dp)
        except AssertionError:
            wrong = "refused"
    alone = (
        broadcast_object("kept", pg.dp),
        broadcast_tensor(torch.ones(2), (2,), dtype=torch.float32, group=pg.dp).tolist(),
    )
    return {
        "source": is_source(pg.tp),
        "object": (objects[0]["a"], objects[0]["t"].tolist()),
        "others": (objects[1], len(objects[2]), str(objects[3]), type(objects[3]).__name__),
        "tensors": tensors,
        "wrong": wrong,
        "alone": alone,
    }


@pytest.mark.distributed
def test_every_rank_has_what_the_first_one_had():
    results = run_distributed(exchange, 2)
    assert [result["source"] for result in results] == [True, False]
    for result in results:
        assert result["object"] == ([1, "text"], [0, 1, 2, 3, 4])
        assert result["others"] == (None, 100_000, "no", "ValueError")
        assert result["tensors"] == [[[0, 1, 2], [3, 4, 5]], [], [0, 1, 2, 3]]
        assert result["alone"] == ("kept", [1.0, 1.0])  # a group of one sends nothing
    assert results[0]["wrong"] == "refused"  # rather than a hang or garbage on the other side


IMAGES = (2, 0, 1, 0, 0, 3, 1)
"""Images of each micro-batch."""


def send_targets(stages: int) -> list:
    """Seven micro-batches through the channel, twice; what the last stage got, flattened."""
    from megatron_croc.parallel.groups import start_distributed
    from megatron_croc.parallel.target_channel import TargetChannel

    pg = start_distributed(ParallelConfig(pipeline_model_parallel_size=stages), seed=1)
    channel = TargetChannel(pp=pg.pp, ends=pg.embd)
    received = []
    for step in range(2):
        for number, images in enumerate(IMAGES):
            if pg.pp.rank() == 0:
                target = torch.full((images, 4, 2), 100.0 * step + number)
                channel.put(target.transpose(1, 2))  # as it comes: not contiguous
        for images in IMAGES:
            if pg.pp.rank() == stages - 1:
                shape = (images, 2, 4)
                got = channel.get(shape, dtype=torch.float32, device=torch.device("cpu"))
                received.append((tuple(got.shape), got.flatten().tolist()))
        channel.flush()
    return received


@pytest.mark.distributed
@pytest.mark.parametrize("stages", [1, 2, 3])
def test_targets_arrive_in_order_past_empty_micro_batches(stages):
    results = run_distributed(send_targets, stages, stages)
    expected = [
        ((images, 2, 4), [100.0 * step + number] * (8 * images))
        for step in range(2)
        for number, images in enumerate(IMAGES)
    ]
    assert results[-1] == expected
    assert all(not received for received in results[:-1])  # middle stages never see one
