"""The parent of a rehearsal: starts the children on the cores there are, and gathers their results.

It imports no torch, so that a wrong setting is told at once.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_croc.config.run import RunConfig
from megatron_croc.errors import ConfigError, RunError
from megatron_croc.rehearsal.classes import RankClass, rank_classes
from megatron_croc.rehearsal.job import Job, Rows, settings_of
from megatron_croc.rehearsal.replay.programs import Loads

MAX_WORLD = 1024
"""Largest number of GPUs; more ranks only make the groups slow to create."""

CHILD_BYTES = 1.2e9
"""Memory of one child, for the number that run at once (0.5 to 1.1 GiB were seen)."""


@dataclass(kw_only=True)
class Outcome:
    """End of one class of ranks."""

    of: RankClass
    result: dict[str, Any]
    """Its part of the report; `error` or `refused` instead when it ended early."""

    trace: Path
    seconds: float = 0.0


@dataclass(kw_only=True)
class Rehearsal:
    """A job to rehearse, and the outcomes so far."""

    run: RunConfig
    world_size: int
    gpu: str
    rows: Rows
    folder: Path
    """Folder of the jobs, traces and results of the children."""

    forward_only: str | None = None
    """Reason for which no backward pass ran; None: it did."""

    costs: Path | None = None
    """Table of measured costs; None: peak x efficiency of the GPU."""

    step_only: bool = False
    """End after the training step: no validation, no saving."""

    micro_batches: int | None = None
    """Micro-batches of the step that is timed, if it is unrolled from one of fewer."""

    loads: Loads | None = None
    """Work of every replica relative to the rehearsed rows; None: what the first rank found."""

    title: str = ""
    """Begin of its lines of progress, where there are several jobs."""

    outcomes: list[Outcome] = field(default_factory=list)
    seconds: float = 0.0

    def classes(self) -> list[RankClass]:
        """Classes of ranks of the job."""
        return rank_classes(self.run.parallel, self.world_size)

    @property
    def is_done(self) -> bool:
        """Return True if every class has an outcome."""
        return len(self.outcomes) == len(self.classes())


def free_memory() -> float:
    """Bytes of memory that new processes can use; infinite where it is not told."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return float("inf")
    sizes = {line.split(":")[0]: line.split()[1] for line in lines if ":" in line}
    return float(sizes.get("MemAvailable", "inf")) * 1024


