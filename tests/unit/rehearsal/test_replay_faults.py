"""Each rule of NCCL finds its fault and names both sides; correct orders of the same calls pass."""

from dataclasses import replace

import pytest

from megatron_croc.errors import DataError
from megatron_croc.rehearsal.replay.programs import make_job
from megatron_croc.rehearsal.replay.replay import replay
from megatron_croc.rehearsal.trace import (
    Collective,
    Compute,
    Exchange,
    RecordEvent,
    Release,
    Synchronize,
    Transfer,
    Wait,
    WaitEvent,
)
from tests.support.traces import (
    FixedCosts,
    make_traces,
    one_forward_one_backward,
    receive,
    run_traces,
    send,
    unbatched,
)

PP2 = {"pp": [[0, 1]]}
TWO = {"groups": PP2, "pp": 2}


def faults(events: dict, **more: object) -> str:
    """All faults of a job of two stages, unless said otherwise."""
    return "\n".join(run_traces(events, **{**TWO, **more}).faults)  # type: ignore[arg-type]


def reduce(group: str = "tp", *, size: int = 4, place: str = "", **more: int) -> Collective:
    """An all-reduce."""
    return Collective(
        kind="all_reduce", group=group, bytes=size, dtype="float32", place=place, **more
    )


def test_a_send_that_nobody_receives() -> None:
    events = {0: [send(1, place="stage.py:10")], 1: []}
    found = faults(events)
    assert "rank 0 waits in the first use of pp of 0, 1 at stage.py:10 for rank 1" in found
    assert "rank 1 has ended its step, with nothing left to do" in found
    # The pair is connected already: the host goes on, and the send stays open on the device.
    greeting = {0: [send(1), *events[0]], 1: [receive(0)]}
    found = faults(greeting)
    assert (
        "rank 0 has ended its step, but still waits for its send to rank 1 (pp) at stage.py:10"
        in found
    )
    # gloo has buffered it: the step ends, and the message is lost.
    assert "rank 0 sends 4 bytes to rank 1 at stage.py:10, which never receives" in faults(
        greeting, backend="gloo"
    )
    assert not faults({0: [send(1)], 1: [receive(0)]})


def test_two_ranks_that_both_send_first() -> None:
    def both(order: str) -> dict:
        pairs = {
            rank: {"s": send(1 - rank, place=f"s{rank}"), "r": receive(1 - rank)} for rank in (0, 1)
        }
        return {
            rank: [unbatched(pairs[rank][x]) for x in (order if rank == 0 else order[::-1])]
            for rank in (0, 1)
        }

    assert not faults(both("sr"))  # rank 0 sends first, rank 1 receives first
    alike = {rank: [unbatched(send(1 - rank, place=f"s{rank}")), unbatched(receive(1 - rank))]
             for rank in (0, 1)}  # fmt: skip
    found = faults(alike)
    assert "deadlock: 2 of 2" in found
    assert "send to rank 1 (pp) at s0" in found and "send to rank 0 (pp) at s1" in found
    assert not faults(alike, backend="gloo")
    batch = {
        rank: [
            Exchange(
                group="pp",
                transfers=(
                    Transfer(direction="send", peer=1 - rank),
                    Transfer(direction="receive", peer=1 - rank),
                ),
            )
        ]
        for rank in (0, 1)
    }
    assert not faults(batch)


def test_a_collective_that_one_rank_leaves_out() -> None:
    groups = {"groups": {"tp": [[0, 1]]}, "pp": 1, "tp": 2}
    mine = [reduce(place="a.py:1"), reduce(place="a.py:2")]
    found = faults({0: mine, 1: mine[:1]}, **groups)
    assert (
        "rank 0 has ended its step, but still waits for its all_reduce 1 of tp at a.py:2" in found
    )
    assert "rank 1 has ended its step" in found
    # In between, the ranks then call different collectives.
    gather = Collective(kind="all_gather", group="tp", bytes=4, dtype="float32", place="b.py:9")
    found = faults({0: [mine[0], gather], 1: [gather]}, **groups)
    assert (
        "group tp of ranks 0, 1, call 0: rank 0 calls all_reduce of 4 bytes (float32) at a.py:1, "
        "rank 1 all_gather of 4 bytes (float32) at b.py:9" in found
    )
    assert not faults({0: mine, 1: mine}, **groups)


