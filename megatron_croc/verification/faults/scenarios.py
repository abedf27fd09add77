"""Faults of the matrix: the promised behaviour of each, and a run that checks it."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from megatron_croc.verification.faults.harder_scenarios import HARDER
from megatron_croc.verification.faults.inject import Fault
from megatron_croc.verification.faults.runs import (
    STAGE,
    curve,
    effective_samples,
    trace_fault,
    train_words,
)
from megatron_croc.verification.faults.workplace import (
    KILLED,
    SAME,
    BrokenPromiseError,
    Outcome,
    Workplace,
    break_and_resume,
    check_exits,
    check_said,
    expect,
    trace_rows,
)

__all__ = ["SCENARIOS", "BrokenPromiseError", "Outcome", "Workplace"]


def _killed_under_torchrun(place: Workplace, save: Path) -> Outcome:
    """Kill a rank under torchrun, which restarts the job by itself."""
    save.mkdir(parents=True)
    kill = Fault(fault="kill", rank=1, iteration=4, marker=str(save / "struck"))
    faults = json.dumps([asdict(kill), asdict(trace_fault(save / "trace"))])
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1"]
    command = [
        sys.executable,
        "-m",
        *launcher,
        "-m",
        "megatron_croc.verification.faults.inject",
        faults,
    ]
    command += ["megatron_croc.cli.train", *train_words(place.data, save)]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        # Restarted ranks sometimes cannot join the store of the agent (torch 2.13).
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    expect(done.returncode == 0, f"torchrun ended with {done.returncode}: {done.stderr[-300:]}")
    struck = (save / "struck").stat().st_mtime
    first = next(row for row in trace_rows(save) if row["time"] > struck)
    return Outcome(
        samples_once=place.check_equal(save),
        steps_lost=3 - (first["iteration"] - 1),
        seconds=first["time"] - struck,
    )


def _bad_step(place: Workplace, save: Path) -> Outcome:
    fault = Fault(fault="nan_gradient", rank=1, iteration=4)
    exits = place.train(save, fault)
    check_exits(exits, [0, 0])
    check_said(exits, r"step 4 is skipped on all ranks \(gradient norm is nan\): rank 1")
    expect((save / "anomalies" / "iter_0000004.json").exists(), "there is no report")
    ends = [row["loss"] for row in curve(save) if row["iteration"] == 6]
    expect(len(ends) == 1 and ends[0] == ends[0], "the run did not come to a finite end")
    return Outcome(samples_once=_once(save), steps_lost=1)


def _hang(kind: str) -> Callable[[Workplace, Path], Outcome]:
    hang = Fault(fault=kind, rank=1, iteration=4, micro_batch=1)
    return break_and_resume(
        hang,
        statuses=(1, KILLED if kind == "hang_in_c" else 1),
        said=r"rank 1 \(.*st(ands|ood) at step 4, forward, micro-batch 1; its stack is in",
        more=("--stall-timeout-minutes=0.1",),
    )


def _strict(place: Workplace, save: Path) -> Outcome:
    check_exits(place.train(save, more=("--exit-interval=4",)), [0, 0])
    _flip_bit(save)
    exits = place.train(save, more=("--strict-resume",))
    check_exits(exits, [1, 1])
    check_said(exits, r"iter_0000004.*\n?.*damaged")
    return Outcome()


def _bad_image(place: Workplace, save: Path) -> Outcome:
    shutil.copytree(place.data, save / "data")
    tar = sorted((save / "data" / STAGE).glob("*.tar"))[0]
    with tarfile.open(tar) as archive:
        images = [member for member in archive if not member.name.endswith(".json")]
    with tar.open("r+b") as file:
        for image in images[:4]:  # an epoch leaves out up to 3 samples, which fill no step
            file.seek(image.offset_data)
            file.write(bytes(image.size))
    exits = place.train(save, more=("--train-iters=none", "--train-epochs=1"))
    check_exits(exits, [0, 0])
    check_said(exits, r"bad sample \(image\).*sample " + re.escape(STAGE))
    return Outcome(samples_once=_once(save), steps_lost=0)


def _cut_shard(place: Workplace, save: Path) -> Outcome:
    shutil.copytree(place.data, save / "data")
    tar = sorted((save / "data" / STAGE).glob("*.tar"))[0]
    os.truncate(tar, tar.stat().st_size // 2)
    exits = place.train(save)
    check_exits(exits, [1, 1])
    check_said(exits, "error: .*" + re.escape(tar.name))
    return Outcome()


def _once(save: Path) -> bool:
    samples = [name for step in effective_samples(save / "trace").values() for name in step]
    return len(samples) == len(set(samples))


def _payload(save: Path) -> Path:
    """The largest file of the latest checkpoint."""
    files = [path for path in (save / "iter_0000004").rglob("*") if path.is_file()]
    return max(files, key=lambda path: path.stat().st_size)


def _truncate(save: Path) -> None:
    os.truncate(_payload(save), _payload(save).stat().st_size // 2)


def _flip_bit(save: Path) -> None:
    path = _payload(save)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def _kill(rank: int) -> Fault:
    return Fault(fault="kill", rank=rank, iteration=4, micro_batch=1, phase="backward")


def _kill_in_save(name: str, number: int, *, rank: int = 0) -> Fault:
    return Fault(fault="kill_at_call", rank=rank, iteration=4, name=name, number=number)


_FALLBACK = "the damage is named, the checkpoint before is taken; " + SAME

SCENARIOS: dict[str, tuple[str, str, Callable[[Workplace, Path], Outcome]]] = {
    "rank-killed": (
        "SIGKILL of one rank in a step",
        "the others end at once and name it; " + SAME,
        break_and_resume(_kill(1), statuses=(1, KILLED), said=r"rank 1 \(.*is gone.*step 4"),
    ),
    "job-killed": (
        "SIGKILL of all ranks in a step",
        SAME,
        break_and_resume(_kill(0), _kill(1), statuses=(KILLED, KILLED)),
    ),
    "torchrun-restart": (
        "SIGKILL of one rank under torchrun --max-restarts",
        "goes on by itself; the curve is that of an unbroken run, every digit",
        _killed_under_torchrun,
    ),
    "sigterm": (
        "SIGTERM to one rank",
        "all ranks end their step, save, exit 0; " + SAME,
        break_and_resume(
            Fault(fault="signal", rank=1, iteration=3, number=signal.SIGTERM),
            statuses=(0, 0),
            said="stopping after step 3: SIGTERM",
        ),
    ),
    "sigusr1": (
        "SIGUSR1 to one rank (Slurm)",
        "as SIGTERM",
        break_and_resume(
            Fault(fault="signal", rank=0, iteration=3, number=signal.SIGUSR1),
            statuses=(0, 0),
            said="stopping after step 3: SIGUSR1",
        ),
    ),
    "nan-gradient": (
        "NaN in one rank's gradient",
        "the step is skipped on all ranks and reported with rank and samples; training goes on",
        _bad_step,
    ),
    "nan-for-ever": (
        "NaN in two steps in a row, one allowed",
        "the run stops with a report and a checkpoint from before; " + SAME,
        break_and_resume(
            *(Fault(fault="nan_gradient", rank=1, iteration=i) for i in (4, 5)),
            statuses=(1, 1),
            said="2 steps in a row had to be skipped",
            more=("--max-consecutive-skips=1",),
        ),
    ),
    "hang": (
        "one rank sleeps for ever",
        "all end within the timeout, its place and stack are told; " + SAME,
        _hang("hang"),
    ),
    "hang-in-c": (
        "one rank hangs in C and keeps the GIL",
        "all end within 1.5 timeouts, its place and stack are told; " + SAME,
        _hang("hang_in_c"),
    ),
    "killed-in-save": (
        "SIGKILL as the first file is synced",
        "the unfinished checkpoint is never taken; " + SAME,
        break_and_resume(_kill_in_save("os.fsync", 1), statuses=(KILLED, 1)),
    ),
    "killed-in-publish": (
        "SIGKILL between the files and their name",
        "the unfinished checkpoint is never taken; " + SAME,
        break_and_resume(_kill_in_save("os.replace", 1), statuses=(KILLED, 1)),
    ),
    "truncated": (
        "latest checkpoint: a file cut in half",
        _FALLBACK,
        break_and_resume(
            Fault(fault="signal", iteration=4, number=signal.SIGTERM),
            statuses=(0, 0),
            damage=_truncate,
            said_later="damaged",
        ),
    ),
    "bit-flip": (
        "latest checkpoint: one bit flipped",
        _FALLBACK,
        break_and_resume(
            Fault(fault="signal", iteration=4, number=signal.SIGTERM),
            statuses=(0, 0),
            damage=_flip_bit,
            said_later="damaged",
        ),
    ),
    "strict-resume": (
        "one bit flipped, --strict-resume",
        "the run does not start and names the file",
        _strict,
    ),
    "disk-full": (
        "disk full while saving, then SIGKILL",
        "the failure is told, training goes on, the old checkpoint stays; " + SAME,
        break_and_resume(
            *(Fault(fault="disk_full", rank=rank, iteration=4) for rank in (0, 1)),
            *(Fault(fault="kill", rank=rank, iteration=5) for rank in (0, 1)),
            statuses=(KILLED, KILLED),
            said="training goes on",
        ),
    ),
    "killed-in-async-save": (
        "SIGKILL while a thread saves (--async-save)",
        "the unfinished checkpoint is never taken; " + SAME,
        break_and_resume(
            *(Fault(fault="kill", rank=rank, iteration=5) for rank in (0, 1)),
            statuses=(KILLED, KILLED),
            more=("--async-save", "--keep-last=2"),
        ),
    ),
    "bad-image": (
        "the bytes of four images are zeroed in a shard",
        "the samples are named and left out, training goes on",
        _bad_image,
    ),
    "cut-shard": (
        "a shard is cut in half",
        "the run does not start and names the shard",
        _cut_shard,
    ),
    **HARDER,
}
"""name -> (fault, promise, scenario)."""
