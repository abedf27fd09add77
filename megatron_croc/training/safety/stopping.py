"""Early end of a run, after the same step on every rank.

The signal handlers belong to the whole process (docs/design.md, "State that belongs to the whole
process").
"""

import logging
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import torch
import torch.distributed as dist

from megatron_croc.config.reliability import ReliabilityConfig
from megatron_croc.log import get_logger, log_on_rank_zero, rank
from megatron_croc.parallel.device import to_device

logger = get_logger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
"""Signals of Slurm and torchrun that end a job; one rank that receives one is enough."""

SAME_PRESS = 1.0
"""Seconds within which several SIGINT are one: of the terminal, and passed on by torchrun."""

INTERRUPTED = 130
"""Exit status after SIGINT, as shells expect it."""

_DURATION, _INTERVAL = 1001, 1002  # above every signal's number


class StopRequests:
    """Requests to stop of this rank; all ranks agree on them at the end of each step."""

    def __init__(self, config: ReliabilityConfig) -> None:
        """Start the clock of exit_duration_in_mins."""
        self.config = config
        self.started = time.monotonic()
        self.request = 0
        self.interrupted_at: float | None = None
        self._end: tuple[int, int] | None = None

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
            self._end = code, iteration
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

    def interrupt(self, number: int, _: FrameType | None = None) -> None:
        """Handle Ctrl-C: the first stops the run after the current step, the second at once."""
        now = time.monotonic()
        if self.interrupted_at is None:
            self.interrupted_at = now
            self.note(number)
            _tell(
                "Ctrl-C: this step ends and a checkpoint is written (with --save); "
                "press it again to stop at once"
            )
        elif now - self.interrupted_at > SAME_PRESS:
            _tell("stopped at once by the second Ctrl-C: steps since the last checkpoint are lost")
            os._exit(INTERRUPTED)

    def raise_if_interrupted(self) -> None:
        """Raise KeyboardInterrupt if the ranks agreed to stop because of Ctrl-C."""
        if self._end is not None and self._end[0] == signal.SIGINT:
            raise KeyboardInterrupt(f"stopped by Ctrl-C after step {self._end[1]}")


def _tell(text: str) -> None:
    """Write a line on rank 0, from inside a signal handler, where no stream may be used."""
    if rank() == 0:
        os.write(2, f"\n{text}\n".encode())


def _reason(code: int) -> str:
    known = {_DURATION: "exit_duration_in_mins has passed", _INTERVAL: "exit_interval"}
    return known.get(code) or f"{signal.Signals(code).name} was received"


@contextmanager
def stop_requests(config: ReliabilityConfig) -> Iterator[StopRequests]:
    """Handle SIGTERM, SIGUSR1 and SIGINT inside the block; an ignored SIGINT stays ignored."""
    requests = StopRequests(config)
    if threading.current_thread() is not threading.main_thread():
        yield requests  # Python lets only the main thread handle signals
        return
    before = {number: signal.signal(number, requests.note) for number in SIGNALS}
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        before[signal.SIGINT] = signal.signal(signal.SIGINT, requests.interrupt)
    try:
        yield requests
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
