"""Replay of a job's traces: faults first, then the timeline."""

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from megatron_croc.errors import DataError
from megatron_croc.rehearsal.replay.costs import Costs
from megatron_croc.rehearsal.replay.deadlock import find_deadlock
from megatron_croc.rehearsal.replay.programs import Loads, make_job
from megatron_croc.rehearsal.replay.rules import RULES
from megatron_croc.rehearsal.replay.simulation import Simulation
from megatron_croc.rehearsal.replay.timeline import Timeline, make_timeline
from megatron_croc.rehearsal.trace import Trace

MOST_UNRECEIVED = 5
"""Most messages with one side that are named."""


@dataclass(frozen=True)
class Replay:
    """All that a replay has found."""

    faults: Sequence[str]
    """Each is one line: a deadlock, or ranks that do not agree."""

    timeline: Timeline
    """The step; after a deadlock, all that was done before it."""


@contextmanager
def _no_collector() -> Iterator[None]:
    """Pause the garbage collector: millions of live nodes would double the time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@_no_collector()
def replay(
    traces: Sequence[Trace],
    costs: Costs,
    *,
    loads: Loads | None = None,
    are_relative: bool = False,
) -> Replay:
    """Take all ranks of a job through their traces by the rules of its backend.

    Args:
        traces: one for each class of ranks; together they stand for every rank once.
        costs: seconds of kernels, collectives and transfers.
        loads: work of every replica's micro-batches; None: all are equal.
        are_relative: the loads are relative to the traces'; else traces have their replica's.

    Raises:
        DataError: traces are of different jobs, leave a rank out, use a group they do not name,
            or name a backend without rules; a kernel has no cost.
    """
    job = make_job(traces, costs, loads=loads, are_relative=are_relative)
    if job.header.backend not in RULES:
        raise DataError(
            f"the trace is of backend {job.header.backend}; there are rules for {', '.join(RULES)}"
        )
    simulation = Simulation(job, costs, RULES[job.header.backend])
    simulation.run()
    deadlock = find_deadlock(simulation)
    if deadlock is None:
        simulation.communication.find_other_orders()
    faults = [] if deadlock is None else [deadlock]
    faults += simulation.communication.faults.values()
    if deadlock is None:
        faults += _unreceived(simulation)
    return Replay(faults, make_timeline(simulation))


def _unreceived(simulation: Simulation) -> list[str]:
    """Messages that a backend has buffered and nobody receives."""
    messages = simulation.communication.unreceived()
    lines = [
        f"rank {message.sender} sends {message.num_bytes:,} bytes to rank {message.receiver} at "
        f"{message.place or '?'}, which never receives them"
        for message in messages[:MOST_UNRECEIVED]
    ]
    if len(messages) > MOST_UNRECEIVED:
        lines.append(f"{len(messages) - MOST_UNRECEIVED} more messages are never received")
    return lines
