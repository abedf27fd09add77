"""Start the ranks of a job as local processes joined by gloo, and report how each rank ended.

A fork server imports torch and megatron-core once; every rank is forked from it in milliseconds.
The tests start their jobs with `start_ranks`, too.
"""

import multiprocessing as mp
import os
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

context = mp.get_context("forkserver")
context.set_forkserver_preload(["megatron_croc.training.build", "megatron_croc.training.evaluate"])


@dataclass(frozen=True)
class Exit:
    """Exit status and output of one rank."""

    status: int
    """Exit status; -9 after SIGKILL."""

    output: str
    """Standard output and standard error."""


def run_to_exit(
    function: Callable[..., int], world_size: int, *args: Any, timeout: float = 300.0
) -> list[Exit]:
    """Run function(*args) on every rank, and wait until all have ended.

    Returns:
        the exit of each rank, in rank order.

    Raises:
        TimeoutError: a rank was still running after `timeout` seconds; all ranks are killed.
    """
    with tempfile.TemporaryDirectory() as folder:
        processes = start_ranks(_exit_with_status, world_size, Path(folder), function, args)
        deadline = time.monotonic() + timeout
        for process in processes:
            process.join(timeout=max(deadline - time.monotonic(), 0.0))
        left = [rank for rank, process in enumerate(processes) if process.is_alive()]
        for process in processes:
            process.kill()
            process.join()
        outputs = [Path(folder) / str(rank) for rank in range(world_size)]
        texts = [output.read_text() if output.exists() else "" for output in outputs]
    if left:
        raise TimeoutError(f"ranks {left} were still running after {timeout} s:\n{texts}")
    return [
        Exit(process.exitcode or 0, text) for process, text in zip(processes, texts, strict=True)
    ]


def start_ranks(
    function: Callable[..., None],
    world_size: int,
    *args: Any,
    context: BaseContext = context,
) -> list[BaseProcess]:
    """Start one job: function(rank, *args) in a process per rank, with the variables of torchrun.

    Args:
        function: importable by name, because its process looks it up.
        world_size: ranks of the job.
        args: further arguments, which must be picklable.
        context: start method of the processes.

    Returns:
        the started processes, in rank order.
    """
    port = free_port()
    processes: list[BaseProcess] = [
        context.Process(  # type: ignore[attr-defined]
            target=_run_rank, args=(rank, world_size, port, function, args)
        )
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    return processes


def free_port() -> int:
    """Return a free port of this machine, for the rendezvous of one job."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _run_rank(
    rank: int, world_size: int, port: int, function: Callable[..., None], args: tuple
) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        OMP_NUM_THREADS="1",
    )
    import torch

    torch.set_num_threads(1)
    function(rank, *args)


def _exit_with_status(rank: int, folder: Path, function: Callable[..., int], args: tuple) -> None:
    """Write this rank's output to a file of `folder`; the result is the exit status."""
    descriptor = os.open(folder / str(rank), os.O_WRONLY | os.O_CREAT)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.exit(function(*args))
