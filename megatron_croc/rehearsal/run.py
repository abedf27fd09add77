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
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_croc.config.run import RunConfig
from megatron_croc.errors import ConfigError, CrocError
from megatron_croc.rehearsal.classes import RankClass, rank_classes
from megatron_croc.rehearsal.job import Job, Rows, settings_of

CHILD_BYTES = 1.2e9
"""Memory of one child, for the number that run at once (0.5 to 1.1 GiB were seen)."""


@dataclass(kw_only=True)
class Outcome:
    """What became of one class."""

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

    forward_only: bool = False
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


def check_compiler() -> str | None:
    """Compile the fake device in a child; the reason if that is impossible, else None."""
    code = "from megatron_croc.rehearsal import shim; shim.build_shim()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if done.returncode == 0:
        return None
    last = done.stderr.strip().splitlines()[-1:] or ["it ended without a message"]
    return last[0].removeprefix("megatron_croc.rehearsal.shim.ShimError: ")


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
        ConfigError: a child refused the job, for example its data; or the time is up.
    """
    began = time.monotonic()
    chosen = classes or rank_classes(rehearsal.run.parallel, rehearsal.world_size)
    tell(
        f"{len(chosen)} classes of ranks stand for {rehearsal.world_size}; "
        f"{min(at_once, len(chosen))} at once"
    )
    running: set[subprocess.Popen[str]] = set()
    lock, is_over = threading.Lock(), threading.Event()
    outcomes: dict[int, Outcome] = {}

    def one(entry: RankClass) -> Outcome:
        return _child(rehearsal, entry, running, lock, is_over)

    pool = ThreadPoolExecutor(at_once)
    waiting: set[Future[Outcome]] = {pool.submit(one, entry) for entry in chosen}
    try:
        while waiting:
            left = time_limit - (time.monotonic() - began)
            done, waiting = wait(waiting, timeout=max(left, 0), return_when=FIRST_COMPLETED)
            if not done:
                raise ConfigError(
                    f"{len(outcomes)} of {len(chosen)} classes were done after "
                    f"{time_limit / 60:g} minutes; raise --time-limit, or --jobs where there are "
                    "more cores"
                )
            for future in done:
                outcome = future.result()
                outcomes[outcome.of.rank] = outcome
                if "refused" in outcome.result:  # it says the same on every rank
                    raise ConfigError(str(outcome.result["refused"]))
                tell(f"{len(outcomes)} of {len(chosen)}: {_line(outcome)}")
    finally:
        is_over.set()
        with lock:
            for process in running:
                process.kill()
        pool.shutdown(wait=True, cancel_futures=True)
    rehearsal.outcomes = [outcomes[entry.rank] for entry in chosen]
    rehearsal.seconds = time.monotonic() - began


def _line(outcome: Outcome) -> str:
    about = f"rank {outcome.of.rank} ({outcome.of.name}), {outcome.seconds:.0f} s"
    if "error" in outcome.result:
        return f"{about}: {outcome.result['error']}"
    peak = max(entry["total"] for entry in outcome.result["peaks"].values())
    return f"{about}: {peak / 2**30:.2f} GiB at most"


def _child(
    rehearsal: Rehearsal,
    entry: RankClass,
    running: set[subprocess.Popen[str]],
    lock: threading.Lock,
    is_over: threading.Event,
) -> Outcome:
    path = rehearsal.folder / f"rank_{entry.rank:05d}"
    Job(
        settings=settings_of(rehearsal.run),
        rank=entry.rank,
        world_size=rehearsal.world_size,
        gpu=rehearsal.gpu,
        rows=rehearsal.rows,
        forward_only=rehearsal.forward_only,
        stands_for=list(entry.stands_for),
    ).write(path)
    started = time.monotonic()
    log = path.with_suffix(".log")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    for name in ("TORCHELASTIC_RUN_ID", "MASTER_ADDR", "MASTER_PORT"):
        environment.pop(name, None)
    with log.open("w") as output:
        with lock:
            if is_over.is_set():
                raise CrocError("the rehearsal has ended")
            process = subprocess.Popen(
                [sys.executable, "-m", "megatron_croc.rehearsal.rank", str(path)],
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                text=True,
            )
            running.add(process)
        status = process.wait()
        with lock:
            running.discard(process)
    try:
        result = json.loads(path.with_suffix(".result.json").read_text())
    except (OSError, ValueError):
        result = {"rank": entry.rank, "error": _silent_end(status, log)}
    return Outcome(
        of=entry,
        result=result,
        trace=path.with_suffix(".trace.jsonl"),
        seconds=time.monotonic() - started,
    )


def _silent_end(status: int, log: Path) -> str:
    """Reason of a child that left no result."""
    if status == -signal.SIGKILL:
        return "the child was killed (out of host memory?); take fewer --jobs"
    last = log.read_text().strip().splitlines()[-1:] or ["no message"]
    name = signal.Signals(-status).name if status < 0 else f"status {status}"
    return f"the child ended with {name}: {last[0]}"
