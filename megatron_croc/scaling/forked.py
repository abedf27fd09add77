"""Commands of `croc` as forks of one process that has imported torch already.

A start takes ten seconds of a CPU core for imports alone, as much as a hundred steps of a tiny
model. The fork server imports once; each command then starts at once, in a process of its own.
"""

import multiprocessing
import os
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

PRELOADED = ["megatron_croc.training.loop", "megatron_croc.inference.generation", "transformers"]


def run_forked(words: Sequence[str], log: Path, *, nice: int = 0) -> int:
    """Run `croc WORDS...` on one thread with its output in a file; returns the exit status."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    process = context.Process(target=_command, args=(list(words), str(log), nice))
    process.start()
    process.join()
    assert process.exitcode is not None
    return process.exitcode


def _command(words: list[str], log: str, nice: int) -> None:
    """Run the command line in this process."""
    os.nice(nice)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.argv = ["croc", *words]
    runpy.run_module("megatron_croc", run_name="__main__")