def children_at_once(jobs: int | None) -> int:
    """Number of children that run at once: `jobs`, or one a core as far as memory allows."""
    if jobs is not None:
        return jobs
    return max(1, min(len(os.sched_getaffinity(0)), int(free_memory() // CHILD_BYTES)))


def perform(
    rehearsal: Rehearsal, *, at_once: int, time_limit: float, tell: Callable[[str], None]
) -> None:
    """Rehearse every class; fills `outcomes` in the order of the classes.

    Args:
        rehearsal: the job.
        at_once: children that run at once.
        time_limit: seconds for all of them.
        tell: takes a line of progress.

    Raises:
        ConfigError: a child refused the job, for example its data.
        RunError: the time is up, or the children could not start.
    """
    chosen = rehearsal.classes()
    tell(
        f"{len(chosen)} classes of ranks stand for {rehearsal.world_size}; "
        f"{min(at_once, len(chosen))} at once"
    )
    perform_all([rehearsal], at_once=at_once, time_limit=time_limit, tell=tell)
    if not rehearsal.is_done:
        raise RunError(
            f"{len(rehearsal.outcomes)} of {len(chosen)} classes were done after "
            f"{time_limit / 60:g} minutes; raise --time-limit, or --jobs where there are more cores"
        )


def perform_all(
    rehearsals: Sequence[Rehearsal],
    *,
    at_once: int,
    time_limit: float,
    tell: Callable[[str], None],
    on_done: Callable[[Rehearsal], None] = lambda rehearsal: None,
) -> None:
    """Rehearse jobs for GPUs of one kind, one after the other, from a process that imports once.

    Calls `on_done` for each job as it is done, while others go on; jobs that the time does not
    suffice for keep what was done, their `is_done` is False. Other arguments and errors are those
    of `perform`, but that the time is up is no error.
    """
    began = time.monotonic()
    places: dict[Path, tuple[Rehearsal, RankClass]] = {}
    for rehearsal in rehearsals:
        for entry in rehearsal.classes():
            places[_file(rehearsal, entry)] = rehearsal, entry
    for path, seconds, status in _children(places, at_once, time_limit):
        rehearsal, entry = places[path]
        outcome = _read(rehearsal, entry, seconds, status)
        rehearsal.outcomes.append(outcome)
        rehearsal.seconds = time.monotonic() - began
        if "refused" in outcome.result:  # it says the same on every rank
            raise ConfigError(str(outcome.result["refused"]))
        if rehearsal.step_only and (reason := outcome.result.get("forward_only")):
            raise RunError(f"a step needs backward passes: {reason}; install one, or set CXX")
        done = sum(len(its.outcomes) for its in rehearsals)
        tell(f"{done} of {len(places)}: {rehearsal.title}{_line(outcome)}")
        if rehearsal.is_done:
            _finish(rehearsal)
            on_done(rehearsal)


def _finish(rehearsal: Rehearsal) -> None:
    """Put the outcomes in the order of the classes."""
    order = [entry.rank for entry in rehearsal.classes()]
    rehearsal.outcomes.sort(key=lambda outcome: order.index(outcome.of.rank))
    reasons = [outcome.result.get("forward_only") for outcome in rehearsal.outcomes]
    rehearsal.forward_only = next(filter(None, reasons), None)


def _file(rehearsal: Rehearsal, entry: RankClass) -> Path:
    return rehearsal.folder / f"rank_{entry.rank:05d}"


def _children(
    places: Mapping[Path, tuple[Rehearsal, RankClass]], at_once: int, time_limit: float
) -> Iterator[tuple[Path, float, int]]:
    """(file of the job, seconds, status) of each job as it ends, until the time is up."""
    for path, (rehearsal, entry) in places.items():
        Job(
            settings=settings_of(rehearsal.run),
            rank=entry.rank,
            world_size=rehearsal.world_size,
            gpu=rehearsal.gpu,
            rows=rehearsal.rows,
            stands_for=list(entry.stands_for),
            step_only=rehearsal.step_only,
        ).write(path)
        for ending in (".result.json", ".trace.jsonl", ".log"):  # of an earlier rehearsal
            path.with_suffix(ending).unlink(missing_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for name in ("TORCHELASTIC_RUN_ID", "MASTER_ADDR", "MASTER_PORT"):
        environment.pop(name, None)
    log = next(iter(places)).with_name("children.log")
    with log.open("w") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "megatron_croc.rehearsal.rank", str(at_once), *places],
            stdout=subprocess.PIPE,
            stderr=errors,
            env=environment,
            text=True,
            start_new_session=True,
        )
        is_late = threading.Event()

        def stop() -> None:
            is_late.set()
            os.killpg(process.pid, signal.SIGKILL)

        clock = threading.Timer(time_limit, stop)
        clock.start()
        try:
            assert process.stdout is not None
            for line in process.stdout:
                status, seconds, path = line.rstrip("\n").split(" ", 2)
                yield Path(path), float(seconds), int(status)
            status = process.wait()
        finally:
            clock.cancel()
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    if status and not is_late.is_set():
        raise RunError(f"the children ended early: {_end(status, log)}")


def _read(rehearsal: Rehearsal, entry: RankClass, seconds: float, status: int) -> Outcome:
    path = _file(rehearsal, entry)
    try:
        result = json.loads(path.with_suffix(".result.json").read_text())
    except (OSError, ValueError):
        result = {"rank": entry.rank, "error": _end(status, path.with_suffix(".log"))}
    trace = path.with_suffix(".trace.jsonl")
    return Outcome(of=entry, result=result, trace=trace, seconds=seconds)


def _line(outcome: Outcome) -> str:
    about = f"rank {outcome.of.rank} ({outcome.of.name}), {outcome.seconds:.0f} s"
    if "error" in outcome.result:
        return f"{about}: {outcome.result['error']}"
    peak = max(entry["total"] for entry in outcome.result["peaks"].values())
    return f"{about}: {peak / 2**30:.2f} GiB at most"


def _end(status: int, log: Path) -> str:
    """Reason of a process that left no result."""
    if status == -signal.SIGKILL:
        return "it was killed (out of host memory?); take fewer --jobs"
    last = log.read_text().strip().splitlines()[-1:] or ["no message"]
    name = signal.Signals(-status).name if status < 0 else f"status {status}"
    return f"{last[0]} ({name})"
