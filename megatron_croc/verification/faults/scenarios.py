"""Faults of the matrix: the promised behaviour of each, and a run that checks it."""

import signal

from megatron_croc.verification.faults.damage import flip_bit, truncate_checkpoint
from megatron_croc.verification.faults.harder_scenarios import HARDER
from megatron_croc.verification.faults.inject import Fault
from megatron_croc.verification.faults.single_runs import (
    kill_under_torchrun,
    refuse_cut_shard,
    refuse_damage,
    skip_bad_images,
    skip_bad_step,
)
from megatron_croc.verification.faults.workplace import (
    KILLED,
    SAME,
    Scenario,
    break_and_resume,
)


def _hang(kind: str) -> Scenario:
    hang = Fault(fault=kind, rank=1, iteration=4, micro_batch=1)
    return break_and_resume(
        hang,
        statuses=(1, KILLED if kind == "hang_in_c" else 1),
        said=r"rank 1 \(.*st(ands|ood) at step 4, forward, micro-batch 1; its stack is in",
        more=("--stall-timeout-minutes=0.1",),
    )


def _kill(rank: int) -> Fault:
    return Fault(fault="kill", rank=rank, iteration=4, micro_batch=1, phase="backward")


def _kill_in_save(name: str, number: int, *, rank: int = 0) -> Fault:
    return Fault(fault="kill_at_call", rank=rank, iteration=4, name=name, number=number)


_FALLBACK = "the damage is named, the checkpoint before is taken; " + SAME

SCENARIOS: dict[str, tuple[str, str, Scenario]] = {
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
        kill_under_torchrun,
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
        skip_bad_step,
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
            damage=truncate_checkpoint,
            said_later="damaged",
        ),
    ),
    "bit-flip": (
        "latest checkpoint: one bit flipped",
        _FALLBACK,
        break_and_resume(
            Fault(fault="signal", iteration=4, number=signal.SIGTERM),
            statuses=(0, 0),
            damage=flip_bit,
            said_later="damaged",
        ),
    ),
    "strict-resume": (
        "one bit flipped, --strict-resume",
        "the run does not start and names the file",
        refuse_damage,
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
        skip_bad_images,
    ),
    "cut-shard": (
        "a shard is cut in half",
        "the run does not start and names the shard",
        refuse_cut_shard,
    ),
    **HARDER,
}
"""name -> (fault, promise, scenario)."""
