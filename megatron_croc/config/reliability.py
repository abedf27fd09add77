"""When a run stops early, and what it does about a step that went wrong."""

from dataclasses import dataclass

WATCHDOG_MARGIN = 1.5
"""A rank whose watchdog cannot run is ended at this multiple of its limit; torch waits longer."""


@dataclass(kw_only=True)
class ReliabilityConfig:
    """Stopping in good order, and steps whose loss or gradient cannot be right.

    SIGTERM and SIGUSR1 on any rank always end the run after the step under way, with a checkpoint.
    """

    stall_timeout_minutes: float = 10.0
    """The watchdog ends a rank that stands still longer in one phase of a step, and names it."""

    first_step_timeout_minutes: float = 20.0
    """The same in a run's first step, in which kernels are compiled and tuned."""

    exit_duration_in_mins: float | None = None
    """Stop after this many minutes of training, with a checkpoint; None: never."""

    exit_interval: int | None = None
    """Stop after the next step divisible by this, with a checkpoint; None: never."""

    max_consecutive_skips: int = 10
    """Steps in a row that may be skipped because loss or gradient is not finite, or spikes;
    one more ends the run with a checkpoint from before them."""

    spike_factor: float = 0.0
    """Skip a step whose loss is above this multiple of the mean of the last 32; 0: never."""
