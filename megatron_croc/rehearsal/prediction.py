"""The traces of all classes, replayed: the whole life for faults, the step alone for its time."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from megatron_croc.planning.gpus import get_gpu
from megatron_croc.rehearsal.replay.costs import Costs, PeakCosts
from megatron_croc.rehearsal.replay.replay import replay
from megatron_croc.rehearsal.replay.timeline import Timeline
from megatron_croc.rehearsal.run import Rehearsal
from megatron_croc.rehearsal.trace import (
    LATER_STEP,
    STEP_PHASES,
    Event,
    Mark,
    Trace,
)
from megatron_croc.rehearsal.trace_file import read_trace
from megatron_croc.rehearsal.unrolled import unrolled


@dataclass(frozen=True)
class Prediction:
    """Step time and parts, from the replay."""

    faults: list[str]
    """Deadlocks and disagreements of ranks, from the start to saving."""

    timeline: Timeline | None
    """The training step in time; None if there was none, or it does not end."""


def predict(rehearsal: Rehearsal, costs: Costs | None = None) -> Prediction:
    """Replay the traces of all classes under the rules of NCCL.

    Args:
        rehearsal: the job; every class must have a trace.
        costs: default `PeakCosts` of its GPU.

    Raises:
        DataError: a trace cannot be read.
    """
    costs = costs or PeakCosts(gpu=get_gpu(rehearsal.gpu))
    traces = [read_trace(outcome.trace) for outcome in rehearsal.outcomes]
    faults = list(replay(traces, costs).faults)
    if faults or rehearsal.forward_only is not None:
        return Prediction(faults, None)
    steps = [step_of(trace) for trace in traces]
    if rehearsal.micro_batches is not None:
        steps = [unrolled(step, wanted=rehearsal.micro_batches) for step in steps]
    if rehearsal.loads is not None:
        timeline = replay(steps, costs, loads=rehearsal.loads, are_relative=True).timeline
    else:
        loads = rehearsal.outcomes[0].result.get("loads")
        timeline = replay(steps, costs, loads=loads).timeline
    return Prediction(faults, timeline)


def step_of(trace: Trace) -> Trace:
    """The training step alone; its communicators exist already."""
    groups = tuple(replace(group, is_ready=True) for group in trace.header.groups)
    return Trace(replace(trace.header, groups=groups), tuple(_in_step(trace.events)))


def _in_step(events: Sequence[Event]) -> list[Event]:
    """Events of the later step if there is one, else of the only one."""
    phase, phases = "", []
    for event in events:
        phase = event.phase if isinstance(event, Mark) else phase
        phases.append(phase)
    if LATER_STEP in phases:
        begin = phases.index(LATER_STEP)
        end = phases.index("evaluate") if "evaluate" in phases else len(phases)
        return list(events[begin:end])
    return [event for event, its in zip(events, phases, strict=True) if its in STEP_PHASES]
