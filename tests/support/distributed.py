"""Run a function on several processes joined by gloo, and collect the results of all ranks.

The processes are those of megatron_croc/verification/faults/launch.py.
"""

import multiprocessing as mp
import os
import pickle
import traceback
from collections.abc import Callable
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from typing import Any

from megatron_croc.verification.faults import launch
from megatron_croc.verification.faults.launch import context, free_port

__all__ = ["context", "free_port", "run_distributed", "start_ranks"]

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
) -> list[BaseProcess]:
    """Start a job that puts its results into `queue`; keep it: the ranks open its locks by name."""
    if strict is not None:
        function, args = _made_strict(function, args)
    return launch.start_ranks(_answer, world_size, queue, function, args, context=context)


def _made_strict(function: Callable[..., Any], args: tuple) -> tuple[Callable[..., Any], tuple]:
    from tests.support.strict_device import result_of, run_strict

    is_strict = "test_strict_device" in function.__module__
    if is_strict or function in (result_of, run_strict):
        return function, args
    return result_of, (strict, function, *args)


def _answer(rank: int, queue: mp.Queue, function: Callable[..., Any], args: tuple) -> None:
    """Put the result or the error of one rank into the queue."""
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
