"""One reader per replica: every rank gets its batches, pixels only where needed, and its errors."""

import pytest
import torch

from megatron_croc.errors import DataError
from tests.support.distributed import run_distributed
from tests.support.synthetic import make_step, tiny_run

IMAGES = (1, 0, 0, 0, 2, 1, 0, 0)


class Reader:
    """Stub of the loader: one good step, then an error."""

    def __init__(self, batches, error):
        self.batches, self.error = iter(batches), error
        self.is_closed = False
        self.state = "after the step"

    def __next__(self):
        try:
            return next(self.batches)
        except StopIteration:
            raise self.error from None

    def close(self):
        self.is_closed = True


def feed(changes: dict, error: Exception) -> dict:
    """Two steps through the broadcaster; the second one fails in the reader."""
    from megatron_croc.parallel.groups import start_distributed
    from megatron_croc.training.batch_broadcast import open_batch_broadcast

    run = tiny_run(**changes)
    pg = start_distributed(run.parallel, seed=1)
    opened = []

    def build(run, *, dp_rank, dp_size, state):
        assert state == "before"
        batches = make_step(run, 0, dp_rank=dp_rank, dp_size=dp_size, images=IMAGES)
        opened.append(Reader(batches, error))
        return opened[-1]

    raised, states = None, []
    try:
        with open_batch_broadcast(run, pg, build, state="before") as broadcaster:
            batches = broadcaster.next_step()
            states.append(broadcaster.order_state)
            broadcaster.next_step()
    except Exception as exception:
        raised = (type(exception).__name__, str(exception))
    return {
        "pixels": [None if b.pixel_values is None else b.pixel_values.numpy() for b in batches],
        "ids": [b.input_ids.tolist() for b in batches],
        "visible": [b.mixed_mask.visible().numpy() for b in batches],
        "replaced": [b.replaced.numpy() for b in batches],
        "names": [b.sample_ids for b in batches],
        "opened": len(opened),
        "closed": [reader.is_closed for reader in opened],
        "raised": raised,
        "states": states,
        "pp_rank": pg.pp.rank(),
    }


LAYOUTS = {
    "tp2": dict(tensor_model_parallel_size=2),
    "pp2": dict(pipeline_model_parallel_size=2),
}


@pytest.mark.distributed
@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_reader_feeds_all_ranks_and_fails_on_all(layout):
    error = DataError("shard 3: sample 17 is damaged")
    results = run_distributed(feed, 2, LAYOUTS[layout], error)
    expected = make_step(tiny_run(), 0, dp_rank=0, dp_size=1, images=IMAGES)
    assert [result["opened"] for result in results] == [1, 0]
    assert results[0]["closed"] == [True]
    for result in results:
        assert result["raised"] == ("DataError", "shard 3: sample 17 is damaged")
        assert result["states"] == ["after the step"]
        assert len(result["ids"]) == 4
        for number, batch in enumerate(expected):
            assert result["ids"][number] == batch.input_ids.tolist()
            assert result["names"][number] == batch.sample_ids
            assert (result["visible"][number] == batch.mixed_mask.visible().numpy()).all()
            assert (result["replaced"][number] == batch.replaced.numpy()).all()
            pixels = result["pixels"][number]
            if result["pp_rank"] > 0:
                assert pixels is None
            else:
                assert pixels.dtype == batch.pixel_values.numpy().dtype
                assert (pixels == batch.pixel_values.numpy()).all()


@pytest.mark.distributed
def test_an_error_with_a_constructor_of_its_own_is_understood_everywhere():
    """Exceptions travel by pickle, which calls the constructor with the message alone."""
    from megatron_croc.data.bad_samples import BadSampleError

    error = BadSampleError("sample-9", "too_long", "does not fit")
    for result in run_distributed(feed, 2, LAYOUTS["tp2"], error):
        assert result["raised"][0] == "BadSampleError", result["raised"]
        assert "sample-9" in result["raised"][1] and "does not fit" in result["raised"][1]


def test_one_process_reads_for_itself(pg_collection):
    from megatron_croc.training.batch_broadcast import BatchBroadcaster

    run = tiny_run()
    batches = make_step(run, 0, dp_rank=0, dp_size=1, images=IMAGES)
    reader = Reader(batches, StopIteration())
    broadcaster = BatchBroadcaster(reader, pg_collection, num_microbatches=4, img_size=56)
    for given, batch in zip(broadcaster.next_step(), batches, strict=True):
        assert torch.equal(given.pixel_values, batch.pixel_values)
        assert given.mixed_mask is batch.mixed_mask
    with pytest.raises(StopIteration):
        broadcaster.next_step()
