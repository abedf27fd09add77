"""Timelines of hand-made traces against times worked out by hand."""

import json
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_croc.rehearsal.replay.chrome_trace import write_chrome_trace
from megatron_croc.rehearsal.replay.picture import draw_timeline
from megatron_croc.rehearsal.replay.replay import replay
from megatron_croc.rehearsal.trace import Collective, Compute, Event, HostRead, Mark, Memory, Wait
from tests.support.traces import (
    FixedCosts,
    make_traces,
    one_forward_one_backward,
    receive,
    run_traces,
    send,
)


def pipeline(stages: int, count: int, **more: float) -> dict[int, list[Event]]:
    """1F1B with a forward pass of 1 s and a backward pass of 2 s."""
    times = {"forward": 1.0, "backward": 2.0, **more}
    return {s: one_forward_one_backward(s, stages, count, **times) for s in range(stages)}


@pytest.mark.parametrize(("stages", "count"), [(2, 1), (2, 4), (4, 8), (4, 2), (8, 16)])
def test_equal_stages_have_the_bubble_of_the_formula(stages: int, count: int) -> None:
    groups = {"pp": [list(range(stages))]}
    timeline = run_traces(pipeline(stages, count), groups=groups, pp=stages).timeline
    assert timeline.seconds == pytest.approx(3.0 * (count + stages - 1))
    assert timeline.compute == pytest.approx(3.0 * count)
    assert timeline.bubble / timeline.seconds == pytest.approx((stages - 1) / (count + stages - 1))
    assert not timeline.host and not timeline.exposed and not timeline.waits
    for rank in timeline.ranks:
        assert rank.compute + rank.bubble == pytest.approx(timeline.seconds)


def test_a_slow_stage_and_transfers_that_take_time() -> None:
    events = pipeline(2, 4)
    events[1] = one_forward_one_backward(1, 2, 4, forward=2.0, backward=4.0)
    timeline = run_traces(events, groups={"pp": [[0, 1]]}, pp=2).timeline
    # 1 s until stage 1 begins, 4 x 6 s there, 2 s for the last backward pass of stage 0.
    assert timeline.seconds == pytest.approx(1 + 24 + 2)
    stage, ratio = timeline.longest_over_mean("pp")
    assert (stage, ratio) == (1, pytest.approx(24 / 18))
    costs = FixedCosts(each_transfer=0.25)
    slower = run_traces(pipeline(2, 1), costs=costs, groups={"pp": [[0, 1]]}, pp=2).timeline
    assert slower.seconds == pytest.approx(1 + 0.25 + 3 + 0.25 + 2)
    assert slower.exposed["pp"] == pytest.approx(0.5)
    assert slower.bubble == pytest.approx((3 + 3) / 2)


def gradients(*, overlap: bool) -> list[Event]:
    """Four buckets of a backward pass, each reduced on its own or all at the end."""
    backward = [Compute(flops=1.0) for _ in range(4)]
    reduces = [Collective(kind="reduce_scatter", group="dp", work=n) for n in range(4)]
    waits = [Wait(work=n) for n in range(4)]
    if overlap:
        return [e for pair in zip(backward, reduces, strict=True) for e in pair] + waits
    return [*backward, *(replace(r, work=None) for r in reduces)]


def test_exposed_communication_with_and_without_overlap() -> None:
    def time(seconds: float, *, overlap: bool):
        events = {rank: gradients(overlap=overlap) for rank in range(2)}
        costs = FixedCosts(each_collective=seconds)
        return run_traces(events, costs=costs, groups={"dp": [[0, 1]]}, dp=2).timeline

    assert time(0.5, overlap=False).exposed == {"dp": pytest.approx(2.0)}
    assert time(0.5, overlap=True).exposed == {"dp": pytest.approx(0.5)}  # the last bucket's
    assert time(0.5, overlap=True).seconds == pytest.approx(4.5)
    # The communicator is busy from the first bucket on: 1 + 4 x 2 s, of which 3 s are hidden.
    assert time(2.0, overlap=True).exposed == {"dp": pytest.approx(5.0)}
    assert time(2.0, overlap=True).seconds == pytest.approx(9.0)


def test_a_host_that_reads_the_device_cannot_run_ahead() -> None:
    kernels = [Compute(flops=1.0, kernels=10)] * 3
    ahead = [*kernels, HostRead(), *kernels]
    costs = FixedCosts(launch=0.01)

    def seconds(events: list[Event]) -> float:
        return run_traces({0: events}, costs=costs, groups={}).timeline.seconds

    assert seconds(kernels * 2) == pytest.approx(6.0)
    assert seconds(ahead) == pytest.approx(6.0)
    # Behind the read a kernel of no length waits for its own launch.
    small = [Compute(flops=0.0, kernels=10)]
    assert seconds([*kernels, *small]) == pytest.approx(3.0)
    assert seconds([*kernels, HostRead(), *small]) == pytest.approx(3.1)
    bound = run_traces({0: [Compute(flops=0.02, kernels=10)]}, costs=costs, groups={}).timeline
    assert (bound.compute, bound.host) == (pytest.approx(0.02), pytest.approx(0.08))


