"""Watchdog of each rank: no rank waits forever, and the error names the rank that caused it.

    a rank stalls           its own watchdog thread writes its stack and ends the process
    ... holding the GIL     a helper process does the same (minder.py)
    another rank is gone    the collective fails; the heartbeats of all ranks name it

The cost is one thread that wakes ten times within the timeout, and a small helper process. torch's
own timeout is longer: it reports that a collective was not joined, but not by which rank. Stalls
are measured in own wake-ups: no clock that is set, and no time in which the process was suspended,
makes one. The thread belongs to the whole process (docs/design.md, "State that belongs to the whole
process").
"""

import faulthandler
import math
import os
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from megatron_croc.best_effort import BestEffort
from megatron_croc.config.reliability import WATCHDOG_MARGIN, ReliabilityConfig
from megatron_croc.errors import CrocError, RunError, first_line
from megatron_croc.log import get_logger, rank, world_size
from megatron_croc.parallel.flight_recorder import last_collective
from megatron_croc.training.safety.heartbeat import (
    Beat,
    close_heartbeat,
    num_phases,
    open_heartbeat,
    own_beat,
    read_heartbeats,
    share_heartbeat,
)
from megatron_croc.training.safety.minder import Minder

logger = get_logger(__name__)

SLOW_WAKE_UP = 0.3
"""Seconds that a wake-up may be late on a busy machine."""

NUM_NAMED = 4
"""Number of lost ranks that a message names."""


@contextmanager
def watch_over(
    config: ReliabilityConfig, folder: Path | None, *, first_step: int | None = None
) -> Iterator["Watchdog"]:
    """Keep a heartbeat and a watchdog while the body builds and trains.

    Args:
        config: time limits.
        folder: folder of the run; heartbeats and stacks go to `heartbeats/` in it. None: the
            heartbeat stays in memory, and stacks go to stderr.
        first_step: first iteration, which has a time limit of its own, as has all that comes
            before it; None: not known yet, to be set as `first_step` of the watchdog.

    Raises:
        RunError: in place of another error (a collective's) when other ranks are lost; names those
            ranks, their phases, and the phase of this one.
    """
    if folder is not None:
        folder = folder / "heartbeats"
    open_heartbeat(folder)
    watchdog = Watchdog(
        folder,
        limit=60.0 * config.stall_timeout_minutes,
        first_step=first_step,
        first_step_limit=60.0 * config.first_step_timeout_minutes,
    )
    try:
        yield watchdog
    except CrocError:
        raise
    except Exception as error:
        watchdog.write(traceback.format_exc())
        lost = describe_lost_ranks(folder)
        if lost is None:
            raise
        collective = last_collective()
        raise RunError(
            f"rank {rank()} stopped at {own_beat().place}"
            + (f" (collective {collective})" if collective else "")
            + f": {first_line(error)}{watchdog.suspended}\n{lost}"
        ) from error
    finally:
        watchdog.stop()
        close_heartbeat()


def describe_lost_ranks(folder: Path | None) -> str | None:
    """Describe the ranks that this rank waits for, one line each; None when there are none.

    Ranks whose process has ended come first. Without any, ranks that are not in a collective (and
    whose phase began before this rank's, if this rank is not in one either). Without those, ranks
    in an earlier collective. The oldest phase comes first.
    """
    if folder is None:
        return None
    own = own_beat()
    beats = read_heartbeats(folder, world_size())
    others = [beat for beat in beats if beat.rank != own.rank]
    gone = [beat for beat in others if beat.is_gone()]
    at_work = [b for b in others if not b.waits and (own.waits or b.age() > own.age())]
    behind = [b for b in others if own.waits and b.num_collectives < own.num_collectives]
    lost = sorted(gone or at_work or behind, key=lambda beat: -beat.age())
    lines = [_describe(beat, is_gone=bool(gone), folder=folder) for beat in lost[:NUM_NAMED]]
    if len(lost) > NUM_NAMED:
        lines.append(f"and {len(lost) - NUM_NAMED} more, see {folder}")
    return "\n".join(lines) or None


