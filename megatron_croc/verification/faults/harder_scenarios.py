"""Scenarios of spoiled memory, names that are taken, disks that fill up, and time that jumps."""

from pathlib import Path

from megatron_croc.checkpoint.manifest import find_damage
from megatron_croc.checkpoint.state import LATEST_FILE
from megatron_croc.verification.faults.inject import Fault
from megatron_croc.verification.faults.promises import check_exits, check_said, expect
from megatron_croc.verification.faults.runs import curve
from megatron_croc.verification.faults.workplace import (
    KILLED,
    SAME,
    Outcome,
    Scenario,
    Workplace,
    break_and_resume,
)


def _on_both(fault: str, iteration: int, **more: int | str) -> list[Fault]:
    return [Fault(fault=fault, rank=rank, iteration=iteration, **more) for rank in (0, 1)]  # type: ignore[arg-type]


def _name_is_taken(place: Workplace, save: Path) -> Outcome:
    """Set a run back, and kill it while it gives the name of a whole checkpoint away."""
    check_exits(place.train(save), [0, 0])
    (save / LATEST_FILE).write_text("2\n")
    between = "megatron_croc.checkpoint.publishing.sync_directory"
    kill = Fault(fault="kill_at_call", iteration=4, name=between, number=1)
    check_exits(place.train(save, kill), [KILLED, 1])
    check_exits(place.train(save), [0, 0])
    expect(curve(save) == curve(place.unbroken), "the loss curve differs from the unbroken run")
    for name in ("iter_0000004", "iter_0000006", "iter_0000004.superseded"):
        expect(find_damage(save / name) == [], f"{name} is not whole")
    return Outcome()


def _time_jumps(place: Workplace, save: Path) -> Outcome:
    """Set the clock forward by an hour, then suspend both ranks for longer than the limit."""
    faults = [
        *_on_both("clock", 2, number=3600, micro_batch=0),
        *_on_both("suspend", 4, number=4, micro_batch=0),
    ]
    exits = place.train(save, *faults, more=("--stall-timeout-minutes=0.04",))
    check_exits(exits, [0, 0])
    check_said(exits, "did not run for")
    return Outcome(samples_once=place.check_equal(save), steps_lost=0)


def _disk_fills_up(place: Workplace, save: Path) -> Outcome:
    """Fill the disk from outside while a thread saves, kill the job, and fill the disk again.

    There is room while the second run starts, and again from its step 5 on.
    """
    filled = (*_on_both("disk_filled", 3, name=str(save)), *_on_both("kill", 5))
    exits = place.train(save, *filled, more=("--async-save", "--keep-last=1"))
    check_exits(exits, [KILLED, KILLED])
    check_said(exits, "cannot be written")
    check_said(exits, "could not be saved")
    filled = _on_both("disk_filled", 0, name=str(save), number=5)
    exits = place.train(save, *filled, more=("--async-save", "--keep-last=1"))
    check_exits(exits, [0, 0])
    check_said(exits, "can be written again")
    return Outcome(samples_once=place.check_equal(save), steps_lost=2)


HARDER: dict[str, tuple[str, str, Scenario]] = {
    "weights-spoiled": (
        "weights become NaN in memory, --keep-last 1, until the run gives up",
        "the last good checkpoint stays; no checkpoint with NaN gets a name; " + SAME,
        break_and_resume(
            *_on_both("nan_weights", 4),
            statuses=(1, 1),
            said="its weights themselves are not finite",
            more=("--max-consecutive-skips=1", "--keep-last=1"),
        ),
    ),
    "name-taken": (
        "SIGKILL between two renames while the name of a whole checkpoint is given away",
        "a start finds a whole checkpoint, the older one is kept; " + SAME,
        _name_is_taken,
    ),
    "disk-filled": (
        "another program fills the disk, SIGKILL, and fills it again in the next run",
        "metrics wait, the old checkpoint stays; " + SAME,
        _disk_fills_up,
    ),
    "time-jumps": (
        "clock set forward, then the job suspended for longer than the stall timeout",
        "no rank is ended, one line names the time; the curve is that of an unbroken run",
        _time_jumps,
    ),
}
"""name -> (fault, promise, scenario)."""