def replicas(size: int) -> dict[int, list[Event]]:
    """Replicas of two micro-batches whose gradients meet."""
    reduce = Collective(kind="all_reduce", group="dp", bytes=8)
    batch = [
        Mark(micro_batch=0, direction="forward"),
        Compute(flops=1.0, part="language_model"),
        Mark(micro_batch=1, direction="forward"),
        Compute(flops=1.0, part="language_model"),
        Compute(flops=1.0, part="vision_tower"),
        Mark(phase="gradients"),
        reduce,
    ]
    return {rank: batch for rank in range(size)}


def test_a_replica_with_longer_samples_makes_the_others_wait() -> None:
    traces = make_traces({0: replicas(1)[0]}, groups={"dp": [[0, 1]]}, stands_for={0: (0, 1)}, dp=2)
    equal = replay(traces, FixedCosts()).timeline
    assert equal.seconds == pytest.approx(3.0) and len(equal.ranks) == 1
    own = [{"language_model": 200.0}, {"language_model": 100.0, "vision_tower": 1.0}]
    longer = [{"language_model": 300.0}, {"language_model": 200.0, "vision_tower": 3.0}]
    timeline = replay(traces, FixedCosts(), loads=[own, longer]).timeline
    assert timeline.seconds == pytest.approx(1.5 + 2.0 + 3.0)
    assert timeline.waits == {"dp": pytest.approx(3.5 / 2)}
    assert timeline.longest_over_mean("dp") == (1, pytest.approx(6.5 / 4.75))


def test_equal_ranks_are_simulated_once() -> None:
    """1,024 ranks: as many as differ are simulated, and the time is that of all of them."""
    stages, others = 4, 256
    rank = {"tp": 2, "dp": 128}
    world = stages * others
    pp_groups = [[r + others * s for s in range(stages)] for r in range(others)]
    groups = {
        "pp": pp_groups,
        "dp": [[s * others + t + 2 * d for d in range(128)] for s in range(stages) for t in (0, 1)],
        "tp": [[r, r + 1] for r in range(0, world, 2)],
    }
    events = {}
    for stage, its in pipeline(stages, 4).items():
        moved = [
            replace(e, transfers=tuple(replace(t, peer=t.peer * others) for t in e.transfers))
            if hasattr(e, "transfers")
            else e
            for e in its
        ]
        sums = [Collective(kind="all_reduce", group=g, bytes=4) for g in ("tp", "dp")]
        events[stage * others] = [*moved, *sums]
    stands_for = {s * others: range(s * others, (s + 1) * others) for s in range(stages)}
    traces = make_traces(events, groups=groups, stands_for=stands_for, pp=stages, **rank)
    costs = FixedCosts(each_collective=0.5, each_transfer=0.1)
    result = replay(traces, costs)
    assert not result.faults and len(result.timeline.ranks) == stages
    assert sum(rank.stands_for for rank in result.timeline.ranks) == world
    # Loads that differ in name only: all replicas are simulated, and nothing changes.
    loads = [[{f"part {replica}": 1.0}] * 4 for replica in range(128)]
    whole = replay(traces, costs, loads=loads)
    assert not whole.faults and len(whole.timeline.ranks) == stages * 128
    assert whole.timeline.seconds == pytest.approx(result.timeline.seconds)
    assert whole.timeline.bubble == pytest.approx(result.timeline.bubble)
    assert whole.timeline.exposed == pytest.approx(result.timeline.exposed)


def test_ranks_that_exchange_along_an_axis_are_all_simulated() -> None:
    ring = [send(1, group="cp", work=1), receive(3, group="cp"), Wait(work=1)]
    both = replace(ring[0], transfers=(*ring[0].transfers, *ring[1].transfers))
    everyone = {0: (0, 1, 2, 3)}
    groups = {"cp": [[0, 1, 2, 3]]}
    traces = make_traces({0: [both, ring[2]]}, groups=groups, stands_for=everyone, cp=4)
    result = replay(traces, FixedCosts(each_transfer=1.0))
    assert len(result.timeline.ranks) == 4


def test_files_and_words(tmp_path: Path) -> None:
    events = pipeline(2, 3)
    events[0] += [Memory(allocated=3 << 30), Memory(allocated=1 << 30)]
    costs = FixedCosts(each_transfer=0.25)
    timeline = run_traces(events, costs=costs, groups={"pp": [[0, 1]]}, pp=2).timeline
    write_chrome_trace(tmp_path / "trace.json", timeline)
    rows = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    kernels = [row for row in rows if row["ph"] == "X" and row["cat"] == "compute"]
    assert sum(row["dur"] for row in kernels) == pytest.approx(2 * 3 * 3.0 * 1e6)
    names = [row["args"]["name"] for row in rows if row["name"] == "process_name"]
    assert names == ["rank 0 (pp 0, dp 0, cp 0, tp 0)", "rank 1 (pp 1, dp 0, cp 0, tp 0)"]
    assert any(row["ph"] == "C" and row["args"]["allocated"] == 3.0 for row in rows)
    assert any(row["name"].startswith("waits: receive from rank 0") for row in rows)
    picture = ElementTree.fromstring(draw_timeline(timeline, title="a < b"))
    texts = [element.text for element in picture.iter("{http://www.w3.org/2000/svg}text")]
    assert "stage 1, rank 1" in texts and texts.count("2") == 4  # both directions of both stages
    assert f"a < b: {timeline.seconds:.4g} s a step" in (texts[0] or "")
    text = "\n".join(timeline.lines())
    assert "predicted step" in text and "bubble" in text and "made up" in text
    json.dumps(timeline.as_dict())