def _describe(beat: Beat, *, is_gone: bool, folder: Path) -> str:
    who = f"rank {beat.rank} ({beat.host}, pid {beat.pid})"
    age = beat.age()
    stack = stack_file(folder, beat.rank)
    has_stack = not is_gone or (stack.exists() and stack.stat().st_size > 0)
    where = f"; its stack is in {stack}" if has_stack else ""
    if is_gone:
        return f"{who} is gone; {age:.1f} s ago it stood at {beat.place}{where}"
    return f"{who} has not moved for {age:.1f} s; it stands at {beat.place}{where}"


def stack_file(folder: Path, number: int) -> Path:
    """Path of the stacks of rank `number`."""
    return folder / f"rank_{number:05d}.stack"


class Watchdog:
    """Thread that ends a stalled process; a single process is only reported."""

    def __init__(
        self, folder: Path | None, *, limit: float, first_step: int | None, first_step_limit: float
    ) -> None:
        """Start watching.

        Args:
            folder: folder of the stacks; None: stderr.
            limit: longest time in one phase, seconds.
            first_step: first iteration of the run; None: not known yet.
            first_step_limit: longest time in one phase of the first step, seconds.
        """
        self._limit = limit
        self.first_step = first_step
        self._first_step_limit = first_step_limit
        self.others_wait = world_size() > 1
        self.stacks: TextIO | None = None
        self.stack_name = "the error output"
        if folder is not None:
            path = stack_file(folder, rank())
            self.stack_name = str(path)
            with BestEffort(str(path)):
                path.parent.mkdir(parents=True, exist_ok=True)
                self.stacks = path.open("w")
        self._stopped = threading.Event()
        self.suspended = ""
        self._pause = min(limit, first_step_limit) / 10
        self._minder: Minder | None = None
        if self.others_wait:
            most = math.ceil(10 * WATCHDOG_MARGIN * limit / min(limit, first_step_limit))
            self._minder = Minder(
                pause=self._pause, most_missed=most, stacks=self.stacks or sys.stderr
            )
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def write(self, text: str) -> None:
        """Append to the file of stacks."""
        if self.stacks is not None:
            with BestEffort(self.stack_name):
                self.stacks.write(text)
                self.stacks.flush()

    def stop(self) -> None:
        """Stop watching."""
        self._stopped.set()
        self._thread.join()
        if self._minder is not None:
            self._minder.close()
        if self.stacks is not None:
            self.stacks.close()

    def _watch(self) -> None:
        stood, phase, reported = 0.0, num_phases(), -1
        before = time.monotonic()
        most = 3 * self._pause + SLOW_WAKE_UP
        while True:
            if self._minder is not None:
                self._minder.tick()
            if self._stopped.wait(self._pause):
                return
            now = time.monotonic()
            passed, before = now - before, now
            if passed > max(most, self._limit):
                self._note_suspension(passed)
            share_heartbeat()
            is_same = num_phases() == phase
            stood, phase = (stood + min(passed, most) if is_same else 0.0), num_phases()
            if stood > self._limit_of(own_beat()) and reported != phase:
                reported = phase
                self._report(own_beat(), stood)

    def _limit_of(self, beat: Beat) -> float:
        if self.first_step is None or beat.iteration <= self.first_step:
            return self._first_step_limit
        return self._limit

    def _note_suspension(self, seconds: float) -> None:
        self.suspended = f" (this process did not run for {seconds:.0f} s before)"
        logger.warning(
            "this process did not run for %.0f s (suspended, or code that kept Python's lock): "
            "that time does not count as a stall",
            seconds,
        )

    def _report(self, beat: Beat, stood: float) -> None:
        faulthandler.dump_traceback(all_threads=True, **self._destination())
        lost = describe_lost_ranks(None if self.stacks is None else Path(self.stacks.name).parent)
        logger.error(
            "this rank has stood at %s for %.1f s; its stack is in %s%s",
            beat.place,
            stood,
            self.stack_name,
            f"\n{lost}" if lost else "",
        )
        if self.others_wait:
            # Not sys.exit: it would only end this thread, while the main thread hangs.
            os._exit(1)

    def _destination(self) -> dict[str, Any]:
        return {} if self.stacks is None else {"file": self.stacks}
