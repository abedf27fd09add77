"""Growth of one training process over a long run: memory, open files, threads, shared memory.

The tiny recipe at its smallest; every 50 steps a validation opens and closes a second loader, every
200 steps a checkpoint is written.
"""

import os
import threading
from dataclasses import dataclass
from pathlib import Path

from megatron_croc.verification.faults.inject import on_enter, run_command

RSS_GROWTH = 8.0
"""Allowed growth of resident memory in the second half of a run, MiB; allocators fluctuate."""


@dataclass(kw_only=True)
class Usage:
    """Resources of this process at one step."""

    iteration: int
    rss: float
    """Resident memory, MiB."""
    files: int
    """Open descriptors."""
    threads: int
    """Python threads."""
    shared: float
    """Bytes in /dev/shm of the whole machine, MiB."""


def measure(iteration: int) -> Usage:
    """Measure this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    shared = sum(p.stat().st_size for p in Path("/dev/shm").glob("torch_*") if p.is_file())
    return Usage(
        iteration=iteration,
        rss=pages * os.sysconf("SC_PAGE_SIZE") / 2**20,
        files=len(os.listdir("/proc/self/fd")),
        threads=threading.active_count(),
        shared=shared / 2**20,
    )


def soak(words: list[str], *, steps: int) -> list[Usage]:
    """Train `steps` steps in this process and measure it twenty times.

    Args:
        words: of the train command: recipe, data, tokenizer, save.
        steps: optimizer steps.
    """
    from megatron_croc.training.safety.heartbeat import own_beat

    usages: list[Usage] = []

    def act(phase: str, _: int | None) -> None:
        if phase.startswith("waiting for data") and own_beat().iteration % (steps // 20) == 1:
            usages.append(measure(own_beat().iteration))

    on_enter(act)
    more = [f"--train-iters={steps}", "--log-interval=50", "--eval-interval=50", "--eval-iters=1"]
    more += [f"--save-interval={max(steps // 10, 1)}", "--no-tensorboard"]
    status = run_command("megatron_croc.cli.train", [*words, *more])
    if status != 0:
        raise RuntimeError(f"training ended with status {status}")
    return usages


def growth(usages: list[Usage]) -> dict[str, float]:
    """Difference of the last measurement and the middle one, after all caches are warm."""
    middle, last = usages[len(usages) // 2], usages[-1]
    return {
        name: getattr(last, name) - getattr(middle, name)
        for name in ("rss", "files", "threads", "shared")
    }
