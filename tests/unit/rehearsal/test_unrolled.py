"""A step of many micro-batches unrolled from a few is event for event the one that was recorded."""

import pytest

from megatron_croc.rehearsal.replay.replay import replay
from megatron_croc.rehearsal.trace import Compute, Event, Mark, Release, Wait
from megatron_croc.rehearsal.unrolled import NoSteadyStateError, unrolled
from tests.support.traces import (
    FixedCosts,
    make_traces,
    one_forward_one_backward,
    send,
)


def schedule(stage: int, stages: int, micro_batches: int) -> list[Event]:
    return [
        Mark(phase="step"),
        Compute(operation="gather weights", flops=0.5),
        *one_forward_one_backward(stage, stages, micro_batches, forward=1.0 + stage, backward=2.0),
        Mark(phase="optimizer"),
        Compute(operation="update", flops=0.25),
    ]


def traces(stages: int, micro_batches: int) -> list:
    events = {stage: schedule(stage, stages, micro_batches) for stage in range(stages)}
    return make_traces(events, groups={"pp": [list(range(stages))]}, ready=True, pp=stages)


@pytest.mark.parametrize("stages", [1, 2, 4])
def test_a_pipeline(stages: int) -> None:
    few, many = traces(stages, stages + 4), traces(stages, 23)
    longer = [unrolled(trace, wanted=23) for trace in few]
    for one, other in zip(longer, many, strict=True):
        assert list(one.events) == list(other.events)
    costs = FixedCosts(each_transfer=0.125)
    assert replay(longer, costs).timeline.seconds == replay(many, costs).timeline.seconds
    assert unrolled(few[0], wanted=stages + 4) is few[0]


def numbered(micro_batches: int, storages: list[int]) -> list[Event]:
    """Passes that use an event of before the step, and free what they sent two passes ago."""
    events: list[Event] = [Release(storage=77)]  # sent before the step
    for number in range(micro_batches):
        events.append(Mark(micro_batch=number, direction="forward"))
        events.append(Wait(work=3))  # of before the step
        address = storages[number % len(storages)]
        events.append(send(1, work=100 + number, storage=address))
        events.append(Mark(micro_batch=number, direction="backward"))
        events.append(Wait(work=100 + number))
        events.append(Release(storage=address))
    return events


def test_numbers_move_on_and_addresses_come_again() -> None:
    def trace(micro_batches: int, storages: list[int]):
        events = {0: numbered(micro_batches, storages)}
        return make_traces(events, groups={"pp": [[0, 1]]}, pp=2, stands_for={0: [0]})[0]

    few = unrolled(trace(5, [8, 9, 7]), wanted=12)
    # Addresses differ from run to run: a storage is the number of its first send.
    again = trace(12, list(range(1, 13)))
    assert list(few.events) == list(again.events)[1:]


def test_no_steady_state() -> None:
    changing = [
        event
        for number in range(8)
        for event in (
            Mark(micro_batch=number, direction="forward"),
            Compute(flops=number),
            Mark(micro_batch=number, direction="backward"),
        )
    ]
    trace = make_traces({0: changing}, groups={"tp": [[0]]})[0]
    with pytest.raises(NoSteadyStateError, match="8 micro-batches rehearsed on rank 0"):
        unrolled(trace, wanted=9)
