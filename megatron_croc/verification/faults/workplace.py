"""Workplace of the scenarios: data, an uninterrupted run, and runs with faults beside it."""

import json
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from megatron_croc.verification.faults.inject import Fault
from megatron_croc.verification.faults.launch import Exit, run_to_exit
from megatron_croc.verification.faults.promises import check_exits, check_said, expect
from megatron_croc.verification.faults.runs import (
    curve,
    effective_samples,
    faulty_train,
    make_data,
    trace_fault,
    train_words,
)

KILLED = -signal.SIGKILL
"""Exit status of a killed process."""

SAME = "the same command goes on; the curve is that of an unbroken run, every digit"
"""Promise of most scenarios."""


@dataclass(kw_only=True)
class Outcome:
    """Measurements of one fault's run."""

    samples_once: bool | None = None
    """True when no sample was trained on twice; None: does not apply."""

    steps_lost: int | None = None
    """Steps that were repeated."""

    seconds: float | None = None
    """From the end of the broken run to the end of the first step after it."""


@dataclass(kw_only=True)
class Workplace:
    """A folder with data and an uninterrupted run."""

    root: Path
    data: Path = field(init=False)
    unbroken: Path = field(init=False)

    def __post_init__(self) -> None:
        """Make the data and the uninterrupted run."""
        self.data = make_data(self.root / "data")
        self.unbroken = self.root / "unbroken"
        check_exits(self.train(self.unbroken), [0, 0])

    def train(self, save: Path, *faults: Fault, more: tuple[str, ...] = ()) -> list[Exit]:
        """Train on two ranks with these faults."""
        data = save / "data" if (save / "data").exists() else self.data
        everything = [*faults, trace_fault(save / "trace")]
        return run_to_exit(faulty_train, 2, everything, train_words(data, save, *more))

    def check_equal(self, save: Path) -> bool:
        """Require the uninterrupted run's curve and samples, bit for bit; True: no sample twice."""
        expect(curve(save) == curve(self.unbroken), "the loss curve differs from the unbroken run")
        samples = effective_samples(save / "trace")
        expect(samples == effective_samples(self.unbroken / "trace"), "other samples were used")
        return uses_samples_once(save)


Scenario = Callable[[Workplace, Path], Outcome]
"""Run with a fault, and the checks of its promise; the path is the folder of the run."""

Damage = Callable[[Path], None]
"""Change of the files of a run; the path is the folder of the run."""


def break_and_resume(
    *faults: Fault,
    statuses: tuple[int, ...],
    said: str = "",
    damage: Damage | None = None,
    said_later: str = "",
    more: tuple[str, ...] = (),
) -> Scenario:
    """Make a scenario: a run with faults, optional damage, then the same command again."""

    def scenario(place: Workplace, save: Path) -> Outcome:
        exits = place.train(save, *faults, more=more)
        ended = time.time()
        check_exits(exits, list(statuses))
        if said:
            check_said(exits, said)
        done = last_step(save)
        if damage is not None:
            damage(save)
        exits = place.train(save, more=more)
        check_exits(exits, [0, 0])
        if said_later:
            check_said(exits, said_later)
        first = next(row for row in trace_rows(save) if row["time"] > ended)
        return Outcome(
            samples_once=place.check_equal(save),
            steps_lost=done - (first["iteration"] - 1),
            seconds=first["time"] - ended,
        )

    return scenario


def trace_rows(save: Path) -> list[dict]:
    """Rows of the trace of rank 0, one per attempted step."""
    lines = (save / "trace" / "rank_0.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def last_step(save: Path) -> int:
    """Last step that rank 0 attempted; 0: none."""
    return max((row["iteration"] for row in trace_rows(save)), default=0)


def uses_samples_once(save: Path) -> bool:
    """Return True if no sample was trained on twice."""
    samples = [name for step in effective_samples(save / "trace").values() for name in step]
    return len(samples) == len(set(samples))
