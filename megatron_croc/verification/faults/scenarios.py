"""Faults of the matrix: the promised behaviour of each, and a run that checks it."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from megatron_croc.verification.faults.inject import Fault
from megatron_croc.verification.faults.launch import Exit, run_to_exit
from megatron_croc.verification.faults.runs import (
    STAGE,
    curve,
    effective_samples,
    faulty_train,
    make_data,
    trace_fault,
    train_words,
)


class BrokenPromiseError(AssertionError):
    """A run did not behave as promised."""


def expect(condition: bool, otherwise: str) -> None:
    """Raise BrokenPromiseError unless the condition holds."""
    if not condition:
        raise BrokenPromiseError(otherwise)


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
        everyone = [sample for step in samples.values() for sample in step]
        return len(everyone) == len(set(everyone))


def check_exits(exits: list[Exit], statuses: list[int]) -> None:
    """Compare exit statuses; the error holds the last output of the first wrong rank."""
    for rank, (end, status) in enumerate(zip(exits, statuses, strict=True)):
        said = end.output.strip().splitlines()[-3:]
        expect(end.status == status, f"rank {rank} ended with {end.status}, not {status}: {said}")


def check_said(exits: list[Exit], pattern: str) -> None:
    """Require that some rank printed text that matches `pattern`."""
    output = "\n".join(end.output for end in exits)
    expect(re.search(pattern, output) is not None, f"no rank printed {pattern!r}")


Damage = Callable[[Path], None]


def break_and_resume(
    *faults: Fault,
    statuses: tuple[int, ...],
    said: str = "",
    damage: Damage | None = None,
    said_later: str = "",
    more: tuple[str, ...] = (),
) -> Callable[[Workplace, Path], Outcome]:
    """Make a scenario: a run with faults, optional damage, then the same command again."""

    def scenario(place: Workplace, save: Path) -> Outcome:
        exits = place.train(save, *faults, more=more)
        ended = time.time()
        check_exits(exits, list(statuses))
        if said:
            check_said(exits, said)
        done = _last_step(save)
        if damage is not None:
            damage(save)
        exits = place.train(save, more=more)
        check_exits(exits, [0, 0])
        if said_later:
            check_said(exits, said_later)
        first = next(row for row in _trace_rows(save) if row["time"] > ended)
        return Outcome(
            samples_once=place.check_equal(save),
            steps_lost=done - (first["iteration"] - 1),
            seconds=first["time"] - ended,
        )

    return scenario


def _trace_rows(save: Path) -> list[dict]:
    lines = (save / "trace" / "rank_0.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def _last_step(save: Path) -> int:
    return max((row["iteration"] for row in _trace_rows(save)), default=0)


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
    first = next(row for row in _trace_rows(save) if row["time"] > struck)
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


KILLED = -signal.SIGKILL

_SAME = "the same command goes on; the curve is that of an unbroken run, every digit"
_FALLBACK = "the damage is named, the checkpoint before is taken; " + _SAME

SCENARIOS: dict[str, tuple[str, str, Callable[[Workplace, Path], Outcome]]] = {
    "rank-killed": (
        "SIGKILL of one rank in a step",
        "the others end at once and name it; " + _SAME,
        break_and_resume(_kill(1), statuses=(1, KILLED), said=r"rank 1 \(.*is gone.*step 4"),
    ),
    "job-killed": (
        "SIGKILL of all ranks in a step",
        _SAME,
        break_and_resume(_kill(0), _kill(1), statuses=(KILLED, KILLED)),
    ),
    "torchrun-restart": (
        "SIGKILL of one rank under torchrun --max-restarts",
        "goes on by itself; the curve is that of an unbroken run, every digit",
        _killed_under_torchrun,
    ),
    "sigterm": (
        "SIGTERM to one rank",
        "all ranks end their step, save, exit 0; " + _SAME,
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
        "the run stops with a report and a checkpoint from before; " + _SAME,
        break_and_resume(
            *(Fault(fault="nan_gradient", rank=1, iteration=i) for i in (4, 5)),
            statuses=(1, 1),
            said="2 steps in a row had to be skipped",
            more=("--max-consecutive-skips=1",),
        ),
    ),
    "hang": (
        "one rank sleeps for ever",
        "all end within the timeout, its place and stack are told; " + _SAME,
        _hang("hang"),
    ),
    "hang-in-c": (
        "one rank hangs in C and keeps the GIL",
        "all end within 1.5 timeouts, its place and stack are told; " + _SAME,
        _hang("hang_in_c"),
    ),
    "killed-in-save": (
        "SIGKILL as the first file is synced",
        "the unfinished checkpoint is never taken; " + _SAME,
        break_and_resume(_kill_in_save("os.fsync", 1), statuses=(KILLED, 1)),
    ),
    "killed-in-publish": (
        "SIGKILL between the files and their name",
        "the unfinished checkpoint is never taken; " + _SAME,
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
        "the failure is told, training goes on, the old checkpoint stays; " + _SAME,
        break_and_resume(
            *(Fault(fault="disk_full", rank=rank, iteration=4) for rank in (0, 1)),
            *(Fault(fault="kill", rank=rank, iteration=5) for rank in (0, 1)),
            statuses=(KILLED, KILLED),
            said="training goes on",
        ),
    ),
    "killed-in-async-save": (
        "SIGKILL while a thread saves (--async-save)",
        "the unfinished checkpoint is never taken; " + _SAME,
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
}
"""name -> (fault, promise, scenario)."""