@pytest.mark.parametrize("change", [{"size": 8}, {"kind": "broadcast"}, {"dtype": "bfloat16"}])
def test_sides_of_different_kind_size_or_dtype(change: dict) -> None:
    values = {"kind": "all_reduce", "dtype": "float32", "size": 4}

    def call(place: str, kind: str, dtype: str, size: int) -> Collective:
        return Collective(kind=kind, group="pp", dtype=dtype, bytes=size, place=place)

    found = faults({0: [call("x.py:1", **values)], 1: [call("y.py:2", **{**values, **change})]})  # type: ignore[arg-type]
    assert "x.py:1" in found and "y.py:2" in found and "call 0" in found
    if "size" in change:
        found = faults(
            {0: [send(1, size=4, place="x.py:1")], 1: [receive(0, size=8, place="y.py:2")]}
        )
        assert (
            "rank 0 sends 4 bytes (float32) at x.py:1, rank 1 receives 8 bytes (float32) at y.py:2"
            in found
        )


def target_channel(*, warm: bool, synchronizes: bool) -> dict:
    """Two stages whose first sends its target beside the hidden states, as notes of old had it."""
    put = send(1, group="embd", place="target_channel.py:71", work=90)
    get = receive(0, group="embd", place="target_channel.py:85")
    shape = [send(1, work=1), Wait(work=1)]
    sync = [Synchronize(place="p2p_communication.py:242")] if synchronizes else []
    first = [unbatched(put), *shape, *sync, send(1), Wait(work=90)]
    last = [receive(0), *sync, receive(0), unbatched(get)]
    greeting = [unbatched(send(1, group="embd"))], [unbatched(receive(0, group="embd"))]
    return {0: greeting[0] * warm + first, 1: greeting[1] * warm + last}


def test_the_target_channel_s_old_order() -> None:
    groups = {"groups": {"pp": [[0, 1]], "embd": [[0, 1]]}}
    found = faults(target_channel(warm=False, synchronizes=True), **groups)
    assert (
        "rank 0 waits in the first use of embd, the pair of 0, 1 at target_channel.py:71 for rank 1"
        in found
    )
    assert "rank 1 waits in the first use of pp of 0, 1 for rank 0" in found
    found = faults(target_channel(warm=True, synchronizes=True), **groups)
    assert "rank 0 waits in synchronize (the whole device) at p2p_communication.py:242" in found
    assert "for its send to rank 1 (embd) at target_channel.py:71 with rank 1" in found
    assert not faults(target_channel(warm=True, synchronizes=False), **groups)


def test_a_circle_of_waits_names_every_rank() -> None:
    ring = {
        rank: [
            unbatched(receive((rank - 1) % 3, place=f"r{rank}")),
            unbatched(send((rank + 1) % 3, place=f"s{rank}")),
        ]
        for rank in range(3)
    }
    found = faults(ring, groups={"pp": [[0, 1, 2]]}, pp=3)
    assert "deadlock: 3 of 3" in found
    assert all(f"rank {rank} waits in" in found and f"r{rank} for" in found for rank in range(3))
    ring[0] = ring[0][::-1]
    assert not faults(ring, groups={"pp": [[0, 1, 2]]}, pp=3)


def test_groups_used_in_different_orders() -> None:
    groups = {"groups": {"tp": [[0, 1]], "world": [[0, 1]]}, "pp": 1, "tp": 2, "ready": True}
    orders = {0: [reduce(), reduce("world")], 1: [reduce("world"), reduce()]}
    assert "deadlock" in faults(orders, **groups)  # one stream: each waits for the other
    apart = {rank: [replace(e, work=n) for n, e in enumerate(its)] for rank, its in orders.items()}
    found = faults(apart, **groups)  # on streams of their own both run, if both fit the device
    assert "deadlock" not in found
    assert "ranks 0 and 1 call collectives of groups tp and world in different orders" in found


