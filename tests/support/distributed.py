"""Run a function on several processes joined by gloo, in seconds.

Importing torch and megatron-core takes seconds, so a fork server imports them once per test
session; every job is then forked from it and starts in milliseconds with a clean state.
"""

import multiprocessing as mp
import os
import pickle
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

context = mp.get_context("forkserver")
context.set_forkserver_preload(["megatron_croc.training.build", "megatron_croc.training.evaluate"])

TIMEOUT = 300
"""Seconds after which a hanging job fails."""


def run_distributed(function: Callable[..., Any], world_size: int, *args: Any) -> list[Any]:
    """function(*args) on every rank; its results in rank order, or the first rank's error."""
    queue: mp.Queue = context.Queue()
    port = free_port()
    processes = [
        context.Process(target=entry, args=(queue, rank, world_size, port, function, args))
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    results: dict[int, Any] = {}
    try:
        while len(results) < world_size:
            rank, result, error = queue.get(timeout=TIMEOUT)
            if error is not None:
                raise AssertionError(f"rank {rank} of {world_size} failed:\n{error}")
            results[rank] = pickle.loads(result)
    finally:
        for process in processes:
            process.join(timeout=5)
            process.kill()
    return [results[rank] for rank in range(world_size)]


@dataclass(frozen=True)
class Exit:
    """How a rank ended."""

    status: int
    """Exit status; -9 after SIGKILL."""

    output: str
    """All that it printed."""


def run_to_exit(
    function: Callable[..., int], world_size: int, *args: Any, timeout: float = TIMEOUT
) -> list[Exit]:
    """function(*args) on every rank, which may be killed or hang; how each rank ended.

    Fails when a rank is still there after `timeout` seconds.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder) / f"rank_{rank}" for rank in range(world_size)]
        processes = [
            _context.Process(
                target=_printing_entry, args=(output, rank, world_size, port, function, args)
            )
            for rank, output in enumerate(outputs)
        ]
        for process in processes:
            process.start()
        deadline = time.monotonic() + timeout
        for process in processes:
            process.join(timeout=max(deadline - time.monotonic(), 0.0))
        left = [rank for rank, process in enumerate(processes) if process.is_alive()]
        for process in processes:
            process.kill()
            process.join()
        texts = [output.read_text() for output in outputs]
    assert not left, f"ranks {left} were still there after {timeout} s:\n{texts}"
    return [
        Exit(process.exitcode or 0, text) for process, text in zip(processes, texts, strict=True)
    ]


def _printing_entry(
    output: Path, rank: int, world_size: int, port: int, function: Callable, args: tuple
) -> None:
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    _become_rank(rank, world_size, port)
    sys.exit(function(*args))


def _become_rank(rank: int, world_size: int, port: int) -> None:
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


def _entry(
    queue: mp.Queue, rank: int, world_size: int, port: int, function: Callable, args: tuple
) -> None:
    _become_rank(rank, world_size, port)
    try:
        result = function(*args)
    except BaseException:
        queue.put((rank, None, traceback.format_exc()))
        queue.close()
        queue.join_thread()
        os._exit(1)
    # By value: torch would share tensors through a socket that dies with this process.
    queue.put((rank, pickle.dumps(result), None))
    from megatron_croc.parallel.groups import stop_distributed

    stop_distributed()
