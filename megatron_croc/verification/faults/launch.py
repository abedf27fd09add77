"""Ranks that may be killed or hang: started in milliseconds, and how each of them ended.

A fork server imports torch and megatron-core once; every rank is forked from it.
"""

import multiprocessing as mp
import os
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_context = mp.get_context("forkserver")
_context.set_forkserver_preload(["megatron_croc.training.build", "megatron_croc.training.evaluate"])


@dataclass(frozen=True)
class Exit:
    """How a rank ended."""

    status: int
    """Exit status; -9 after SIGKILL."""

    output: str
    """All that it printed."""


def run_to_exit(
    function: Callable[..., int], world_size: int, *args: Any, timeout: float = 300.0
) -> list[Exit]:
    """function(*args) on every rank, joined by gloo.

    Returns:
        how each rank ended, in rank order.

    Raises:
        TimeoutError: a rank was still there after `timeout` seconds.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder) / f"rank_{rank}" for rank in range(world_size)]
        processes = [
            _context.Process(target=_entry, args=(output, rank, world_size, port, function, args))
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
        texts = [output.read_text() if output.exists() else "" for output in outputs]
    if left:
        raise TimeoutError(f"ranks {left} were still there after {timeout} s:\n{texts}")
    return [
        Exit(process.exitcode or 0, text) for process, text in zip(processes, texts, strict=True)
    ]


def _entry(
    output: Path, rank: int, world_size: int, port: int, function: Callable, args: tuple
) -> None:
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
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
    sys.exit(function(*args))
