"""`croc plan --replay`: real layouts rehearsed, and steps unrolled from real schedules."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_croc.cli import plan
from megatron_croc.rehearsal import cache
from megatron_croc.rehearsal.job import Rows
from megatron_croc.rehearsal.prediction import step_of
from megatron_croc.rehearsal.run import Rehearsal, children_at_once, perform_all
from megatron_croc.rehearsal.trace import Compute, Memory, Trace
from megatron_croc.rehearsal.trace_file import read_trace
from megatron_croc.rehearsal.unrolled import (
    NoSteadyStateError,
    micro_batches_to_record,
    storages_numbered,
    unrolled,
)
from tests.functional.test_rehearse import TINY, parse

OVERLAP = ("--overlap-grad-reduce", "--overlap-param-gather")
PP2 = ("--pipeline-model-parallel-size", "2")

SCHEDULES = {
    "pp2 vpp2": ((*PP2, "--virtual-pipeline-model-parallel-size", "2"), 4, 14),
    "dp2": ((), 2, 8),
}
"""Name -> flags, number of ranks, micro-batches."""


NOT_UNROLLED = pytest.mark.xfail(
    raises=NoSteadyStateError,
    strict=True,
    reason="interleaved and overlapped, no two periods are equal; the planner names the layout",
)


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize("name", [pytest.param("pp2 vpp2", marks=NOT_UNROLLED), "dp2"])
def test_unrolled_steps_are_those_of_real_schedules(name: str, tmp_path: Path) -> None:
    """With overlap: the first micro-batch gathers weights, the last one reduces gradients."""
    flags, world_size, many = SCHEDULES[name]
    run = parse([*TINY, "2", *flags, *OVERLAP])
    replicas = run.parallel.data_parallel_size(world_size)
    few = micro_batches_to_record(run.parallel, many)
    assert few < many
    rehearsals: dict[int, Rehearsal] = {}
    for count in (few, many):
        folder = tmp_path / f"{count}"
        folder.mkdir()
        training = replace(run.training, global_batch_size=count * replicas)
        rehearsals[count] = Rehearsal(
            run=replace(run, training=training),
            world_size=world_size,
            gpu="h100",
            rows=Rows(kind="mean", text_tokens=30.0),
            folder=folder,
            step_only=True,
        )
    jobs = list(rehearsals.values())
    perform_all(jobs, at_once=children_at_once(None), time_limit=900.0, tell=print)

    def steps(count: int) -> list[Trace]:
        return [step_of(read_trace(o.trace)) for o in rehearsals[count].outcomes]

    for short, long in zip(steps(few), steps(many), strict=True):
        events = unrolled(short, wanted=many).events
        ours = [event for event in events if not isinstance(event, Memory)]
        real = [e for e in storages_numbered(long.events) if not isinstance(e, Memory)]
        # Handles are counted from the begin of the trace, in which more came before.
        pairs = zip(numbers_from_the_step(ours), numbers_from_the_step(real), strict=True)
        assert [pair for pair in pairs if not are_alike(*pair)] == []


def are_alike(ours: Any, real: Any) -> bool:
    """Equal, but for small kernels: before and after the passes there are a few per micro-batch."""
    if isinstance(ours, Compute) and isinstance(real, Compute):
        is_small = ours.operation == "elementwise" and abs(ours.moved - real.moved) < 2**15
        return ours == real or (is_small and ours.operation == real.operation)
    return ours == real


def numbers_from_the_step(events: list[Any]) -> list[Any]:
    """The events with handles and recorded events numbered in the order in which they appear."""
    seen: dict[tuple[str, int], int] = {}
    found = []
    for event in events:
        changes = {
            key: seen.setdefault((kind, number), len(seen))
            for key, kind in (("work", "work"), ("number", "event"), ("recorded", "event"))
            if (number := getattr(event, key, None)) is not None
        }
        found.append(replace(event, **changes) if changes else event)
    return found


@pytest.mark.distributed
def test_the_best_layouts_are_rehearsed(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setattr(plan, "NUM_SHOWN", 2)
    monkeypatch.setattr(cache, "cache_folder", lambda: tmp_path)  # of times; not of the shim
    words = [*TINY, "16", "--gpus", "2", "--replay", "--json", "--text-tokens", "30"]
    assert plan.main(words) == 0
    captured = capsys.readouterr()
    rows = json.loads(captured.out)
    times = [row["replay"]["seconds"] for row in rows]
    assert len(rows) == 2 and 0 < times[0] <= times[1]
    for row in rows:
        assert sum(row["replay"]["parts"].values()) == pytest.approx(row["replay"]["seconds"])
        assert row["layout"] in captured.err
    assert plan.main(words) == 0  # from the cache: no child is started
    captured = capsys.readouterr()
    assert json.loads(captured.out) == rows
    assert captured.err == "2 of 2 layouts were replayed before\n"
