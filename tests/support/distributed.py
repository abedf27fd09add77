"""Run a function on several processes joined by gloo, in seconds.

Importing torch and megatron-core takes seconds, so a fork server imports them once per test
session; every job is then forked from it and starts in milliseconds with a clean state.
"""

import multiprocessing as mp
import os
import pickle
import socket
import traceback
from collections.abc import Callable
from multiprocessing.context import BaseContext
from typing import Any

context = mp.get_context("forkserver")
context.set_forkserver_preload(["megatron_croc.training.build", "megatron_croc.training.evaluate"])

TIMEOUT = 300
"""Seconds after which a hanging job fails."""

strict: Any = None
"""Options of tests/support/strict_device for every job; set by pytest --strict-device."""


def run_distributed(
    function: Callable[..., Any], world_size: int, *args: Any, context: BaseContext = context
) -> list[Any]:
    """function(*args) on every rank; its results in rank order, or the first rank's error."""
    queue: mp.Queue = context.Queue()
    processes = start_ranks(queue, function, world_size, *args, context=context)
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


def start_ranks(
    queue: mp.Queue,
    function: Callable[..., Any],
    world_size: int,
    *args: Any,
    context: BaseContext = context,
) -> list[mp.process.BaseProcess]:
    """One process per rank of a job of its own; keep `queue`, whose locks they open by name."""
    if strict is not None:
        function, args = _made_strict(function, args)
    port = free_port()
    processes = [
        context.Process(  # type: ignore[attr-defined]
            target=entry, args=(queue, rank, world_size, port, function, args)
        )
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    return processes


def _made_strict(function: Callable[..., Any], args: tuple) -> tuple[Callable[..., Any], tuple]:
    from tests.support.strict_device import result_of, run_strict

    is_strict = "test_strict_device" in function.__module__
    if is_strict or function in (result_of, run_strict):
        return function, args
    return result_of, (strict, function, *args)


def free_port() -> int:
    """A port for one job's rendezvous."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def entry(
    queue: mp.Queue, rank: int, world_size: int, port: int, function: Callable, args: tuple
) -> None:
    """One rank: run, and answer through the queue."""
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
