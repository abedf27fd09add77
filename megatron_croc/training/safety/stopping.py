"""Early end of a run, after the same step on every rank.

The signal handlers belong to the whole process (docs/design.md, "State that belongs to the whole
process").
"""

import logging
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import torch
import torch.distributed as dist

from megatron_croc.config.reliability import ReliabilityConfig
from megatron_croc.log import get_logger, log_on_rank_zero
from megatron_croc.parallel.device import to_device

logger = get_logger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
"""Signals of Slurm and torchrun that end a job; one rank that receives one is enough."""

_DURATION, _INTERVAL = 1001, 1002  # above every signal's number


class StopRequests:
    """Requests to stop of this rank; all ranks agree on them at the end of each step."""

    def __init__(self, config: ReliabilityConfig) -> None:
        """Start the clock of exit_duration_in_mins."""
        self.config = config
        self.started = time.monotonic()
        self.request = 0

    def agreed(self, iteration: int) -> bool:
        """Return True if the run ends after step `iteration`; the same on every rank.

        Takes the maximum over all ranks, because signals arrive in different steps and clocks
        differ.
        """
        code = self._own_request(iteration)
        if dist.get_world_size() > 1:
            request = to_device(torch.tensor(code))
            dist.all_reduce(request, op=dist.ReduceOp.MAX)
            code = int(request.item())
        if code:
            log_on_rank_zero(
                logger, logging.WARNING, "stopping after step %d: %s", iteration, _reason(code)
            )
        return code > 0

    def _own_request(self, iteration: int) -> int:
        config = self.config
        if self.request:
            return self.request
        minutes = config.exit_duration_in_mins
        if minutes is not None and time.monotonic() - self.started > 60.0 * minutes:
            return _DURATION
        if config.exit_interval is not None and iteration % config.exit_interval == 0:
            return _INTERVAL
        return 0

    def note(self, number: int, _: FrameType | None = None) -> None:
        """Handle a signal: the run stops after the current step."""
        self.request = number


def _reason(code: int) -> str:
    known = {_DURATION: "exit_duration_in_mins has passed", _INTERVAL: "exit_interval"}
    return known.get(code) or f"{signal.Signals(code).name} was received"


@contextmanager
def stop_requests(config: ReliabilityConfig) -> Iterator[StopRequests]:
    """Handle SIGTERM and SIGUSR1 inside the block."""
    requests = StopRequests(config)
    if threading.current_thread() is not threading.main_thread():
        yield requests  # Python lets only the main thread handle signals
        return
    before = {number: signal.signal(number, requests.note) for number in SIGNALS}
    try:
        yield requests
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
