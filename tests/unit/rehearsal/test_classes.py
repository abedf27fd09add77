"""Classes of ranks: every rank in one of them, and the rehearsed rank is what its class says."""

import pytest

from megatron_croc.config.parallel import ParallelConfig
from megatron_croc.rehearsal.classes import rank_classes


@pytest.mark.parametrize(
    ("tp", "pp", "cp", "world_size", "number"),
    [(1, 1, 1, 1, 1), (1, 1, 1, 4, 2), (2, 2, 1, 4, 4), (2, 4, 2, 64, 20), (8, 4, 2, 1024, 20)],
)
def test_classes_hold_every_rank_once(
    tp: int, pp: int, cp: int, world_size: int, number: int
) -> None:
    parallel = ParallelConfig(
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        context_parallel_size=cp,
    )
    classes = rank_classes(parallel, world_size)
    assert len(classes) == number
    assert sorted(r for entry in classes for r in entry.stands_for) == list(range(world_size))
    replica = world_size // pp
    for entry in classes:
        assert entry.rank in entry.stands_for
        assert {rank // replica for rank in entry.stands_for} == {entry.place["pp"]}
    # Within the first replica, first and other ranks of an axis call different collectives.
    for entry in classes:
        if not entry.place["dp"]:
            for axis, step in (("tp", 1), ("cp", tp)):
                at = {rank // step % (tp if axis == "tp" else cp) > 0 for rank in entry.stands_for}
                assert at == {entry.place[axis] > 0}, (entry, axis)
    first = [entry for entry in classes if entry.rank % replica == 0]
    assert len(first) == pp and all(len(entry.stands_for) == 1 for entry in first)
    if tp > 1:
        last = [entry for entry in classes if entry.place["tp"] == tp - 1 and not entry.place["dp"]]
        assert len(last) == pp * min(cp, 2)
