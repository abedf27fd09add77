"""A step of many micro-batches, from the trace of one of few: its steady state repeated.

    recorded     F0 F1 | F2 B0 | F3 B1 | B2 B3          a stage, all micro-batches equal
    unrolled     F0 F1 | F2 B0 | F3 B1 | F4 B2 | B3 B4

Between its warm-up and its end a schedule repeats a period of passes: one micro-batch forward and
one backward, or with virtual stages as many as there are pipeline stages. Two equal periods are
looked for; the second is inserted again and again, and all later numbers are moved on.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from megatron_croc.config.parallel import ParallelConfig
from megatron_croc.errors import DataError
from megatron_croc.rehearsal.trace import (
    Event,
    Exchange,
    Mark,
    Memory,
    Release,
    Trace,
)

_PERIODS = 5
"""Periods of a pipeline that are recorded: warm-up takes up to two, the end another."""

_NUMBERS = ("work", "number", "recorded", "storage", "micro_batch")
"""Fields whose numbers grow from period to period."""


class NoSteadyStateError(DataError):
    """A trace has no steady state that can be repeated."""


def micro_batches_to_record(parallel: ParallelConfig, wanted: int) -> int:
    """Number of micro-batches from whose trace one of `wanted` can be unrolled."""
    stages = parallel.pipeline_model_parallel_size
    if parallel.virtual_pipeline_model_parallel_size:
        return min(wanted, _PERIODS * stages)
    return min(wanted, stages + 4)


def unrolled(trace: Trace, *, wanted: int) -> Trace:
    """The trace of a step of `wanted` equal micro-batches, from that of a step of fewer.

    Raises:
        NoSteadyStateError: it has no two equal periods in a row, or they do not add up to `wanted`.
    """
    recorded = 1 + max(
        event.micro_batch
        for event in trace.events
        if isinstance(event, Mark) and event.micro_batch is not None
    )
    if wanted == recorded:
        return trace
    blocks = _blocks(storages_numbered(trace.events))
    passes = [block[0] for block in blocks[1:]]
    for length in range(2, len(passes) // 2 + 1):
        # From the end: what the first micro-batches alone do (gather weights) lies behind.
        for begin in range(len(blocks) - 2 * length - 1, 0, -1):
            first_pass = begin - 1
            shift = _shift(passes[first_pass:][:length], passes[first_pass + length :][:length])
            if shift is None or (wanted - recorded) % shift:
                continue
            first = _joined(blocks[begin : begin + length])
            second = _joined(blocks[begin + length : begin + 2 * length])
            step = _growth(first, second)
            if step is not None:
                before = _joined(blocks[: begin + 2 * length])
                after = _joined(blocks[begin + 2 * length :])
                times = (wanted - recorded) // shift
                copies = (step.moved(second, n) for n in range(1, times + 1))
                events = (*before, *itertools.chain(*copies), *step.moved(after, times))
                return Trace(trace.header, events)
    raise NoSteadyStateError(
        f"the {recorded} micro-batches rehearsed on rank {trace.header.rank} have no steady state "
        f"that {wanted} could be unrolled from; run croc rehearse on this layout"
    )


def storages_numbered(events: Sequence[Event]) -> list[Event]:
    """The events with storages numbered in the order of their first send; addresses come again."""
    numbers: dict[int, int] = {}
    count, found = itertools.count(1), []
    for event in events:
        if isinstance(event, Exchange):
            transfers = tuple(
                t
                if t.storage is None
                else replace(
                    t,
                    storage=numbers[t.storage]
                    if t.storage in numbers
                    else numbers.setdefault(t.storage, next(count)),
                )
                for t in event.transfers
            )
            event = replace(event, transfers=transfers)
        elif isinstance(event, Release):
            number = numbers.pop(event.storage, None)
            if number is None:  # sent before the step
                continue
            event = replace(event, storage=number)
        found.append(event)
    return found


def _blocks(events: Sequence[Event]) -> list[list[Event]]:
    """Events cut at the begin of each pass; what lies before the first pass is a block too."""
    blocks: list[list[Event]] = [[]]
    for event in events:
        if isinstance(event, Mark) and event.micro_batch is not None:
            blocks.append([])
        blocks[-1].append(event)
    return blocks


def _joined(blocks: Sequence[Sequence[Event]]) -> list[Event]:
    return list(itertools.chain(*blocks))


def _shift(first: Sequence[Event], second: Sequence[Event]) -> int | None:
    """Micro-batches by which the passes of the second period are further; None: not the same."""
    shifts = set()
    for one, other in zip(first, second, strict=True):
        if not isinstance(one, Mark) or not isinstance(other, Mark):
            return None
        if one.micro_batch is None or other.micro_batch is None:
            return None
        if (one.direction, one.chunk) != (other.direction, other.chunk):
            return None
        shifts.add(other.micro_batch - one.micro_batch)
    (shift, *more) = shifts
    return shift if not more and shift > 0 else None


@dataclass(frozen=True)
class _Growth:
    """Numbers of a period that are larger in the next one."""

    steps: dict[str, int]
    """Kind of a number -> what it grows by."""

    lowest: dict[str, int]
    """Kind -> its smallest number in the first period; those below it are of the warm-up."""

    def moved(self, events: Sequence[Event], times: int) -> list[Event]:
        """The events so many periods later."""

        def move(kind: str, number: int) -> int:
            if kind in self.steps and number >= self.lowest[kind]:
                return number + times * self.steps[kind]
            return number

        return [_renumbered(event, move) for event in events]


def _growth(first: Sequence[Event], second: Sequence[Event]) -> _Growth | None:
    """Steps by which the numbers grow; None if the periods differ in anything else."""
    if len(first) != len(second):
        return None
    steps: dict[str, int] = {}
    lowest: dict[str, int] = {}
    for one, other in zip(first, second, strict=True):
        if _plain(one) != _plain(other):
            return None
        for (kind, low), (_, high) in zip(_numbers(one), _numbers(other), strict=True):
            if high == low:
                continue  # of something that all periods use
            if steps.setdefault(kind, high - low) != high - low:
                return None
            lowest[kind] = min(low, lowest.get(kind, low))
    return _Growth(steps, lowest)


def _plain(event: Event) -> object:
    """The event without its numbers."""
    if isinstance(event, Memory):
        return Memory
    return _renumbered(event, lambda kind, number: 0)


def _numbers(event: Event) -> Iterator[tuple[str, int]]:
    """(kind, number) of each number of an event, in a fixed order."""
    found: list[tuple[str, int]] = []

    def note(kind: str, number: int) -> int:
        found.append((kind, number))
        return number

    _renumbered(event, note)
    return iter(found)


def _renumbered(event: Event, move: Callable[[str, int], int]) -> Event:
    changes: dict[str, Any] = {}
    for name in _NUMBERS:
        number = getattr(event, name, None)
        if number is not None:
            changes[name] = move("number" if name == "recorded" else name, number)
    if isinstance(event, Exchange):
        changes["transfers"] = tuple(
            t if t.storage is None else replace(t, storage=move("storage", t.storage))
            for t in event.transfers
        )
    return replace(event, **changes) if changes else event
