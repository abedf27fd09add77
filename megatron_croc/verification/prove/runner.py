"""Run the stages in their order: own processes, time boxes, results written at once."""

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from megatron_croc.verification.prove.result import Result, Status, read_result
from megatron_croc.verification.prove.stage import Command, Place, Stage

LIST_MINUTES = 25.0
"""Sum that the boxes of the list are made for; another --minutes scales them."""

TAIL = 40
"""Lines of a log that are searched for the reason of a failure."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """One run of the list."""

    out: Path
    place: Place
    """Place of a stage whose folder is still to be set."""

    minutes: float
    commit: str
    tell: Callable[[str], None]
    """Receives one line for each stage."""


def run_stages(stages: Sequence[Stage], job: Job, *, again: bool = False) -> list[Result]:
    """Run what has no result yet; a stage that fails, crashes or hangs does not end the list.

    Args:
        stages: in their order.
        job: where, and for how long.
        again: run also what has passed on this machine at this commit.

    Returns:
        a result for every stage, also of earlier runs that were kept.
    """
    deadline = time.monotonic() + 60 * job.minutes
    results = []
    for stage in stages:
        earlier = read_result(job.out / f"{stage.name}.json")
        if earlier is not None and not again and _still_holds(earlier, job):
            results.append(earlier)
            job.tell(f"{stage.name:<14} {earlier.status}, from an earlier run")
            continue
        result = _run_stage(stage, job, deadline)
        result.write(job.out)
        results.append(result)
        why = f": {result.reason}" if result.reason else ""
        job.tell(f"{stage.name:<14} {result.status} in {result.seconds:.0f} s{why}")
        if result.status == "interrupted":
            raise KeyboardInterrupt(f"stopped in {stage.name}; the same command goes on there")
    return results


def _still_holds(result: Result, job: Job) -> bool:
    return (
        result.status == "passed"
        and result.machine == job.place.machine
        and result.commit == job.commit
        and result.is_small == job.place.is_small
    )


def _run_stage(stage: Stage, job: Job, deadline: float) -> Result:
    place = replace(job.place, folder=job.out / stage.name)
    blank = Result(
        stage=stage.name,
        status="passed",
        date=datetime.now(UTC).date().isoformat(),
        commit=job.commit,
        is_small=place.is_small,
        machine=place.machine,
    )
    if (missing := stage.missing(place)) is not None:
        return replace(blank, status="skipped", reason=missing)
    started = time.monotonic()
    box = 60 * stage.minutes * job.minutes / LIST_MINUTES
    end = min(started + box, deadline)
    if end - started < min(5.0, 0.9 * box):  # its box is open, but the list is over
        return replace(blank, status="not reached", reason="the time of the list was used up")
    if (place.folder / "0.log").exists():  # of an interrupted attempt; never another's folder
        shutil.rmtree(place.folder)
    place.folder.mkdir(parents=True, exist_ok=True)
    commands = list(stage.commands(place))
    status: Status = "passed"
    reason = ""
    for number, command in enumerate(commands):
        log = place.folder / f"{number}.log"
        status, reason = _run(command, log, end, cwd=place.checkout)
        if status == "failed" and command.may_fail:
            status, reason = "passed", ""
        if status != "passed":
            break
    return replace(
        blank,
        status=status,
        reason=reason,
        seconds=round(time.monotonic() - started, 1),
        commands=tuple(_as_typed(command, place) for command in commands),
        figures=stage.figures(place.folder),
    )


def _run(command: Command, log: Path, end: float, *, cwd: Path) -> tuple[Status, str]:
    """Run one command to its end, or kill it and all it has started at `end`."""
    with open(log, "wb") as output:
        process = subprocess.Popen(
            command.words,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=cwd,
            env={**os.environ, "PYTHONUNBUFFERED": "1", **command.environment},
            start_new_session=True,
        )
        try:
            code = process.wait(timeout=max(end - time.monotonic(), 0.1))
        except subprocess.TimeoutExpired:
            return "timed out", f"{command.words[-1]} was still running; log: {log.name}"
        except KeyboardInterrupt:
            return "interrupted", "Ctrl-C"
        finally:
            _kill_group(process)
    if code == 0:
        return "passed", ""
    return "failed", f"{_reason(log)} (status {code}, log {log.parent.name}/{log.name})"


def _kill_group(process: subprocess.Popen) -> None:
    """End what is left of a command: itself, and workers that have outlived it."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _reason(log: Path) -> str:
    """The line of a log that says most about a failure."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-TAIL:]
    lines = [line.strip() for line in lines if line.strip()]
    telling = [line for line in lines if line.startswith(("error:", "FAILED", "E   "))]
    telling += [line for line in lines if "Error" in line.split(":")[0]]
    return (telling or lines[-1:] or ["no output"])[0][:200]


def _as_typed(command: Command, place: Place) -> str:
    """The command as a user would type it in the checkout."""
    words = ["python", *command.words[1:]]
    short = [
        word.replace(f"{place.checkout}/", "").replace(str(place.folder), "OUT") for word in words
    ]
    variables = [f"{name}={value or repr('')}" for name, value in command.environment.items()]
    return " ".join([*variables, *short]).replace("python -m megatron_croc ", "croc ")