def test_a_communicator_s_operations_run_in_the_order_of_their_calls() -> None:
    long = [reduce(work=1), reduce(work=2), Wait(work=2)]
    groups = {"groups": {"tp": [[0, 1]]}, "pp": 1, "tp": 2}
    result = run_traces({0: long, 1: long}, costs=FixedCosts(each_collective=1.0), **groups)  # type: ignore[arg-type]
    assert result.timeline.seconds == 2.0


def test_streams_meet_in_events_only() -> None:
    def step(waits: bool) -> list:
        side = [RecordEvent(number=0, stream=1), WaitEvent(number=0, stream=0)] if waits else []
        return [
            Compute(flops=3.0, stream=1),
            *side,
            Compute(flops=1.0),
            Compute(flops=0.5, stream=2),
        ]

    alone = {"groups": {}, "pp": 1}
    assert run_traces({0: step(False)}, **alone).timeline.seconds == 3.0  # type: ignore[arg-type]
    assert run_traces({0: step(True)}, **alone).timeline.seconds == 4.0  # type: ignore[arg-type]


def test_memory_freed_under_an_open_send() -> None:
    release = Release(storage=7, place="schedules.py:1603")
    begun, wait = send(1, work=1, storage=7, place="send.py:5"), Wait(work=1)
    found = faults({0: [begun, release, wait], 1: [receive(0)]})
    assert "frees memory at schedules.py:1603" in found and "send to rank 1 at send.py:5" in found
    assert not faults({0: [begun, wait, release], 1: [receive(0)]})
    assert not faults({0: [begun, Synchronize(), release, wait], 1: [receive(0)]})


def test_ranks_that_see_a_group_differently() -> None:
    traces = make_traces({0: [], 1: [], 2: []}, groups={"tp": [[0, 1, 2]]}, tp=3)
    odd = make_traces({2: []}, groups={"tp": [[1, 2]]}, tp=3)
    found = replay([*traces[:2], *odd], FixedCosts()).faults
    assert len(found) == 1 and "group tp: rank 0 has ranks 0, 1, 2, rank 2 has 1, 2" in found[0]


def test_a_communicator_s_first_use_holds_the_host() -> None:
    groups = {"groups": {"a": [[0, 1]], "b": [[0, 1]]}, "pp": 1, "tp": 2}
    calls = {
        0: [reduce("a", work=1), reduce("b", work=2)],
        1: [reduce("b", work=1), reduce("a", work=2)],
    }
    found = faults(calls, ready=False, **groups)
    assert "rank 0 waits in the first use of a of 0, 1 for rank 1" in found
    assert "rank 1 waits in the first use of b of 0, 1 for rank 0" in found


def test_traces_that_do_not_make_a_job() -> None:
    traces = make_traces({0: [], 1: []}, groups={}, dp=4)
    with pytest.raises(DataError, match=r"2 ranks have no trace \(2, 3\)"):
        make_job(traces, FixedCosts())
    twice = make_traces({0: [], 1: []}, groups={}, stands_for={0: (0, 1)}, dp=2)
    with pytest.raises(DataError, match="ranks 0 and 1 both stand for rank 1"):
        make_job(twice, FixedCosts())
    with pytest.raises(DataError, match="stands for rank 9 of a world of 2"):
        make_job(make_traces({0: []}, groups={}, stands_for={0: (0, 9)}, dp=2), FixedCosts())
    with pytest.raises(DataError, match="of different jobs"):
        make_job([*traces, *make_traces({2: []}, groups={}, tp=3)], FixedCosts())
    with pytest.raises(DataError, match="uses group x, which its header lacks"):
        replay(make_traces({0: [reduce("x")]}, groups={}), FixedCosts())
    with pytest.raises(DataError, match="no trace is given"):
        replay([], FixedCosts())
    with pytest.raises(DataError, match="backend mpi"):
        replay(make_traces({0: []}, groups={}, backend="mpi"), FixedCosts())
    assert "which it has not begun" in faults({0: [Wait(work=3)], 1: []})


def test_the_real_schedule_passes() -> None:
    for stages, count in ((2, 1), (2, 4), (4, 8), (4, 2)):
        events = {s: one_forward_one_backward(s, stages, count, forward=1.0, backward=2.0)
                  for s in range(stages)}  # fmt: skip
        assert not run_traces(events, groups={"pp": [list(range(stages))]}, pp=stages).faults
