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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_croc.config.run import RunConfig
from megatron_croc.errors import ConfigError, RunError
from megatron_croc.rehearsal.classes import RankClass, rank_classes
from megatron_croc.rehearsal.job import Job, Rows, settings_of

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

    outcomes: list[Outcome] = field(default_factory=list)
    seconds: float = 0.0


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
    rehearsal: Rehearsal,
    *,
    at_once: int,
    time_limit: float,
    tell: Callable[[str], None],
    classes: Sequence[RankClass] | None = None,
) -> None:
    """Rehearse every class; fills `outcomes` in the order of the classes.

    Args:
        rehearsal: the job.
        at_once: children that run at once.
        time_limit: seconds for all of them.
        tell: takes a line of progress.
        classes: default `rank_classes`.

    Raises:
        ConfigError: a child refused the job, for example its data.
        RunError: the time is up, or the children could not start.
    """
    began = time.monotonic()
    chosen = classes or rank_classes(rehearsal.run.parallel, rehearsal.world_size)
    tell(
        f"{len(chosen)} classes of ranks stand for {rehearsal.world_size}; "
        f"{min(at_once, len(chosen))} at once"
    )
    by_file = {f"rank_{entry.rank:05d}": entry for entry in chosen}
    outcomes: dict[int, Outcome] = {}
    for name, seconds, status in _children(rehearsal, by_file, at_once, time_limit):
        entry = by_file[name]
        outcomes[entry.rank] = outcome = _read(rehearsal, entry, seconds, status)
        if "refused" in outcome.result:  # it says the same on every rank
            raise ConfigError(str(outcome.result["refused"]))
        tell(f"{len(outcomes)} of {len(chosen)}: {_line(outcome)}")
    if len(outcomes) < len(chosen):
        raise RunError(
            f"{len(outcomes)} of {len(chosen)} classes were done after {time_limit / 60:g} "
            "minutes; raise --time-limit, or --jobs where there are more cores"
        )
    reasons = [entry.result.get("forward_only") for entry in outcomes.values()]
    rehearsal.forward_only = next(filter(None, reasons), None)
    rehearsal.outcomes = [outcomes[entry.rank] for entry in chosen]
    rehearsal.seconds = time.monotonic() - began


def _children(
    rehearsal: Rehearsal, by_file: dict[str, RankClass], at_once: int, time_limit: float
) -> Iterator[tuple[str, float, int]]:
    """(name of the job's file, seconds, status) of each job as it ends, until the time is up."""
    for name, entry in by_file.items():
        Job(
            settings=settings_of(rehearsal.run),
            rank=entry.rank,
            world_size=rehearsal.world_size,
            gpu=rehearsal.gpu,
            rows=rehearsal.rows,
            stands_for=list(entry.stands_for),
        ).write(rehearsal.folder / name)
        for ending in (".result.json", ".trace.jsonl", ".log"):  # of an earlier rehearsal
            (rehearsal.folder / name).with_suffix(ending).unlink(missing_ok=True)
    paths = [str(rehearsal.folder / name) for name in by_file]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for name in ("TORCHELASTIC_RUN_ID", "MASTER_ADDR", "MASTER_PORT"):
        environment.pop(name, None)
    log = rehearsal.folder / "children.log"
    with log.open("w") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "megatron_croc.rehearsal.rank", str(at_once), *paths],
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
                name, status, seconds = line.split()
                yield name, float(seconds), int(status)
            status = process.wait()
        finally:
            clock.cancel()
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    if status and not is_late.is_set():
        raise RunError(f"the children ended early: {_end(status, log)}")


def _read(rehearsal: Rehearsal, entry: RankClass, seconds: float, status: int) -> Outcome:
    path = rehearsal.folder / f"rank_{entry.rank:05d}"
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
